"""A run of six processes, two of them engines and two scorers, for the tests of what is done when one is lost."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.fixed_pool import FixedPool
from cluster.roles import Ensemble, LearnerHandle, RewardHandle, Roles, ScorerHandle
from cluster.rota import Process, Rota
from rm.config import ScorerConfig
from tokens.guards import GuardsConfig

NAMES = ("rollout-0", "rollout-1", "reward-0", "scorer-0", "scorer-1", "learner-0")


def five_roles(processes: Sequence[Process], rota: Rota) -> tuple[FixedPool, Roles]:
    """The engines and the roles that these processes are.

    Args:
        processes: in the order of ``NAMES``.
        rota: of their devices.
    """
    e0, e1, reward, *scorers, learner = processes
    pool = FixedPool([e0, e1], rota)
    return pool, Roles(
        pool,
        RewardHandle([reward], 60, rota),
        ScorerHandle(scorers, rota, Ensemble(), ScorerConfig(), GuardsConfig()),
        LearnerHandle([learner], 60, rota),
        tuple(processes),
        rota,
        lambda sending: None,
    )
