"""Deaths of the driver: one run, killed after one line of its journal after another, and its files damaged while it is down."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.faults.bench import ONE, Bench, again, shm
from benchmarks.faults.inject import flip, swap, truncate
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import Late, Run
from benchmarks.faults.record import Outcome

CELLS = ("F5", "F11", "F15", "F26", "F27", "F42", "F43", "F44", "F45", "F46", "F47", "F54", "F55")
REFUSED, TERMINATED, STOPS_S = 2, 143, 10.0


@dataclass(frozen=True)
class Down:
    """One death of the driver.

    Args:
        index: of the round.
        key: line of the journal after which it dies.
        cells: that this death plays.
        damage: done to the run's directory while nobody runs; given the draft.
        says: what the next driver must say.
        number: the signal.
    """

    index: int
    key: str
    cells: tuple[str, ...] = ("F11",)
    damage: Callable[[Path], None] | None = None
    says: str | None = None
    number: int = signal.SIGKILL


def newest(draft: Path, pattern: str) -> Path:
    """The last file of a draft by name."""
    return sorted(draft.glob(pattern))[-1]


def flip_rollouts(draft: Path) -> None:
    """One bit of the rollouts that were recorded last."""
    flip(newest(draft, "steps/*.parquet"))


def cut_checkpoint(draft: Path) -> None:
    """The second half of the last checkpoint's optimizer moments."""
    truncate(newest(draft, "after_*/learner.safetensors"))


def tear(draft: Path) -> None:
    """Half a line at the end of the journal, as a kill leaves it."""
    with (draft / "journal.jsonl").open("a") as file:
        file.write('{"entry": {"key": "rollou')


def other_reward(draft: Path) -> None:
    """The reward model of the round before in the place of this one's."""
    before = draft.parent / "round_000" / "reward" / "model.safetensors"
    shutil.copyfile(before, draft / "reward" / "model.safetensors")


def other_rollouts(draft: Path) -> None:
    """The recorded rollouts of the last two steps change places."""
    last = sorted(draft.glob("steps/*.parquet"))[-2:]
    swap(last[0], last[1])


NOT_WRITTEN = "is not what was written"
DOWNS: Sequence[Down] = (
    Down(0, "begun"),
    Down(0, "shifted", ("F5", "F11")),
    Down(0, "reward"),
    Down(0, "rollouts 0", ("F11", "F42"), flip_rollouts, NOT_WRITTEN),
    Down(0, "scores 1"),
    Down(0, "step 2", ("F11", "F46"), tear, "cut short"),
    Down(0, "checkpoint 4", ("F11", "F44"), cut_checkpoint, "older state"),
    Down(0, "trained", ("F11",)),
    Down(0, "evaluation.parquet", ("F15", "F11")),
    Down(1, "reward", ("F11", "F26"), other_reward, NOT_WRITTEN),
    Down(1, "rollouts 3", ("F11", "F27"), other_rollouts, NOT_WRITTEN),
    Down(1, "step 4", ("F55",), number=signal.SIGTERM),
    Down(1, "evaluation"),
)
"""In the order of the run; each needs one start."""


@dataclass(frozen=True)
class Refusal:
    """Damage after which the command must end with one sentence.

    Args:
        cell: of the matrix.
        file: in the run's directory.
        damage: done to it.
        says: what the sentence must hold.
    """

    cell: str
    file: str
    damage: Callable[[Path], None]
    says: str


def tear_middle(journal: Path) -> None:
    """One character of the second line is another one."""
    lines = journal.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("a", "b", 1)
    journal.write_text("".join(lines))


REFUSALS: Sequence[Refusal] = (
    Refusal("F46", "rounds/.round_001.partial/journal.jsonl", tear_middle, "damaged"),
    Refusal("F47", "ledger.json", Path.unlink, "not a run directory|ledger"),
    Refusal("F43", "start/members/1/model.safetensors", flip, "start/members/1"),
    Refusal("F45", "rounds/round_000/learner.safetensors", flip, "round_000"),
)
"""Played once the first round is committed and the second one under way."""


@dataclass(frozen=True)
class Taken:
    """How a driver took the run up.

    Args:
        after: what the one before it died of; None for the first.
        went_on_s: from the command until a round went on.
        told_s: from the command until it said what was damaged; None where it did not.
        lost: what it did again.
    """

    after: Down | None
    went_on_s: float
    told_s: float | None
    lost: str


def drivers(bench: Bench, wanted: Sequence[str] = CELLS, downs: Sequence[Down] = DOWNS) -> None:
    """Play the deaths of the driver, one after another, on one run.

    Args:
        bench: where.
        wanted: cells to play.
        downs: the deaths.
    """
    baseline, before, name = bench.baseline("baseline-one", *ONE), shm(), bench.fresh("drivers")
    needed = {"F55"} if set(wanted) & {refusal.cell for refusal in REFUSALS} else set()  # they are played while it is down
    needed |= {"F5"} if "F54" in wanted else set()
    mine = [down for down in downs if set(down.cells) & (set(wanted) | needed)]
    taken = list[Taken]()
    try:
        run = chain(bench, name, mine, taken, wanted)
        held = bench.held(run, baseline, [], before, *ONE)
    except Late as late:
        held = Held({"I5": (str(late)[-1500:],)})
    tell(bench, taken, held, wanted)


