"""Processes that stand still or crawl: past a deadline they are ended, and others take their place."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.bench import Bench, shm
from benchmarks.faults.inject import freeze, slowed, thaw
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import DRIVER, Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Strike, Struck, after, finish, strike_all

CELLS = ("F17", "F18", "F19", "F20", "F21", "F23", "F24")
STRIKES: Sequence[Strike] = (
    Strike("F19", "reward-0", after("sample_meta", 0.1)),
    Strike("F18", "scorer-0", after("reward")),
    Strike("F17", "rollout-1", after("sync", 0.02), hold="scorer-0"),
    Strike("F20", "learner-0", after("score")),
)
DEADLINE_S, SLACK, LONGEST_S = 25.0, 1.2, 100.0
"""At least; how much longer than it took until the first role of the undisturbed run was up, since that is a call too; and at
most half of what is tried."""
STANDS_S, TIMES = 10.0, 10


def hangs(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Stop one process after another, let the stopped ones go on when they have successors, and slow others down.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before = bench.baseline(), shm()
    others: list[tuple[Outcome, Held]] = []
    with started(bench, deadline_s(baseline)) as (run, short):
        struck, wrong = stand(run, [each for each in STRIKES if each.cell in wanted])
        if not wrong and run.process.poll() is None:
            for cell, process in (("F23", "rollout-0"), ("F24", "scorer-0")):
                if cell in wanted:
                    others.append((crawl(run, cell, process, usual_step(baseline)), Held({})))
            if "F21" in wanted:
                others.append(stand_still(bench, run, *short))
        held = finish(bench, run, baseline, before, struck, wrong, *short)
        for outcome, own in others:
            bench.record.outcome(outcome, held.also(own.wrong))


@contextlib.contextmanager
def started(bench: Bench, seconds: float) -> Iterator[tuple[Run, Sequence[str]]]:
    """A run whose roles are up, with the shortest deadline that their start kept, and what it was given besides.

    Args:
        bench: where.
        seconds: deadline to try first; if the start takes longer than that, twice as much.
    """
    while True:
        short = ("--resources.deadline_s", f"{seconds:.0f}")
        with bench.run(bench.fresh("hangs"), *short) as run:
            try:
                run.until_waited("start_roles", None)
            except Late:
                if run.when("no progress for") is None or seconds > LONGEST_S:
                    raise
                print(f"     the roles do not start within {seconds:.0f} s", flush=True)
            else:
                yield run, short
                return
        seconds *= 2


def deadline_s(baseline: Path) -> float:
    """The shortest ``resources.deadline_s`` that the undisturbed run's start of roles would have kept, s."""
    spans = [json.loads(line) for line in (baseline / "timeline.jsonl").read_text().splitlines()]
    first = next(span for span in spans if span["what"] == "start_roles" and span["who"] != DRIVER)
    return max(DEADLINE_S, SLACK * (first["end"] - first["start"]))


def stand(run: Run, strikes: Sequence[Strike]) -> tuple[list[Struck], list[str]]:
    """Stop one process after another; one that was not ended for it is let go on once it has a successor.

    Args:
        run: that they belong to.
        strikes: in order.

    Returns:
        As ``strike_all``.
    """
    struck = list[Struck]()
    for each in strikes:
        stopped: list[psutil.Process] = []

        def act(process: psutil.Process, stopped: list[psutil.Process] = stopped) -> float:
            stopped.append(process)
            return freeze(process)

        seen, wrong = strike_all(run, [replace(each, act=act)])
        struck += seen
        for process in stopped:
            thaw(process)
        if wrong or not seen:
            return struck, wrong
    return struck, []


def crawl(run: Run, cell: str, process: str, usual: float) -> Outcome:
    """Give a process a tenth of its time for two steps; how much longer the slower one takes.

    Args:
        run: that it belongs to.
        cell: of the matrix.
        process: by name.
        usual: what a step takes, s.
    """
    after("sync")(run)
    since = time.time()
    with slowed(run.role(process), TIMES):
        after("sync")(run)
        after("sync")(run)
    slow = max(gaps([span for span in run.spans() if span["end"] > since]), default=usual)
    return Outcome(cell, None, None, None, "nothing", f"a step took {slow / usual:.1f} times as long", {"times": slow / usual})


def usual_step(baseline: Path) -> float:
    """What a step of the undisturbed run takes, s."""
    spans = [json.loads(line) for line in (baseline / "timeline.jsonl").read_text().splitlines()]
    return statistics.median(gaps(spans))


def gaps(spans: Sequence[Mapping[str, Any]]) -> list[float]:
    """From the end of one step's sync to the end of the next, within a round, s."""
    ends = [(s["round"], s["end"]) for s in spans if (s["what"], s["who"]) == ("sync", DRIVER) and s["step"] is not None]
    return [later - earlier for (index, earlier), (next_, later) in pairwise(ends) if index == next_]


def stand_still(bench: Bench, run: Run, *overrides: str) -> tuple[Outcome, Held]:
    """Stop the driver for a while; another one must not take its place."""
    freeze_at = time.time()
    run.process.send_signal(signal.SIGSTOP)
    with bench.run(run.name, *overrides) as other:
        code = other.end(300)
        refused = other.when("another driver is running")
    time.sleep(max(0.0, STANDS_S - (time.time() - freeze_at)))
    run.process.send_signal(signal.SIGCONT)
    went_on = time.time()
    run.until(lambda: any(span["end"] > went_on for span in run.spans()) or run.process.poll() == 0, 60, "goes on")
    wrong = () if code == 2 and refused is not None else (f"the second driver: code {code}",)
    took = time.time() - went_on
    return Outcome("F21", None, took, None, "nothing", "a second driver was refused meanwhile"), Held({"I6": wrong})
