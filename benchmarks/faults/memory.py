"""A process that gets no more memory, and an object store without room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.faults.bench import ONE, Bench, again, shm
from benchmarks.faults.inject import starve
from benchmarks.faults.invariants import Held
from benchmarks.faults.nodes import STORE_BYTES
from benchmarks.faults.play import Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Trigger, after

CELLS = ("F33", "F34", "F35", "F36", "F37", "F38")
STORE_MIB = 400
SPARE_MIB = -1
"""Less than it has: it keeps that, and whatever it asks for is refused."""


@dataclass(frozen=True)
class Starved:
    """A process that gets no more memory.

    Args:
        cell: of the matrix.
        process: by name; the driver is ``driver``.
        when: waits until it is time.
        says: what the run's last words must hold.
    """

    cell: str
    process: str
    when: Trigger
    says: str


STARVED: Sequence[Starved] = (
    Starved("F35", "reward-0", after("sample_meta"), "reward-0"),
    Starved("F34", "scorer-0", after("sample"), "scorer-0"),
    Starved("F36", "learner-0", after("score"), "learner-0"),
    Starved("F33", "rollout-0", after("sync"), "rollout-0"),
    Starved("F37", "driver", after("score"), "[Mm]emory"),
)


def memory(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Starve one process after another; each time the run must survive, or end by name and go on with the same command.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before, name = bench.baseline("baseline-one", *ONE), shm(), bench.fresh("memory")
    found: list[Outcome] = []
    for each in STARVED:
        if each.cell in wanted:
            with bench.run(name, *ONE) as run:
                found.append(starved(run, each))
            if run.process.returncode == 0:  # it survived to its end: the next one is done to another run
                _told(bench, found, bench.held(run, baseline, [], before, *ONE))
                name = bench.fresh(f"memory-{each.cell.lower()}")
    with bench.run(name, *ONE) as run:
        if "F38" in wanted:
            run.until_waited("sync", 0, None)
            bench.observer.ask("fill", STORE_MIB)
            note = f"{STORE_MIB} MiB put beside the run into stores of {STORE_BYTES >> 20} MiB"
            found.append(Outcome("F38", None, None, None, "nothing", note))
        if run.end():
            raise Late(f"the run did not come to its end:\n{run.output()[-3000:]}")
    bench.observer.ask("release")
    _told(bench, found, bench.held(run, baseline, [], before, *ONE))


def _told(bench: Bench, found: list[Outcome], held: Held) -> None:
    for outcome in found:
        bench.record.outcome(outcome, held)
    found.clear()


def starved(run: Run, each: Starved) -> Outcome:
    """Give a process no more memory, and wait for what comes of it.

    Args:
        run: that it belongs to.
        each: the fault.
    """
    each.when(run)
    victim = psutil.Process(run.process.pid) if each.process == "driver" else run.role(each.process)
    starve(victim, SPARE_MIB)
    at = time.time()
    code = run.end()
    told = run.when(each.says, at)
    if told is None and code:
        raise Late(f"{each.cell}: code {code}, and nothing like {each.says!r}:\n{run.output()[-3000:]}")
    what = f"ended with code {code}; the same command went on" if code else "the run went on to its end"
    return Outcome(each.cell, None if told is None else told - at, None, None, again(run), what)
