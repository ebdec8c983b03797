"""Numbers that go wrong in a role's process, by a hook on its modules that the bench's nodes have on their path (``poison``)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.bench import Bench, shm
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import DRIVER, Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Trigger

CELLS = ("F28", "F29", "F30", "F31", "F32")
POISON = Path(__file__).parent / "poison"


def variables(orders: Path) -> Mapping[str, str]:
    """Environment of the nodes on which numbers can be made to go wrong.

    Args:
        orders: directory of the orders.
    """
    return {"PYTHONPATH": str(POISON), "RONDO_FAULT_ORDERS": str(orders)}


@dataclass(frozen=True)
class Wrong:
    """One number that goes wrong.

    Args:
        cell: of the matrix.
        process: by name.
        order: a word that ``poison`` knows.
        when: waits until it is time.
        says: what the run must say.
    """

    cell: str
    process: str
    order: str
    when: Trigger
    says: str


def learned(run: Run) -> None:
    """When a step was learned: what comes next is sampled and scored for the step after it, and nothing is put back meanwhile."""
    since = time.time()

    def over() -> bool:
        ends = [
            span["end"]
            for span in run.spans()[-40:]
            if (span["what"], span["who"]) == ("sync", DRIVER) and span["step"] is not None
        ]
        return bool(ends) and ends[-1] > since

    run.until(over, 600, "the end of the next step")


OUT = r"step \d+ is (left out|undone)"
WRONG: Sequence[Wrong] = (
    Wrong("F30", "learner-0", "nan", learned, OUT),
    Wrong("F31", "learner-0", "inf", learned, OUT),
    Wrong("F29", "scorer-0", "nan", learned, OUT),
    Wrong("F28", "rollout-0", "nan", learned, f"given the weights again|{OUT}"),
    Wrong("F32", "learner-0", "blow_up", learned, OUT),
)
"""Each order is given before the step that it spoils begins."""


def numbers(bench: Bench, orders: Path, wanted: Sequence[str] = CELLS) -> None:
    """Let one number after another go wrong in one run, which must name each and go on, or end by name and go on then.

    Args:
        bench: where; its nodes have ``variables``.
        orders: directory of the orders.
        wanted: cells to play.
    """
    before, name = shm(), bench.fresh("numbers")
    waiting = [each for each in WRONG if each.cell in wanted]
    found: list[tuple[Outcome, list[str]]] = []
    for _ in range(len(waiting) + 1):
        with bench.run(name) as run:
            while waiting and run.process.poll() is None:
                each = waiting.pop(0)
                try:
                    found.append((go_wrong(run, each, orders), []))
                except Late as late:
                    found.append((Outcome(each.cell, None, None, None, "nothing"), [str(late)[-600:]]))
            code = run.end(300)
        if code == 0:
            break
    held = bench.held(run, None, [], before) if code == 0 else Held({"I5": (f"code {code}: {run.output()[-600:]}",)})
    for outcome, wrong in found:
        bench.record.outcome(outcome, held.also({"I6": wrong}))


def go_wrong(run: Run, each: Wrong, orders: Path) -> Outcome:
    """Give the order, and wait until the run names what came of it.

    Args:
        run: that it is done to.
        each: the fault.
        orders: directory of the orders.
    """
    each.when(run)
    taken = orders / f"{each.process}.taken"
    taken.unlink(missing_ok=True)
    (orders / each.process).write_text(each.order)
    run.until(taken.exists, 120, f"{each.process} takes the order {each.order!r}")
    at = taken.stat().st_ctime
    told = run.until_said(each.says, at, 60)
    line = next(line.text for line in run.said if line.at == told)
    run.until(lambda: run.process.poll() is not None or any(span["end"] > told for span in run.spans()), 600, "goes on or ends")
    back = None if run.process.poll() is not None else time.time() - told
    return Outcome(each.cell, told - at, back, None, "its step" if back is not None else "the run ended", line.strip()[:300])
