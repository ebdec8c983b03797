"""A disk that fills, or that nobody may write to any more, at three moments of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.faults.bench import ONE, Bench, again, shm
from benchmarks.faults.inject import SmallDisk, may_mount, read_only
from benchmarks.faults.play import Late, Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Trigger, after

CELLS = ("F16", "F39", "F40", "F41")
DISK_MIB = 512
FULL = 2


@dataclass(frozen=True)
class Full:
    """One moment at which the disk is full.

    Args:
        cell: of the matrix.
        when: waits until it is time.
        leave_kib: what is left then; enough for small records and not for a checkpoint in the case of F40.
    """

    cell: str
    when: Trigger
    leave_kib: int


MOMENTS: Sequence[Full] = (
    Full("F39", after("sample_meta"), 16),
    Full("F40", after("sync"), 400),
    Full("F41", after("score"), 0),
)


def reason() -> str | None:
    """Why these cannot be played here; None if they can."""
    return may_mount()


def disks(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Fill the disk under a run three times, then take its directory away for writing; each time it must go on afterwards.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before, place = bench.baseline("baseline-one", *ONE), shm(), bench.storage / "small_disk"
    found: list[Outcome] = []
    with SmallDisk(place, DISK_MIB) as disk:
        (place / "cache").symlink_to(bench.storage / "cache")
        for moment in MOMENTS:
            if moment.cell in wanted:
                with bench.run("disks", *ONE, storage=place) as run:
                    moment.when(run)
                    found.append(_ends(run, moment.cell, disk.fill(moment.leave_kib).unlink, "no space left", FULL))
        if "F16" in wanted:
            with bench.run("disks", *ONE, storage=place) as run:
                after("sync")(run)
                with read_only(run.path):
                    found.append(_ends(run, "F16", lambda: None, "[Rr]ead-only", None))
        with bench.run("disks", *ONE, storage=place) as run:
            if run.end():
                raise Late(f"the run did not go on with room on its disk:\n{run.output()[-3000:]}")
            held = bench.held(run, baseline, [], before, *ONE)
    for outcome in found:
        bench.record.outcome(outcome, held)


def _ends(run: Run, cell: str, free: Callable[[], None], says: str, code: int | None) -> Outcome:
    """Wait for the end that the fault leads to, and undo the fault."""
    at = time.time()
    try:
        got = run.end()
    finally:
        free()
    told = run.when(says, at)
    if told is None or (code is not None and got != code) or got == 0:
        raise Late(f"{cell}: code {got}, and nothing like {says!r}:\n{run.output()[-3000:]}")
    return Outcome(cell, told - at, None, None, again(run), f"ended with code {got}; went on when there was room")
