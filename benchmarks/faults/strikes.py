"""Faults done to the processes of a run that goes on: when, to whom, how, and how it is timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.bench import Bench, Watch, in_words, is_work, said
from benchmarks.faults.inject import kill
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import DRIVER, Late, Run
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
        still: file in the draft that must still be being written once the process stands still, or it is let go and tried again.
        hold: a process that stands still from the end of the step under way until the lost one is back, or the small run would
            be over before; None where the run waits by itself.
    """

    cell: str
    process: str
    when: Trigger
    act: Act = kill
    still: str | None = None
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
    if each.still is not None:
        process.suspend()
        while not there(run.path / "rounds", f".round_*.partial/{each.still}"):  # it was written to its end meanwhile
            process.resume()
            each.when(run)
            process.suspend()
    at = each.act(process)
    driver = [span for span in run.spans() if span["who"] == DRIVER]
    where = f"after {moment(driver[-1])}" if driver else "at the start"
    watch = Watch(run, each.process, at)
    detected = watch.detected()
    with held(run, each.hold):
        recovered = watch.recovered()
    until = at + detected + (recovered or 0.0)
    role = each.process.partition("-")[0]
    served = [s for s in run.spans() if s["who"].startswith(role) and s["who"] != each.process and at < s["end"] < until]
    return Struck(each, at, detected, recovered, where, len(served))


def moment(span: Mapping[str, Any]) -> str:
    """A phase of a round, in words."""
    step = "" if span["step"] is None else f", step {span['step']}"
    return f"{span['what']} of round {span['round']}{step}"


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


def strike_all(run: Run, strikes: Sequence[Strike]) -> tuple[list[Struck], list[str]]:
    """Do one fault after another until the run has ended.

    Args:
        run: that they are done to.
        strikes: in order.

    Returns:
        What was seen of those that were done, and what went wrong: that the run did not survive one, or did something too late.
    """
    struck = list[Struck]()
    for each in strikes:
        try:
            struck.append(strike(run, each))
        except Late as late:
            if run.process.poll() == 0:  # it was over before this one's moment
                return struck, []
            return struck, [f"{each.cell}: {str(late)[-1500:]}"]
        tell(struck[-1])
    return struck, []


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
    for each, again in zip(struck, redone(run.spans(), struck), strict=True):
        figures = {key: float(value) for row in told(run, each) for key, value in row.items() if key.startswith("faults/")}
        cold = figures["faults/start_seconds"] if "faults/start_seconds" in figures else None
        figures |= {"served": float(each.served), "start_of_all_roles_s": run.start_seconds()}
        found.append(Outcome(each.strike.cell, each.detected_s, each.recovered_s, cold, again, each.where, figures))
    return found


def told(run: Run, each: Struck) -> list[dict[str, Any]]:
    """The run's own rows on a fault: that the process is lost, and that it is back."""
    rows = [row for row in run.metrics.read() if row["phase"] == "faults" and row["time"] >= each.at - 0.001]
    mine = [row for row in rows if row["process"] == each.strike.process]
    return [
        next(row for row in mine if row["event"] == event) for event in ("lost", "back") if any(r["event"] == event for r in mine)
    ]


def redone(spans: Sequence[Mapping[str, Any]], struck: Sequence[Struck]) -> list[str]:
    """Work that was over before a fault and was done again after it, by fault.

    Where several faults lie between the two, it is the doing of the learner's: only its loss takes a round back.

    Args:
        spans: of the run's timeline.
        struck: the faults, in order.
    """
    over, again = dict[tuple[Any, ...], float](), [list[tuple[str, int | None]]() for _ in struck]
    for span in sorted(filter(is_work, spans), key=lambda span: float(span["start"])):
        place = (span["who"].partition("-")[0], span["what"], span["round"], span["step"])
        since = over[place] if place in over else float("inf")
        between = [number for number, each in enumerate(struck) if since <= each.at <= span["start"]]
        blamed = [number for number in between if struck[number].strike.process.startswith("learner")] or between
        if blamed:
            again[blamed[0]].append((span["what"], span["step"]))
        over[place] = min(span["end"], over[place]) if place in over and not between else span["end"]
    return [in_words(places) for places in again]


def finish(
    bench: Bench,
    run: Run,
    baseline: Path | None,
    shared: set[str],
    struck: Sequence[Struck],
    wrong: Sequence[str],
    *overrides: str,
) -> Held:
    """Wait for the end of a run, look at what holds, and write all its faults down.

    Args:
        bench: where.
        run: that they were done to.
        baseline: to compare bits with; None where the fault changes what is learned.
        shared: names in /dev/shm before the run.
        struck: the faults.
        wrong: what went wrong already.
        overrides: of the config.

    Returns:
        What holds.
    """
    code = run.end(300)
    if code or wrong:
        held = Held({"I5": (*wrong, f"the run ended with code {code}: {run.output()[-800:]}")})
    else:
        held = bench.held(run, baseline, [said("lost", each.strike.process) for each in struck], shared, *overrides).also(
            {"I5": ()}
        )
    for outcome in outcomes(run, struck):
        bench.record.outcome(outcome, held)
    if wrong:
        cell = wrong[0].partition(":")[0]
        bench.record.outcome(Outcome(cell, None, None, None, "the run ended"), held)
    return held
