"""Faults done to the processes of a run that goes on: when, to whom, how, and how it is timed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.bench import Bench, Watch, in_words
from benchmarks.faults.inject import kill, kill_frozen
from benchmarks.faults.play import DRIVER, Run
from benchmarks.faults.record import Outcome, seconds

Trigger = Callable[[Run], object]
Act = Callable[[psutil.Process], float]


@dataclass(frozen=True)
class Strike:
    """One fault.

    Args:
        cell: of the matrix.
        process: by name, e.g. ``learner-0``.
        when: waits until it is time.
        act: what is done to the process; says when.
        hold: a process that stands still from the end of the step under way until the lost one is back, or the small run would
            be over before; None where the run waits by itself.
    """

    cell: str
    process: str
    when: Trigger
    act: Act = kill
    hold: str | None = None


@dataclass(frozen=True)
class Struck:
    """What was seen of it.

    Args:
        strike: the fault.
        at: when it was done, Unix time, s.
        detected_s: until the run said that the process is lost.
        recovered_s: from then until it said that it is back; None if the run ended before that.
        where: phase, round and step that were under way.
        served: pieces of work that processes of the same role did between the two.
    """

    strike: Strike
    at: float
    detected_s: float
    recovered_s: float | None
    where: str
    served: int = 0


def after(phase: str, delay_s: float = 0.0) -> Trigger:
    """When the driver's next wait for a phase is over: what follows it has just begun.

    Args:
        phase: as in the timeline.
        delay_s: to wait then.
    """

    def wait(run: Run) -> None:
        since = time.time()

        def over() -> bool:
            return any((span["what"], span["who"]) == (phase, DRIVER) and span["end"] > since for span in run.spans()[-40:])

        run.until(over, 600, f"the next {phase}")
        time.sleep(delay_s)

    return wait


def writing(pattern: str) -> Trigger:
    """When a file that is being written appears in the draft of the round under way; without a pause between two looks.

    Args:
        pattern: of the file, in the draft.
    """

    def wait(run: Run) -> None:
        rounds, deadline = run.path / "rounds", time.monotonic() + 300
        while not there(rounds, f".round_*.partial/{pattern}"):
            if run.process.poll() is not None or time.monotonic() > deadline:
                run.until(lambda: False, 0, f"{pattern} is written")

    return wait


def there(folder: Path, pattern: str) -> bool:
    """Whether a file is there; directories may come and go meanwhile."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


def strike(run: Run, each: Strike) -> Struck:
    """Wait for the moment, do it, and wait until the process has come back.

    Args:
        run: that it is done to.
        each: the fault.
    """
    each.when(run)
    process = run.role(each.process)
    at = each.act(process)
    driver = [span for span in run.spans() if span["who"] == DRIVER]
    where = f"after {driver[-1]['what']} of round {driver[-1]['round']}, step {driver[-1]['step']}" if driver else "at the start"
    watch = Watch(run, each.process, at)
    detected = watch.detected()
    with held(run, each.hold):
        recovered = watch.recovered()
    until = at + detected + (recovered or 0.0)
    role = each.process.partition("-")[0]
    served = [s for s in run.spans() if s["who"].startswith(role) and s["who"] != each.process and at < s["end"] < until]
    return Struck(each, at, detected, recovered, where, len(served))


@contextlib.contextmanager
def held(run: Run, process: str | None) -> Iterator[None]:
    """Let a process stand still from the end of the next step on.

    Args:
        run: that it belongs to.
        process: by name; None = none.
    """
    if process is None:
        yield
        return
    after("sync")(run)
    waiting = run.role(process)
    waiting.suspend()
    try:
        yield
    finally:
        waiting.resume()


def tell(each: Struck) -> None:
    """A line for whoever watches."""
    strike = each.strike
    words = f"lost after {each.detected_s:.1f} s, back after {seconds(each.recovered_s)} s"
    print(f"     {strike.cell} {strike.process} {each.where}: {words}", flush=True)


def outcomes(run: Run, struck: Sequence[Struck]) -> list[Outcome]:
    """What came of all faults of a run, with what its own rows say of the successors' start.

    Args:
        run: that has ended.
        struck: the faults, in order.
    """
    found = []
    for each, until in zip(struck, [*(later.at for later in struck[1:]), float("inf")], strict=True):
        figures = {key: float(value) for row in told(run, each) for key, value in row.items() if key.startswith("faults/")}
        cold = figures["faults/start_seconds"] if "faults/start_seconds" in figures else None
        figures["served"] = float(each.served)
        back = figures["faults/recovery_seconds"] if cold is not None else each.recovered_s
        found.append(Outcome(each.strike.cell, each.detected_s, back, cold, redone(run, each, until), each.where, figures))
    return found


def told(run: Run, each: Struck) -> list[dict[str, Any]]:
    """The run's own rows on a fault: that the process is lost, and that it is back."""
    rows = [row for row in run.metrics.read() if row["phase"] == "faults" and row["time"] >= each.at - 0.001]
    mine = [row for row in rows if row["process"] == each.strike.process]
    return [
        next(row for row in mine if row["event"] == event) for event in ("lost", "back") if any(r["event"] == event for r in mine)
    ]


def redone(run: Run, each: Struck, until: float = float("inf")) -> str:
    """Work that was over before a fault and was done again after it.

    Args:
        run: that it was done to.
        each: the fault.
        until: of the next one, Unix time, s: what is done again after that is its doing.
    """
    before, later = set[tuple[Any, ...]](), list[tuple[str, int | None]]()
    for span in run.spans():
        place = (span["what"], span["round"], span["step"])
        if span["who"] == DRIVER or span["round"] is None:
            continue
        if span["end"] <= each.at:
            before.add(place)
        elif place in before and span["start"] >= each.at and span["end"] < until:
            later.append((span["what"], span["step"]))
    return in_words(later)


def write_events(bench: Bench, name: str, struck: Sequence[Struck]) -> None:
    """The times of a run's faults, for the picture."""
    events = [{"cell": s.strike.cell, "process": s.strike.process, "at": s.at, "detected_s": s.detected_s,
               "recovered_s": s.recovered_s} for s in struck]  # fmt: skip
    (bench.storage / "runs" / name / "faults.json").write_text(json.dumps(events))


__all__ = ["Strike", "Struck", "after", "kill", "kill_frozen", "outcomes", "redone", "strike", "tell", "writing"]
