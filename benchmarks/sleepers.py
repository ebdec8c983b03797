"""Actors behind the roles' interfaces whose work is sleep, or nothing; few imports, for there may be many of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import ray

from actors.process import Progress
from actors.reward_trainer import RewardReport
from actors.scorer import Raw
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


class IdleLearner(SleepingLearner):
    """What a whole round needs of a learner."""

    def begin_round(self, *given: object) -> None:
        """There are no models."""

    def update(
        self, rollouts: Sequence[Rollout], scores: Sequence[float], sampler_bound: float | None, number: int
    ) -> dict[str, float]:
        """What a terminal shows of a step."""
        return {"policy/score": 0.0, "policy/kl": 0.0}

    def statistics(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Every response is certain."""
        return (0.0,) * len(rollouts), (0.0,) * len(rollouts)

    def save(self, out_dir: Path) -> None:
        """The directories, and a file in each."""
        for name in ("policy", "critic"):
            (out_dir / name).mkdir()
            (out_dir / name / "config.json").write_text("{}")


class IdleTrainer:
    """What the loop needs of a reward trainer; it fits nothing."""

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        """Nothing is counted."""
        return Progress(0, 0, "")

    def fit(self, out_dir: Path, *given: object) -> RewardReport:
        """A directory, and a file in it."""
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{}")
        return RewardReport(dict.fromkeys(("loss", "accuracy", "J_before", "J_after")), (), (), None)


class IdleScorer:
    """What the loop needs of a scorer; every score is 0."""

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        """Nothing is counted."""
        return Progress(0, 0, "")

    def calibrate_on(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing is calibrated."""

    def load(self, member: int, model_dir: Path) -> None:
        """Nothing is loaded."""

    def score(self, rollouts: Sequence[Rollout], ids: Sequence[int]) -> Raw:
        """One member's."""
        from rm.ensemble import Moments

        return Raw((0,), ((0.0,),) * len(rollouts), (Moments(0.0, 1.0),))
