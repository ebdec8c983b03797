"""A process that gets no more memory, and an object store without room."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.faults.bench import ONE, Bench, Watch, again, said, shm
from benchmarks.faults.inject import Crammed, starve
from benchmarks.faults.invariants import Held
from benchmarks.faults.nodes import STORE_BYTES
from benchmarks.faults.play import Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Trigger, after

CELLS = ("F33", "F34", "F35", "F36", "F37", "F38")
STORE_MIB = 400
SPARE_MIB, SPARE_KIB, HEARD_S = -1, 512, 6.0
"""Less than it has: it keeps that, and whatever it asks for is refused. Of a group that kills: what a process gets beside what it
has."""


@dataclass(frozen=True)
class Starved:
    """A process that gets no more memory.

    Args:
        cell: of the matrix.
        process: by name; the driver is ``driver``.
        when: waits until it is time.
        says: what the run must say.
        killed: whether the kernel kills it at its limit; else what it asks for is refused, and it hears of that.
    """

    cell: str
    process: str
    when: Trigger
    says: str
    killed: bool


KILLED = "(?!)"
"""Of the driver, which is killed, and can say nothing: what is looked for is its end."""
STARVED: Sequence[Starved] = (
    Starved("F35", "reward-0", after("sample_meta"), "(lost|failed).*reward-0|reward-0.*failed", killed=False),
    Starved("F34", "scorer-0", after("sample"), "(lost|failed).*scorer-0|scorer-0.*failed", killed=True),
    Starved("F36", "learner-0", after("score"), "(lost|failed).*learner-0|learner-0.*failed", killed=True),
    Starved("F33", "rollout-0", after("sync"), "(lost|failed).*rollout-0|rollout-0.*failed", killed=True),
    Starved("F37", "driver", after("score"), KILLED, killed=True),
)


def memory(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Fill the object store beside a run, then starve one process after another: the run must survive each, or end by name and go
    on with the same command.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before, name = bench.baseline("baseline-one", *ONE), shm(), bench.fresh("memory")
    found: list[Outcome] = []
    waiting, held = [each for each in STARVED if each.cell in wanted], Held({})
    for start in range(2 * len(waiting) + 2):
        with bench.run(name, *ONE) as run:
            if start == 0 and "F38" in wanted:
                run.until_said("Round 1 of")
                bench.observer.ask("fill", "all", STORE_MIB)
                spilled = bench.observer.ask("spilled")
                note = f"{STORE_MIB} MiB put into its node's store of {STORE_BYTES >> 20} MiB: {spilled:g} MiB spilled"
                found.append(Outcome("F38", None, None, None, "nothing", note, {"spilled_mib": spilled}))
            while waiting and run.process.poll() is None:
                try:
                    found.append(starved(run, waiting[0]))
                except Late as late:
                    if run.process.poll() is None:
                        raise
                    print(f"     {waiting[0].cell}: {str(late).splitlines()[0]}", flush=True)
                    break  # it was over before this one's moment
                waiting.pop(0)
            if run.end() == 0:
                bench.observer.ask("release")
                held = held.also(bench.held(run, baseline, [], before, *ONE).wrong)
                if not waiting:
                    break
                bench.fresh(name)
    if waiting:
        held = held.also({"I5": [f"{each.cell} was never played" for each in waiting]})
    for outcome in found:
        full = outcome.cell == "F38" and outcome.figures["spilled_mib"] > 0
        wrong = [] if outcome.detected_s is not None or full else ["it had no effect that the run speaks of"]
        bench.record.outcome(outcome, held.also({"I6": wrong}))


def starved(run: Run, each: Starved) -> Outcome:
    """Give a process no more memory, and wait for what comes of it.

    Args:
        run: that it belongs to.
        each: the fault.
    """
    each.when(run)
    victim = psutil.Process(run.process.pid) if each.process == "driver" else run.role(each.process)
    group = Crammed(victim, SPARE_KIB) if each.killed else None
    if group is None:
        starve(victim, SPARE_MIB)
    at, deadline = time.time(), time.monotonic() + HEARD_S
    while run.when(each.says, at) is None and run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.listener.join(1)
    told = run.when(each.says, at)
    if group is not None:
        group.end()
    if told is None and run.process.poll() == -signal.SIGKILL:
        what = "the kernel killed it at its limit; the same command went on"
        return Outcome(each.cell, time.time() - at, None, None, "what was under way", what)
    if told is None:
        return Outcome(each.cell, None, None, None, "nothing", f"it worked on with what it had for {HEARD_S:g} s")
    line = next(line.text for line in run.said if line.at == told)
    back = Watch(run, each.process, at).recovered() if run.when(said("lost", each.process), at) else None
    what = "the run ended; the same command went on" if run.process.poll() else "the run went on"
    return Outcome(each.cell, told - at, back, None, again(run), f"{what}: {line.strip()[:160]}")
