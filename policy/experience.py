"""What one batch of rollouts becomes before any gradient: log-probs, values, rewards, advantages.

Letters: B rollouts, T positions (prompt + response + padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.gae import gae
from policy.rewards import RunningMoments, normalise_scores, token_rewards
from tokens.masked import masked_whiten
from tokens.records import Rollout, SequenceBatch


@dataclass(frozen=True)
class Evaluation:
    """The three models' views of a batch, without gradient; all 0 outside the response.

    Args:
        logprobs: [B, T] float32, nats, the policy's.
        ref_logprobs: [B, T] float32, nats, the reference's.
        values: [B, T] float32, the critic's.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor


@dataclass(frozen=True)
class Experience:
    """A batch ready for PPO.

    Args:
        batch: B sequences.
        old: the models' views of it before the update.
        rewards: [B, T] float32.
        advantages: [B, T] float32, whitened over the batch.
        returns: [B, T] float32, targets of the critic, not whitened.
    """

    batch: SequenceBatch
    old: Evaluation
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def rollout_batch(rollouts: Sequence[Rollout], pad_id: int) -> SequenceBatch:
    """Rollouts side by side, padded on the right.

    Args:
        rollouts: B rollouts, at least one.
        pad_id: id written at padding.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: if there are no rollouts.

    Padding contract: T is the longest prompt + response of the batch.
    """
    return SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id)


def chunks(index: Tensor, size: int) -> list[Tensor]:
    """Consecutive pieces of a list of row numbers; the last may be smaller.

    Args:
        index: [b] int64.
        size: of a piece, >= 1.

    Returns:
        ceil(b / size) tensors.

    Padding contract: none, there are no sequences.
    """
    return [index[start : start + size] for start in range(0, len(index), size)]


def sampler_gap(rollouts: Sequence[Rollout], batch: SequenceBatch, logprobs: Tensor) -> float:
    """Largest |sampler's log-prob - learner's log-prob| of one token: 0 when both hold the same weights and numerics.

    Args:
        rollouts: B rollouts.
        batch: their ``rollout_batch``.
        logprobs: [B, T] float, nats, the learner's, at the sampler's temperature.

    Returns:
        Nats.

    Padding contract: only response tokens are compared.
    """
    theirs = torch.tensor([x for r in rollouts for x in r.sampler_logprobs], dtype=torch.float64)
    ours = logprobs.detach().cpu()[batch.response_mask.cpu()].double()
    return float((theirs - ours).abs().max())


def shaped_scores(scores: Tensor, finished: Tensor, moments: RunningMoments, config: PolicyConfig) -> Tensor:
    """Normalised and clipped scores, less the penalty of responses that the token limit cut.

        shaped = clip((score - mean) / std, -reward_clip, reward_clip) - missing_eos_penalty * [not finished]

    Source: Secrets of RLHF I (arXiv:2307.04964), PPO-max; the penalty is ours.

    Args:
        scores: [B] float, the reward model's units.
        finished: [B] bool, True = ended with EOS.
        moments: history of scores.
        config: the policy section.

    Returns:
        [B] float32.

    Padding contract: none, one number per rollout.
    """
    shaped = normalise_scores(scores, moments, config.reward_clip)
    return torch.where(finished, shaped, shaped - config.missing_eos_penalty)


def experience(batch: SequenceBatch, old: Evaluation, shaped: Tensor, coef: float, gamma: float, lam: float) -> Experience:
    """Token rewards, generalised advantages (whitened over the batch) and returns.

    Source: Secrets of RLHF II (arXiv:2401.06080), Eq. 3; Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    Args:
        batch: B sequences.
        old: the models' views of it before the update.
        shaped: [B] float, from ``shaped_scores``.
        coef: KL coefficient.
        gamma: discount.
        lam: GAE's lambda.

    Returns:
        The experience.

    Padding contract: nothing outside the response mask is read; results are 0 there.
    """
    mask = batch.response_mask
    rewards = token_rewards(shaped, old.logprobs, old.ref_logprobs, mask, coef)
    advantages, returns = gae(rewards, old.values, mask, gamma, lam)
    return Experience(batch, old, rewards, masked_whiten(advantages, mask), returns)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the critic foresaw: 1 - var(return - value) / var(return).

    Args:
        values: [B, T] float, before the update.
        returns: [B, T] float.
        mask: [B, T] bool, True = a response token.

    Returns:
        At most 1; 0 or less is no better than a constant; 0 where all returns are equal.

    Padding contract: positions outside ``mask`` are never read.
    """
    targets, errors = returns[mask].double(), (returns - values)[mask].double()
    variance = targets.var(correction=0)
    return float(1 - errors.var(correction=0) / variance) if variance > 0 else 0.0
