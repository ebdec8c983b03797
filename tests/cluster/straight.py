"""Rounds without recovery, for tests that play them in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Straight:
    """Nothing that is lost is made good, and nothing moves."""

    def __init__(self) -> None:
        self.moving = self

    def __call__(self, play: Callable[[], T]) -> T:
        return play()

    def saving_is_due(self) -> bool:
        return False

    def move_learner(self) -> None:
        pass
