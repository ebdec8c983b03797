"""The rollout batches of PPO: sampled when they are asked for, or ahead of the learner. Chosen once, at set-up."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from cluster.config import RunConfig
from cluster.failures import RoleFailed
from cluster.pool import RolloutPool
from cluster.seeds import derive
from cluster.waiting import Pending, Waiter
from tokens.records import Prompt, Rollout


def draw(seed: int, prompts: Sequence[Prompt], start: int, number: int, name: str, index: int) -> list[Prompt]:
    """Prompts number ``start`` to ``start + number`` of a round; shuffled, all are used before one comes again.

    Args:
        seed: of the run.
        prompts: to draw from.
        start: prompts of the round that were drawn before.
        number: to draw.
        name: what they are for.
        index: of the round.
    """
    drawn: list[Prompt] = []
    for lap in range(start // len(prompts), (start + number - 1) // len(prompts) + 1):
        first = lap * len(prompts)
        order = _order(derive(seed, name, "prompts", index, lap), len(prompts))
        drawn += [prompts[at] for at in order.places(max(0, start - first), start + number - first)]
    return drawn


class Order:
    """Places 0 to number - 1, shuffled as ``random.Random(seed).sample(range(number), number)`` shuffles them, but only as far as
    somebody has asked: a round needs a few thousand of what may be millions.

    Args:
        seed: of the order.
        number: of places.
    """

    def __init__(self, seed: int, number: int) -> None:
        self._random, self._number = random.Random(seed), number
        self._drawn = array("L")
        self._moved: dict[int, int] = {}
        """What lies at a place from which something was taken: what lay last."""

    def places(self, start: int, end: int) -> array[int]:
        """Those from ``start`` on, before ``end`` or the last."""
        for drawn in range(len(self._drawn), min(end, self._number)):
            last = self._number - drawn - 1
            at = self._random.randrange(last + 1)
            self._drawn.append(self._moved.get(at, at))
            self._moved[at] = self._moved.pop(last, last)
        if len(self._drawn) == self._number:
            self._moved.clear()
        return self._drawn[start:end]


_order = lru_cache(maxsize=4)(Order)  # a round's steps draw from one order


class Batches:
    """The batch of every step: which prompts, with which seed. Neither depends on when it is sampled.

    Args:
        config: of the run.
        prompts: of PPO.
        pool: samples.
    """

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], pool: RolloutPool) -> None:
        self.config, self.prompts, self.pool = config, prompts, pool

    def submit(self, index: int, step: int, version: int) -> Pending[list[Rollout]]:
        """Ask the pool for the batch of a step, from weights that are no older than ``version``."""
        policy, seed = self.config.policy, self.config.seed
        first = step * policy.prompts_per_step
        prompts = draw(seed, self.prompts, first, policy.prompts_per_step, "policy", index)
        pending = self.pool.sample(prompts, policy.samples_per_prompt, derive(seed, "policy", index, step), version)
        return replace(pending, step=step)


class Sampling(Protocol):
    """Gives the loop its rollouts."""

    def __call__(self, index: int, step: int, version: int) -> list[Rollout]:
        """The batch of a step, for a learner that holds ``version``."""
        ...

    def forget(self) -> None:
        """Nobody waits any more for what was asked for."""
        ...


class WhenAsked:
    """On-policy: a batch is sampled from the weights that will learn from it, and everybody else waits."""

    def __init__(self, batches: Batches, wait: Waiter) -> None:
        self.batches, self.wait = batches, wait

    def __call__(self, index: int, step: int, version: int) -> list[Rollout]:
        """The batch of a step."""
        rollouts = self.wait("sample", self.batches.submit(index, step, version))
        refuse_old(rollouts, index, step, version, max_lag=0)
        return rollouts

    def forget(self) -> None:
        """Nothing is asked for ahead."""


class Ahead:
    """The pool works on up to ``max_lag`` batches to come while the learner trains on this one.

    None is begun over the end of a round: what follows it is scored by another reward model.

    Args:
        batches: of the run.
        wait: waits for them.
        max_lag: how many.
        steps_per_round: of the run.
    """

    def __init__(self, batches: Batches, wait: Waiter, max_lag: int, steps_per_round: int) -> None:
        self.batches, self.wait, self.max_lag, self.steps_per_round = batches, wait, max_lag, steps_per_round
        self.submitted: dict[tuple[int, int], Pending[list[Rollout]]] = {}
        """Batches on their way, by round and step."""

    def __call__(self, index: int, step: int, version: int) -> list[Rollout]:
        """The batch of a step; those of the next steps are asked for first, so that the pool goes on without a pause."""
        for passed in [place for place in self.submitted if place < (index, step)]:  # of steps that were left out
            self.wait.forget(self.submitted.pop(passed))
        for later in range(step, min(step + self.max_lag + 1, self.steps_per_round)):
            if (index, later) not in self.submitted:
                pending = self.batches.submit(index, later, version)
                self.wait.watch("sample", pending)
                self.submitted[index, later] = pending
        rollouts = self.wait("sample", self.submitted.pop((index, step)))
        refuse_old(rollouts, index, step, version, self.max_lag)
        return rollouts

    def forget(self) -> None:
        """The batches to come are asked for again."""
        for pending in self.submitted.values():
            self.wait.forget(pending)
        self.submitted.clear()


def sampling(config: RunConfig, prompts: Sequence[Prompt], pool: RolloutPool, wait: Waiter) -> Sampling:
    """What ``policy.max_lag`` asks for."""
    batches, policy = Batches(config, prompts, pool), config.policy
    return Ahead(batches, wait, policy.max_lag, policy.steps_per_round) if policy.max_lag else WhenAsked(batches, wait)


def refuse_old(rollouts: Sequence[Rollout], index: int, step: int, version: int, max_lag: int) -> None:
    """Rollouts must come from weights that the learner held at most ``max_lag`` updates ago.

    Raises:
        RoleFailed: if one does not: a sync was lost, and nothing may be learned from it.
    """
    for rollout in rollouts:
        if not 0 <= version - rollout.policy_version <= max_lag:
            raise RoleFailed(
                f"round {index}, step {step}: a rollout of prompt {rollout.prompt.id} is of policy version "
                f"{rollout.policy_version}, the learner holds version {version}, and policy.max_lag = {max_lag} is the most that "
                "may lie between: a weight sync was lost, and nothing was learned from this batch"
            )


def ages(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """How old what the learner of ``version`` is given is.

    Returns:
        ``policy/lag``: mean age of a token, versions; ``policy/swapped``: share of rollouts that got new weights on the way;
        ``policy/tokens``: of all responses.
    """
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return {
        "policy/tokens": float(tokens),
        "policy/lag": sum(rollout.age(version) * len(rollout.response_ids) for rollout in rollouts) / tokens,
        "policy/swapped": sum(bool(rollout.swaps) for rollout in rollouts) / len(rollouts),
    }
