"""Nodes that are lost, stopped, drained, or come; and a cluster with no room left."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import psutil

from benchmarks.faults.bench import Bench, Watch, again, said, shm
from benchmarks.faults.nodes import Node
from benchmarks.faults.play import Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Act, Strike, after, finish, strike_all

CELLS = ("F6", "F12", "F22", "F51", "F52", "F53")
ENGINES, TRAINERS = "engines", "trainers"
POOLS = {ENGINES: 1, f"{ENGINES}/spare": 1, TRAINERS: 1, f"{TRAINERS}/spare": 1}
"""CPUs of the nodes; every one has a spare of its kind. Two engines fill one."""
APART = (
    "--resources.rollout.num_cpus", "0.5",
    "--resources.rollout.labels.pool", ENGINES,
    "--resources.reward.labels.pool", TRAINERS,
    "--resources.scorer.labels.pool", TRAINERS,
    "--resources.learner.labels.pool", TRAINERS,
)  # fmt: skip
LONG = ("--rounds.num_rounds", "1", "--policy.steps_per_round", "120", "--rollout.max_engines", "3")
GROWN_S, USED_S = 300.0, 5.0
WAIT_S = 8.0


def node_of(bench: Bench, run: Run, process: str) -> Node:
    """The node that a process of the run is on."""
    pid = run.role(process).pid
    return next(node for node in bench.nodes.alive() if pid in {member.pid for member in node.family()})


def machines(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Lose nodes under one run, grow another's cluster and drain it, and at last leave a third without room.

    Args:
        bench: where, with ``POOLS``.
        wanted: cells to play.
    """
    if {"F6", "F12", "F22"} & set(wanted):
        losses(bench, wanted)
    if {"F51", "F52"} & set(wanted):
        growth(bench)
    if "F53" in wanted:
        no_room(bench)


def losses(bench: Bench, wanted: Sequence[str]) -> None:
    """Nodes with engines, with the trainers, and one whose raylet stands still."""
    baseline, before, name = bench.baseline(), shm(), bench.fresh("nodes")
    with bench.run(name, *APART) as run:

        def lose(process: str, how: str) -> Act:
            def act(victim: psutil.Process) -> float:
                node = node_of(bench, run, process)
                at = time.time()
                if how == "stop":
                    hold_until_lost(run, process)
                    node.raylet().suspend()
                else:
                    node.kill()
                    bench.nodes.add(node.labels["pool"], POOLS[node.labels["pool"]], wait=False)
                return at

            return act

        def with_a_spare(run: Run) -> None:
            bench.nodes.settle()
            after("score")(run)

        mine = [
            Strike("F6", "rollout-0", with_a_spare, lose("rollout-0", "kill")),
            Strike("F12", "learner-0", with_a_spare, lose("learner-0", "kill")),
            Strike("F22", "rollout-0", with_a_spare, lose("rollout-0", "stop")),
        ]
        struck, wrong = strike_all(run, [each for each in mine if each.cell in wanted])
        run.end(300)
        for node in bench.nodes.alive():
            for member in node.family():
                if member.status() == "stopped":
                    member.resume()
        finish(bench, run, baseline, before, struck, wrong, *APART)


def hold_until_lost(run: Run, process: str) -> None:
    """Let the learner stand still until a process is said to be lost, or the small run would be over before.

    Args:
        run: that they belong to.
        process: by name.
    """
    at, learner = time.time(), run.role("learner-0")
    learner.suspend()

    def resume() -> None:
        until = time.monotonic() + 60
        while run.when(said("lost", process), at) is None and time.monotonic() < until:
            time.sleep(0.02)
        learner.resume()

    threading.Thread(target=resume, daemon=True).start()


