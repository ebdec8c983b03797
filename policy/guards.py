"""What is looked at before and after an update, so that numbers that went wrong are found within one step.

Letters: B rollouts, T positions (prompt + response + padding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from policy.experience import Evaluation
from policy.rewards import RunningMoments
from tokens.guards import FINITE, BadNumber
from tokens.records import Rollout, newest

PROBED = 16
"""One rollout in so many is looked at again after an update."""
LEAST_SPREAD = 1e-4
"""Scores of a batch whose standard deviation is below this share of that of all scores before count as one."""


def check_collapse(rollouts: Sequence[Rollout], scores: Tensor, moments: RunningMoments, limit: float | None, where: str) -> None:
    """Tell a policy that has collapsed by the batch that it sampled.

    It has where the responses to different prompts are all the same, where the spread of their scores is gone, or where

        (mean of the scores before - mean of the batch) / std of the scores before > limit

    Source: none; the scores before are those that PPO normalises by (Secrets of RLHF I, arXiv:2307.04964).

    Args:
        rollouts: B rollouts.
        scores: [B] float, finite, the reward model's units.
        moments: of the scores before, of this policy's samples by the same reward model; without any, nothing is compared.
        limit: standard deviations; None = nothing is looked at.
        where: round and update.

    Raises:
        BadNumber: if it has; it blames the update before.

    Padding contract: none, one number per rollout.
    """
    if limit is None or len(rollouts) < 2:
        return
    several = len({rollout.prompt.id for rollout in rollouts}) > 1
    distinct = len({rollout.response_ids for rollout in rollouts})
    if several and distinct == 1:
        raise BadNumber(f"the number of different responses among {len(rollouts)}", 1.0, "2 or more", where, earlier=True)
    if not moments.std:
        return
    wide = scores.double()
    spread, fallen = wide.std(correction=0).item() / moments.std, (moments.mean - wide.mean().item()) / moments.std
    if several and spread < LEAST_SPREAD:
        expected = f"{LEAST_SPREAD:g} or more of that of the scores before"
        raise BadNumber("the standard deviation of the batch's scores", spread, expected, where, earlier=True)
    if fallen > limit:
        expected = f"at most {limit:g} standard deviations (guards.collapse)"
        raise BadNumber("the fall of the mean score below the scores before", fallen, expected, where, earlier=True)


def check_views(old: Evaluation, where: str) -> None:
    """The three models must see finite numbers in a batch; one look at all of them.

    Args:
        old: their views.
        where: round and update.

    Raises:
        BadNumber: if one does not; it names the model. Where that is the reference, which nothing trains, its weights are broken.

    Padding contract: views are 0 at padding.
    """
    named = {"policy's log-probs": old.logprobs, "reference's log-probs": old.ref_logprobs, "critic's values": old.values}
    sums = torch.stack([x.abs().sum(dtype=torch.float64) for x in named.values()]).tolist()
    for name, total in zip(named, sums, strict=True):
        if not math.isfinite(total):
            raise BadNumber(f"the sum of the {name}", total, FINITE, where, undo=name.startswith("reference"))


def check_sampler(rollouts: Sequence[Rollout], gaps: Tensor, bound: float, where: str) -> None:
    """The engines' log-probs must be the learner's: the proof that the last sync arrived whole, and that nothing broke since.

    Args:
        rollouts: B rollouts.
        gaps: [B] float, the largest |engine's - learner's| log-prob of a token of each, nats.
        bound: the largest allowed; only rollouts of the newest weights among them, from start to end, are held to it.
        where: round and update.

    Raises:
        BadNumber: if one is larger; it names the engines.

    Padding contract: none, one number per rollout.
    """
    wrong = (~(gaps <= bound) & torch.tensor(newest(rollouts), device=gaps.device)).nonzero().flatten().tolist()
    if wrong:
        engines = tuple(sorted({rollouts[row].engine for row in wrong}))
        what = f"the largest difference between a log-prob of {', '.join(engines)} and the learner's"
        expected = f"at most {bound:g} nats (rollout.parity_bound): the engine's weights are not the learner's"
        raise BadNumber(what, gaps[wrong].max().item(), expected, where, engines=engines)
