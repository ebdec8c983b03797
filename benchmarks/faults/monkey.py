"""Seeded runs under random faults: roles and nodes are killed at random moments, and the run must come to the same end."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from benchmarks.faults.bench import Bench, Watch, said, shm
from benchmarks.faults.inject import kill, kill_frozen
from benchmarks.faults.invariants import HELD, Held
from benchmarks.faults.machines import node_of
from benchmarks.faults.play import DRIVER, ROOT, Late, Run
from benchmarks.faults.record import Outcome, seconds, what_holds
from benchmarks.faults.strikes import Strike, Struck, after, redone

POOL, CPUS = "all", 2
POOLS: Mapping[str, int] = {POOL: CPUS, f"{POOL}/spare": CPUS}
PROCESSES = ("rollout-0", "rollout-1", "scorer-0", "reward-0", "learner-0")
PHASES = ("sample_meta", "reward", "sample", "score", "policy", "sync")
HOWS = (("kill", 5), ("kill frozen", 3), ("lose the node", 2))
"""And how often each."""
FAULTS = 2
ENDS_S = 600.0
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Planned:
    """A fault of a seed.

    Args:
        how: of ``HOWS``.
        process: that it is done to, or whose node.
        phase: after the driver's next wait for which it is done.
        delay_s: and how long after.
    """

    how: str
    process: str
    phase: str
    delay_s: float


def plan(seed: int, faults: int = FAULTS) -> tuple[Planned, ...]:
    """What a seed does; the same each time."""
    rng = random.Random(seed)
    hows, weights = [how for how, _ in HOWS], [weight for _, weight in HOWS]
    return tuple(
        Planned(rng.choices(hows, weights)[0], rng.choice(PROCESSES), rng.choice(PHASES), round(rng.uniform(0.0, 0.3), 3))
        for _ in range(faults)
    )


def seconds_of_rounds(run: Run) -> float:
    """From the first round's first wait until the last commit."""
    spans = [span for span in run.spans() if span["who"] == DRIVER and span["round"] is not None]
    return float(spans[-1]["end"] - spans[0]["start"])


def play(bench: Bench, seed: int) -> dict[str, Any]:
    """One run under the faults of a seed.

    Args:
        bench: where, with ``POOLS``.
        seed: of the faults.
    """
    baseline, before, name = bench.baseline(), shm(), bench.fresh(f"monkey-{seed}")
    usual = undisturbed(bench)
    with bench.run(name) as run:
        struck = [(each, one(bench, run, each)) for each in plan(seed) if run.process.poll() is None]
        code = run.end(ENDS_S)
        if code:
            raise Late(f"seed {seed}: the run ended with {code}:\n{run.output()[-3000:]}")
        held = bench.held(run, baseline, [said("lost", each.process) for each, s in struck if s is not None], before)
        rows = run.metrics.read()
        took = seconds_of_rounds(run)
        done = [(each, s) for each, s in struck if s is not None]
        return {
            "seed": seed,
            "faults": [asdict(each) for each, _ in done],
            "detected_s": [s.detected_s for _, s in done],
            "recovered_s": [s.recovered_s for _, s in done],
            "lost": redone(run.spans(), [s for _, s in done]),
            "seconds": took,
            "undisturbed_s": usual,
            "goodput": usual / took,
            "stale_refused": max((row["faults/stale_replies"] for row in rows if "faults/stale_replies" in row), default=0),
            "duplicates": len([words for words in held.wrong["I1"] if "twice" in words]),
            **standing(bench),
            "invariants": held.words(),
            "held": held.all,
        }


def standing(bench: Bench) -> dict[str, float]:
    """Memory and open files of the processes that stay from run to run: the head's, without its workers."""
    stay = [process for process in bench.nodes.head.family() if process.name() in ("raylet", "gcs_server")]
    return {
        "standing_rss_mib": sum(process.memory_info().rss for process in stay) / 2**20,
        "standing_files": float(sum(process.num_fds() for process in stay)),
    }


def soak(bench: Bench) -> None:
    """F56: all seeds of this label as one, with what stayed in the cluster."""
    here = [row for row in bench.record.rows("monkey") if row["held"] and row["session"] == bench.record.session]
    if len(here) < 2:
        return
    first, last = here[0], here[-1]
    grown = last["standing_rss_mib"] - first["standing_rss_mib"], last["standing_files"] - first["standing_files"]
    seeds = bench.record.seeds()
    bad = {
        name: [f"seed {row['seed']}" for row in seeds if name in row["invariants"] and row["invariants"][name] != HELD]
        for name in ("I1", "I2", "I3", "I4", "I5", "I6")
    }
    note = f"{len(here)} runs on one cluster: head's memory {grown[0]:+.1f} MiB, open files {grown[1]:+.0f}"
    figures = {"runs": float(len(here)), "grown_mib": grown[0], "grown_files": grown[1]}
    bench.record.outcome(Outcome("F56", None, None, None, "see the seeds", note, figures), Held(bad))


