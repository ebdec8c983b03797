"""The preparer: makes the SFT model (and, for the sandbox, the preference pairs) before the five roles start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import ray

from actors.process import STATUS_GROUP, ProcessSetup, Role


class Recipe(Protocol):
    """Something that makes a directory, once: called again it returns the same directory at once."""

    def __call__(self, on_progress: Callable[[str, int, int], None]) -> Path:
        """Make it; ``on_progress(unit, done, total)`` says how far it is."""


@ray.remote(concurrency_groups=STATUS_GROUP)
class Preparer(Role):
    """Runs a recipe in a process with the learner's share of the machine, then goes away."""

    about = "makes what must be there before the roles start"

    def __init__(self, setup: ProcessSetup) -> None:
        super().__init__(setup)

    def make(self, recipe: Recipe) -> Path:
        """Run the recipe.

        Returns:
            The directory.
        """
        return recipe(lambda unit, done, total: self.tick(done, total, unit))