def chain(bench: Bench, name: str, downs: Sequence[Down], taken: list[Taken], wanted: Sequence[str]) -> Run:
    """One start after another until the run is done.

    Args:
        bench: where.
        name: of the run.
        downs: the deaths, each of one start.
        taken: is given how each start took the run up.
        wanted: cells to play.

    Returns:
        The last start.

    Raises:
        Late: if the run does not go on.
    """
    dead: Down | None = None
    for number, down in enumerate(downs):
        with bench.run(name, *ONE) as run:
            if number == min(1, len(downs) - 1) and "F54" in wanted:
                run.until_said("Rondo run")  # it has the directory, and needs a while to start its roles
                second_driver(bench, name)
            taken.append(take_up(run, dead))
            run.until_stage(down.index, down.key)
            end(bench, run, down)
            if "F15" in down.cells and not run.draft(down.index).exists():
                raise Late(f"round {down.index} was committed before the driver could be killed")
            taken[-1] = replace(taken[-1], lost=again(run))
        print(f"     driver ended after {down.key!r} of round {down.index}", flush=True)
        if down.number == signal.SIGTERM:
            for refusal in REFUSALS:
                if refusal.cell in wanted:
                    refused(bench, name, refusal)
        if down.damage is not None:
            down.damage(run.draft(down.index))
        dead = down
    with bench.run(name, *ONE) as run:
        taken.append(take_up(run, dead))
        if run.end():
            raise Late(f"the run did not come to its end:\n{run.output()[-3000:]}")
        taken[-1] = replace(taken[-1], lost=again(run))
    return run


def take_up(run: Run, dead: Down | None) -> Taken:
    """Wait until a driver has taken the run up, whatever the one before it died of."""
    run.until(lambda: any(span["round"] is not None for span in run.spans()), 900, "a round goes on")
    at = run.when(dead.says) if dead is not None and dead.says is not None else None
    return Taken(dead, time.time() - run.began, None if at is None else at - run.began, "")


def end(bench: Bench, run: Run, down: Down) -> None:
    """Send the driver its signal; one that asks it to end is timed."""
    sent = run.kill(down.number)
    code = run.end(120)
    if down.number == signal.SIGTERM:
        took = time.time() - sent
        wrong = () if code == TERMINATED and took < STOPS_S else (f"code {code} after {took:.1f} s",)
        bench.record.outcome(
            Outcome("F55", None, None, None, "nothing", f"ended in {took:.1f} s, code {code}"), Held({"I5": wrong})
        )


def tell(bench: Bench, taken: Sequence[Taken], held: Held, wanted: Sequence[str]) -> None:
    """All deaths, each with how the run was taken up after it."""
    cold = taken[0].went_on_s
    for each in taken:
        if each.after is None:
            continue
        silent = [each.after.says] if each.after.says is not None and each.told_s is None else []
        for cell in each.after.cells:
            if cell in wanted and cell != "F55":
                note = f"round {each.after.index}, after {each.after.key!r}"
                outcome = Outcome(cell, each.told_s, each.went_on_s, cold, each.lost, note)
                bench.record.outcome(outcome, held.also({"I6": [f"nothing says {words!r}" for words in silent]}))


def refused(bench: Bench, name: str, refusal: Refusal) -> None:
    """Damage one file of a copy of the run, and look at what the command says; it must not go on."""
    copies = bench.storage / "copies"
    shutil.rmtree(copies, ignore_errors=True)
    shutil.copytree(bench.storage / "runs" / name, copies / "runs" / name)
    (copies / "cache").symlink_to(bench.storage / "cache")
    refusal.damage(copies / "runs" / name / refusal.file)
    with bench.run(name, *ONE, storage=copies) as run:
        run.until(
            lambda: run.process.poll() is not None or any(span["round"] is not None for span in run.spans()), 900, "says no"
        )
        at, code = run.when(refusal.says), run.process.poll()
    wrong = () if code == REFUSED and at is not None else (f"code {code}: {run.output()[-300:]}",)
    told = None if at is None else at - run.began
    bench.record.outcome(Outcome(refusal.cell, told, None, None, "nothing", f"{refusal.file} damaged"), Held({"I6": wrong}))


def second_driver(bench: Bench, name: str) -> None:
    """Another driver on the same directory, while the first one plays."""
    with bench.run(name, *ONE) as other:
        code = other.end(300)
        at = other.when("another driver is running")
    wrong = () if code == REFUSED and at is not None else (f"code {code}: {other.output()[-300:]}",)
    told = None if at is None else at - other.began
    bench.record.outcome(Outcome("F54", told, None, None, "nothing", "while the first one plays"), Held({"I6": wrong}))
