"""Whose turn it is on an engine that one thread steps and another gives new weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock of two kinds: whoever wants to change the engine goes before whoever steps it again.

    A plain lock would let the stepping thread take it again before the waiting one wakes, and weights would come when all
    requests are done.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._taken = False
        self._changes = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the engine for one step, once no change waits."""
        with self._condition:
            self._condition.wait_for(lambda: not self._taken and not self._changes)
            self._taken = True
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the engine between two steps."""
        with self._condition:
            self._changes += 1
            try:
                self._condition.wait_for(lambda: not self._taken)
                self._taken = True
            finally:
                self._changes -= 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._condition:
            self._taken = False
            self._condition.notify_all()
