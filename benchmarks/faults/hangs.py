"""Processes that stand still or crawl: past a deadline others take their place, and what they say afterwards is refused."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.faults.bench import Bench, shm
from benchmarks.faults.inject import freeze, slowed, thaw
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import DRIVER, Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Strike, after, outcomes, strike, tell, write_events

CELLS = ("F17", "F18", "F19", "F20", "F21", "F23", "F24")
STRIKES: Sequence[Strike] = (
    Strike("F19", "reward-0", after("sample_meta", 0.1), freeze),
    Strike("F18", "scorer-0", after("reward"), freeze),
    Strike("F17", "rollout-1", after("sync", 0.02), freeze),
    Strike("F20", "learner-0", after("score"), freeze),
)
SHORT = ("--resources.deadline_s", "30")
"""Longer than the roles take to start: that counts as one call."""
STANDS_S, TIMES = 10.0, 10


def hangs(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Stop one process after another, let the stopped ones go on when they have successors, and slow others down.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before, name = bench.baseline(), shm(), bench.fresh("hangs")
    others: list[tuple[Outcome, Held]] = []
    with bench.run(name, *SHORT) as run:
        struck = []
        for each in STRIKES:
            if each.cell in wanted:
                each.when(run)
                stopped = run.role(each.process)
                struck.append(strike(run, Strike(each.cell, each.process, lambda run: None, each.act)))
                if stopped.is_running():
                    thaw(stopped)
                tell(struck[-1])
        for cell, process in (("F23", "rollout-0"), ("F24", "scorer-0")):
            if cell in wanted:
                others.append((crawl(run, cell, process), Held({})))
        if "F21" in wanted:
            others.append(stand_still(bench, run))
        if run.end():
            raise Late(f"the run did not survive:\n{run.output()[-3000:]}")
        write_events(bench, name, struck)
        named = [each.process for each in STRIKES if each.cell in wanted]
        held = bench.held(run, baseline, named, before, *SHORT)
        for outcome in outcomes(run, struck):
            bench.record.outcome(outcome, held)
        for outcome, own in others:
            bench.record.outcome(outcome, held.also(own.wrong))


def crawl(run: Run, cell: str, process: str) -> Outcome:
    """Give a process a tenth of its time for one step; how much longer that takes."""
    after("sync")(run)
    usual = statistics.median(steps(run))
    with slowed(run.role(process), TIMES):
        after("sync")(run)
    slow = steps(run)[-1]
    return Outcome(cell, None, None, None, "nothing", f"its step took {slow / usual:.1f} times as long", {"times": slow / usual})


def steps(run: Run) -> list[float]:
    """How long the steps took so far, s: from the end of one sync to the end of the next."""
    ends = [span["end"] for span in run.spans() if (span["what"], span["who"]) == ("sync", DRIVER) and span["step"] is not None]
    return [later - earlier for earlier, later in pairwise(ends)]


def stand_still(bench: Bench, run: Run) -> tuple[Outcome, Held]:
    """Stop the driver for a while; another one must not take its place."""
    freeze_at = time.time()
    run.process.send_signal(signal.SIGSTOP)
    with bench.run(run.name, *SHORT) as other:
        code = other.end(300)
        refused = other.when("another driver is running")
    time.sleep(max(0.0, STANDS_S - (time.time() - freeze_at)))
    run.process.send_signal(signal.SIGCONT)
    went_on = time.time()
    run.until(lambda: any(span["end"] > went_on for span in run.spans()) or run.process.poll() == 0, 60, "goes on")
    wrong = () if code == 2 and refused is not None else (f"the second driver: code {code}",)
    took = time.time() - went_on
    return Outcome("F21", None, took, None, "nothing", "a second driver was refused meanwhile"), Held({"I6": wrong})