def growth(bench: Bench) -> None:
    """A node comes in the middle of a round, an engine on it takes part, and the node is drained."""
    before, name = shm(), bench.fresh("grows")
    for spare in [node for node in bench.nodes.alive() if node.labels["pool"] == ENGINES][1:]:
        spare.kill()
    with bench.run(name, *APART, *LONG) as run:
        run.until_waited("sync", 0, 1)
        at = time.time()
        node = bench.nodes.add(ENGINES, 1)
        joined = until_event(run, "joined", at)
        run.until(lambda: work_since(run, "rollout-2", joined) is not None, GROWN_S, "an engine on the new node samples")
        used, where = work_since(run, "rollout-2", joined), node_of(bench, run, "rollout-2")
        drained = time.time()
        bench.observer.ask("drain", node.node_id(), 60.0)
        noticed = until_event(run, "draining", drained)
        if run.end():
            raise Late(f"the run did not survive the drain:\n{run.output()[-3000:]}")
        batches = [row for row in run.metrics.read() if row["phase"] == "pool" and "event" not in row]
        twice = sum(int(row["pool/redone"]) for row in batches)
        held = bench.held(run, None, ["rollout-2.*joined", "rollout-2.*no new work"], before, *APART, *LONG)
    assert used is not None
    elsewhere = [] if where is node else ["its engine is on another node"]
    late = () if used - joined <= USED_S else (f"used {used - joined:.1f} s after it joined",)
    note = f"its engine had joined {joined - at:.1f} s after the node was asked for, and sampled {used - joined:.1f} s later"
    bench.record.outcome(Outcome("F51", None, used - at, None, "nothing", note), held.also({"I5": late, "I1": elsewhere}))
    parts = "nothing" if not twice else f"{twice} pieces"
    wrong = [f"{twice} pieces redone"] if twice else []
    bench.record.outcome(Outcome("F52", noticed - drained, None, None, parts), held.also({"I1": wrong}))


def until_event(run: Run, kind: str, since: float) -> float:
    """Wait for a row of the pool on an engine; its time.

    Args:
        run: with an elastic pool.
        kind: of the event, such as ``joined``.
        since: Unix time, s; earlier ones do not count.
    """

    def times() -> list[float]:
        return [row["time"] for row in run.metrics.read() if "event" in row and row["event"] == kind and row["time"] > since]

    run.until(lambda: bool(times()), GROWN_S, f"an engine has {kind}")
    return times()[0]


def work_since(run: Run, process: str, since: float) -> float | None:
    """When a process has first done something after a time; None if it has not."""
    ends = [
        float(span["end"]) for span in run.spans() if (span["who"], span["what"]) == (process, "sample") and span["end"] > since
    ]
    return ends[0] if ends else None


def no_room(bench: Bench) -> None:
    """The nodes with trainers are lost and nothing replaces them: the run must end by its own limit, and go on later."""
    before, name = shm(), bench.fresh("no-room")
    with bench.run(name, *APART, "--faults.restart_s", str(WAIT_S)) as run:
        run.until_waited("sync", 0, 0)
        at = time.time()
        for node in bench.nodes.alive():
            if node.labels["pool"] == TRAINERS:
                node.kill()
        watch = Watch(run, "learner-0", at)
        detected = watch.detected()
        code = run.end()
        took = time.time() - at
        named = run.when(r"faults\.restart_s", at) is not None
    bench.nodes.add(TRAINERS, POOLS[TRAINERS])
    with bench.run(name, *APART) as run:
        if run.end():
            raise Late(f"the run did not go on when there was room:\n{run.output()[-3000:]}")
        held = bench.held(run, bench.baseline(), [], before, *APART)
        twice = again(run)
    wrong = () if code and named else (f"code {code}, faults.restart_s not named",)
    late = () if took < detected + WAIT_S + 15 else (f"ended after {took:.0f} s",)
    note = f"ended with code {code} after {took:.1f} s (limit {WAIT_S:g} s); the same command went on when there was room"
    bench.record.outcome(Outcome("F53", detected, None, None, twice, note), held.also({"I5": late, "I6": wrong}))
