"""A run's driver that breaks numbers in its own roles, where they compute: ``python -m tests.cluster.faulty CONFIG ...``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import cluster.baselines
from cluster.cli import main
from cluster.rounds import Theme
from cluster.stages import Stages


def break_engine(engine: Any) -> None:
    """Make the engine's weights others than the learner's."""

    def spoil(worker: Any) -> None:
        import torch

        with torch.no_grad():
            for parameter in worker.get_model().parameters():
                parameter.mul_(1.2)

    engine.engine.collective_rpc(spoil)


def break_scorer(scorer: Any) -> None:
    """Make a weight of a member NaN."""
    import torch

    with torch.no_grad():
        next(iter(scorer.members[0].parameters())).fill_(float("nan"))


def break_learner(learner: Any) -> None:
    """Make a weight of the policy NaN."""
    import torch

    with torch.no_grad():
        next(iter(learner.policy.parameters()))[7] = float("nan")


def break_gradients(learner: Any) -> None:
    """Make the policy's next gradient infinite."""
    spoilt = []
    weight = next(iter(learner.policy.parameters()))
    weight.register_hook(lambda gradient: gradient if spoilt else spoilt.append(0) or gradient * float("inf"))


@dataclass
class Faulty(Theme):
    """Rounds in whose steps something breaks: in the first the engine and the scorer, in the second the learner."""

    def learn(self, index: int, work: Stages, step: int) -> None:
        """A step with its faults; each comes once in a run."""
        for name, at, actor, fault in (
            ("engine", 0, self.roles.rollout.actors[0], break_engine),
            ("scorer", 0, self.roles.scorer.processes[0].actor, break_scorer),
            ("learner", 1, self.roles.learner.ranks[0].actor, break_learner),
        ):
            mark = Path(self.directory.path / f"broken_{name}")
            if step == at and not mark.exists():
                mark.touch()
                ray.get(actor.__ray_call__.remote(fault))
        super().learn(index, work, step)


if __name__ == "__main__":
    cluster.baselines.THEMES["none"] = Faulty
    sys.exit(main())
