"""Deaths of the driver: one run, killed after one line of its journal after another, and its files damaged while it is down."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.bench import Bench, Outcome, lost, shm
from benchmarks.faults.inject import flip, swap, truncate
from benchmarks.faults.invariants import Held
from benchmarks.faults.play import Late, Run

CELLS = ("F5", "F11", "F15", "F26", "F27", "F42", "F43", "F44", "F45", "F46", "F47", "F54", "F55")
REFUSED = 2
TERMINATED = 143


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


DOWNS: Sequence[Down] = (
    Down(0, "begun"),
    Down(0, "shifted", ("F5", "F11")),
    Down(0, "reward"),
    Down(0, "rollouts 0", ("F11", "F42"), lambda draft: flip(newest(draft, "steps/*.parquet")), "is not what was written"),
    Down(0, "scores 1"),
    Down(0, "step 2", ("F11", "F46"), tear, "cut short"),
    Down(0, "checkpoint 4", ("F11", "F44"), lambda draft: truncate(newest(draft, "after_*/learner.safetensors")), "older state"),
    Down(0, "trained", ("F15", "F11")),
    Down(1, "reward", ("F11", "F26"), other_reward, "is not what was written"),
    Down(1, "rollouts 3", ("F11", "F27"), other_rollouts, "is not what was written"),
    Down(1, "step 4", ("F55",), number=signal.SIGTERM),
    Down(1, "evaluation", ("F11",)),
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


def drivers(bench: Bench) -> None:
    """Play all deaths of the driver, one after another, on one run."""
    baseline, before = bench.baseline(), shm()
    name, cold, said, ran = bench.fresh("drivers"), None, list[str](), list[tuple[Down, float, float | None, str]]()
    expect: Down | None = None
    for number, down in enumerate((*DOWNS, None)):
        if number == len(DOWNS) - 1:
            for refusal in REFUSALS:
                refused(bench, name, refusal)
        with bench.run(name) as run:
            went_on = run.until(
                lambda run=run: len(run.spans()) > 0 and any(s["round"] is not None for s in run.spans()), 300, "goes on"
            )
            cold = went_on - run.began if cold is None else cold
            if expect is not None:
                told = run.when(expect.says) if expect.says else None
                if expect.says and told is None:
                    said.append(expect.says)
                ran.append((expect, went_on - run.began, None if told is None else told - run.began, lost(run)))
            if number == 1:
                second_driver(bench, name)
            if down is None:
                code = run.end()
                if code:
                    raise Late(f"the run did not come to its end ({code}):\n{run.output()[-3000:]}")
                break
            run.until_stage(down.index, down.key)
            ended = run.kill(down.number)
            code = run.end(120)
            if down.number == signal.SIGTERM:
                stopped = time.time() - ended
                ran_stop = Outcome("F55", stopped, None, None, "nothing", f"code {code}")
                bench.record.outcome(
                    ran_stop, Held({"I5": () if code == TERMINATED and stopped < 10 else (f"{code}, {stopped:.1f} s",)})
                )
        if down.damage is not None:
            down.damage(run.draft(down.index))
        expect = down
    held = bench.held(run, baseline, said, before)
    for down, recovered, told_s, again in ran:
        for cell in down.cells:
            note = f"round {down.index}, after {down.key!r}"
            bench.record.outcome(Outcome(cell, told_s, recovered, cold, again, note), held)


def refused(bench: Bench, name: str, refusal: Refusal) -> None:
    """Damage one file, look at what the command says, and put the file back."""
    run_path = bench.storage / "runs" / name
    file, aside = run_path / refusal.file, bench.storage / "aside"
    shutil.copyfile(file, aside)
    refusal.damage(file)
    with bench.run(name) as run:
        code = run.end()
        at = run.when(refusal.says)
    shutil.copyfile(aside, file)
    wrong = () if code == REFUSED and at is not None else (f"code {code}: {run.output()[-300:]}",)
    told = None if at is None else at - run.began
    bench.record.outcome(Outcome(refusal.cell, told, None, None, "nothing", f"{refusal.file} damaged"), Held({"I6": wrong}))


def second_driver(bench: Bench, name: str) -> None:
    """Another driver on the same directory, while the first one plays."""
    with bench.run(name) as other:
        code = other.end(300)
        at = other.when("another driver is running")
    wrong = () if code == REFUSED and at is not None else (f"code {code}: {other.output()[-300:]}",)
    told = None if at is None else at - other.began
    bench.record.outcome(Outcome("F54", told, None, None, "nothing", "while the first one plays"), Held({"I6": wrong}))


def last_words(run: Run) -> str:
    """The last line that a run printed."""
    return run.said[-1].text if run.said else ""