def one(bench: Bench, run: Run, each: Planned) -> Struck | None:
    """Do a planned fault; None if the run was over before its moment."""

    def act(victim: psutil.Process) -> float:
        if each.how == "lose the node":
            node, at = node_of(bench, run, each.process), time.time()
            node.kill()
            bench.nodes.add(POOL, CPUS, wait=False)
            return at
        return kill(victim) if each.how == "kill" else kill_frozen(victim)

    bench.nodes.settle()
    try:
        after(each.phase, each.delay_s)(run)
    except Late:
        if run.process.poll() == 0:
            return None
        raise
    process = run.role(each.process)
    at = act(process)
    watch = Watch(run, each.process, at)
    try:
        detected, recovered = watch.detected(), watch.recovered()
    except Late:
        if run.process.poll() == 0:  # it was not needed any more
            return None
        raise
    return Struck(Strike("F56", each.process, lambda run: None), at, detected, recovered, f"{each.how} after {each.phase}")


NOTHING: Mapping[str, Any] = {
    "detected_s": [], "recovered_s": [], "lost": [], "seconds": None, "undisturbed_s": None, "goodput": None, "stale_refused": 0,
    "duplicates": 0, "held": False,
}  # fmt: skip
"""Of a run that did not come to its end."""


def percent(share: float | None) -> str:
    """For the table."""
    return "-" if share is None else f"{share:.0%}"


def undisturbed(bench: Bench) -> float:
    """What the rounds take without a fault, on this machine: of the baseline's timeline, s."""
    import json

    lines = (bench.baseline() / "timeline.jsonl").read_text().splitlines()
    spans = [span for span in map(json.loads, lines) if span["who"] == DRIVER and span["round"] is not None]
    return float(spans[-1]["end"] - spans[0]["start"])


def monkey(bench: Bench, seeds: int) -> None:
    """Play the seeds that are not in the results yet, or did not hold.

    Args:
        bench: where.
        seeds: how many, from 0.
    """
    done = {row["seed"] for row in bench.record.seeds() if row["held"]}
    for seed in range(seeds):
        if seed not in done:
            began = time.time()
            try:
                row = play(bench, seed)
            except Late as late:
                row = {
                    **NOTHING,
                    "seed": seed,
                    "faults": [asdict(each) for each in plan(seed)],
                    "invariants": {"I5": str(late)[-1500:]},
                }
            bench.record.write("monkey", row)
            faults = ", ".join(f"{f['how']} {f['process']} after {f['phase']}" for f in row["faults"])
            state = "all invariants held" if row["held"] else f"BROKEN {row['invariants']}"
            print(f"seed {seed}: {faults}: goodput {percent(row['goodput'])}, {state}; {time.time() - began:.0f} s", flush=True)
    soak(bench)


def goodput(bench: Bench, process: str, rounds: int = 10) -> None:
    """Ten rounds of the quickstart's run with one failure in them, with two engines, of which one may fail.

    The undisturbed time is that of the same run's other rounds.

    Args:
        bench: where.
        process: that is killed in the middle of the fifth round.
        rounds: to play.
    """

    bench = replace(bench, config=QUICKSTART)
    name = bench.fresh(f"goodput-{process}")
    with bench.run(name, "--rounds.num_rounds", str(rounds), "--rollout.num_engines", "2") as run:
        run.until_waited("sync", rounds // 2, 4, 900)
        kill_frozen(run.role(process))
        if run.end(900):
            raise Late(f"{name}: {run.output()[-3000:]}")
        spans = [span for span in run.spans() if span["who"] == DRIVER and span["round"] is not None]
        ends = [max(span["end"] for span in spans if span["round"] == k) for k in range(rounds)]
        starts = [spans[0]["start"], *ends[:-1]]
        each = [end - start for start, end in zip(starts, ends, strict=True)]
    usual = statistics.median(each[1 : rounds // 2] + each[rounds // 2 + 1 :])
    row: dict[str, Any] = {
        "process": process,
        "config": QUICKSTART.stem,
        "rounds": rounds,
        "seconds": ends[-1] - starts[0],
        "round_s": usual,
        "all_rounds_s": each,
    }
    share = usual * rounds / row["seconds"]
    bench.record.write("goodput", row | {"goodput": share})
    print(f"goodput at one failure of {process} in {rounds} rounds: {share:.1%}", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The seeds as Markdown, and what they come to."""
    lines = [
        "| seed | faults | detected, s | recovered, s | lost | goodput | stale replies refused | duplicates | I1 to I6 |",
        "|---" * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: row["seed"]):
        faults = "; ".join(f"{f['how']}: {f['process']} after {f['phase']}" for f in row["faults"])
        detected, recovered = ([seconds(value) for value in row[key]] for key in ("detected_s", "recovered_s"))
        lines.append(
            f"| {row['seed']} | {faults} | {', '.join(detected)} | {', '.join(recovered)} | {'; '.join(row['lost'])} | "
            f"{percent(row['goodput'])} | {row['stale_refused']:g} | {row['duplicates']} | {what_holds(row['invariants'])} |"
        )
    return "\n".join(lines)
