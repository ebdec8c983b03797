"""How far tasks are: a board that they write on, and what writes there."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.process import Progress

SAY_EVERY_S = 0.5
"""A task writes no oftener."""


@ray.remote(num_cpus=0)
class Board:
    """Where tasks write how far they are, since a task cannot be asked.

    Args:
        totals: pairs that each job will see, by its name.
        unit: what is counted in their place.
    """

    def __init__(self, totals: dict[str, int], unit: str = "pairs") -> None:
        self.totals, self.unit = totals, unit
        self.done = dict.fromkeys(totals, 0)
        self.running: set[str] = set()
        self.beats = 0

    def tick(self, name: str, done: int) -> None:
        """Note how many pairs a job has seen; 0 as soon as it begins, also again where its process died."""
        self.running.add(name)
        self.done[name] = done
        self.beats += 1

    def beat(self) -> None:
        """Note that a job is at work on something that is not counted in pairs."""
        self.beats += 1

    def end(self, name: str) -> None:
        """Note that a job has ended."""
        self.running.discard(name)

    def progress(self) -> Progress:
        """All jobs together."""
        done, total = sum(self.done.values()), sum(self.totals.values())
        return Progress(done, total, self.unit, beats=self.beats, waiting=not self.running)


class Teller:
    """Writes how far one job is, seldom enough not to matter.

    Made before anything slow: it tells that the job has room.

    Args:
        board: a ``Board``'s handle.
        name: of the job.
    """

    def __init__(self, board: Any, name: str) -> None:
        self.board, self.name, self.said = board, name, 0.0
        board.tick.remote(name, 0)

    def due(self, last: bool = False) -> bool:
        """Whether it is time to tell something again; ``last`` = it is, however short a time ago something was told."""
        return last or time.perf_counter() - self.said > SAY_EVERY_S

    def __call__(self, done: int, last: bool = False) -> None:
        """Tell how far it is, where that is due.

        Args:
            done: of what the board counts.
            last: as for ``due``.
        """
        if self.due(last):
            self.said = time.perf_counter()
            self.board.tick.remote(self.name, done)

    def beat(self) -> None:
        """Tell that work goes on which is not counted, where that is due."""
        if self.due():
            self.said = time.perf_counter()
            self.board.beat.remote()

    def end(self) -> None:
        """Tell that the job has ended."""
        self.board.end.remote(self.name)
