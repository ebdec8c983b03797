"""Work that is numbered and done once, however often it is asked for: Ray's calls, and ours, may come twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OutOfDate(RuntimeError):
    """Work was asked for that lies behind what is done."""


class Once(Generic[T]):
    """Remembers the last piece of work and its answer."""

    def __init__(self) -> None:
        self._done: tuple[int, T] | None = None

    def __call__(self, number: int, work: Callable[[], T]) -> T:
        """Do a piece of work, or answer for it if it is the last one that was done.

        Args:
            number: of the piece; they only grow.
            work: does it. Where it raises, nothing is done.

        Raises:
            OutOfDate: if a later piece is done.
        """
        if self._done is not None:
            last, answer = self._done
            if number == last:
                return answer
            if number < last:
                raise OutOfDate(f"number {number} was asked for, and number {last} is done")
        answer = work()
        self._done = number, answer
        return answer

    def forget(self) -> None:
        """What was done is undone: any number may come next."""
        self._done = None
