"""Actors behind the interface of an engine and of a learner whose work is sleep; few imports, for there may be many of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray

from actors.process import Progress
from actors.transfer import Parcels
from tokens.records import Prompt, Rollout


class SleepingEngine:
    """What the pool needs of an engine; sampling is sleep."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.version = seconds, 0

    @ray.method(concurrency_group="load")
    def load(self, weights: Parcels, version: int) -> int:
        """Take a version over, also while ``sample`` sleeps."""
        self.version = version
        return version

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        """Nothing is counted."""
        return Progress(0, 0, "")

    def sample(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int, before: Sequence[int]
    ) -> list[Rollout]:
        """A token per response, of the version that was held when the call began."""
        held = self.version
        assert held >= version
        time.sleep(self.seconds)
        return [Rollout(prompt, i, (2,), "", (0.0,), held, True) for prompt in prompts for i in range(samples_per_prompt)]


class SleepingLearner:
    """What the loop needs of a learner; an update is sleep."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        """Nothing is counted."""
        return Progress(0, 0, "")

    def update(
        self, rollouts: Sequence[Rollout], scores: Sequence[float], sampler_bound: float | None, number: int
    ) -> dict[str, float]:
        """No metric."""
        time.sleep(self.seconds)
        return {}

    def send(self) -> Parcels:
        """No weights."""
        return Parcels((), 0)
