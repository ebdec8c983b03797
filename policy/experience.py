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
from policy.losses import importance_weights
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
        advantages: [B, T] float32, whitened over the batch where the config says so.
        returns: [B, T] float32, targets of the critic, not whitened.
        weights: [B, T] float32, ``importance_weights`` of the tokens.
        learned: [B, T] bool, True = a response token that the losses count.
    """

    batch: SequenceBatch
    old: Evaluation
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    learned: Tensor


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


def sampler_logprobs(rollouts: Sequence[Rollout], batch: SequenceBatch) -> Tensor:
    """What the engine said of each token when it drew it, side by side with the learner's numbers.

    Args:
        rollouts: B rollouts.
        batch: their ``rollout_batch``.

    Returns:
        [B, T] float64, nats, on the batch's device; 0 outside the response.

    Padding contract: 0 at padding.
    """
    mask = batch.response_mask
    theirs = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    theirs[mask] = torch.tensor([x for r in rollouts for x in r.sampler_logprobs], dtype=torch.float64, device=mask.device)
    return theirs


def shaped_scores(scores: Tensor, finished: Tensor, lengths: Tensor, moments: RunningMoments, config: PolicyConfig) -> Tensor:
    """Normalised and clipped scores, less what a response pays for being cut or long.

        shaped = normalised score (-reward_clip for a cut response, where ``truncated`` is lowest)
                 - missing_eos_penalty * [cut] - length_penalty * max(0, length - length_free)

    Source: Secrets of RLHF I (arXiv:2307.04964), PPO-max; the penalties are ours.

    Args:
        scores: [B] float, the reward model's units.
        finished: [B] bool, True = ended with EOS, False = cut by the token limit.
        lengths: [B] int64, response tokens.
        moments: history of scores.
        config: the policy section.

    Returns:
        [B] float32.

    Padding contract: none, one number per rollout.
    """
    shaped = normalise_scores(scores, moments, config.reward_clip, config.reward_normalisation)
    if config.truncated == "lowest":
        assert config.reward_clip is not None  # the config refuses it
        shaped = torch.where(finished, shaped, -config.reward_clip)
    shaped = torch.where(finished, shaped, shaped - config.missing_eos_penalty)
    return shaped - config.length_penalty * (lengths - config.length_free).clamp(min=0)


def experience(
    batch: SequenceBatch,
    old: Evaluation,
    shaped: Tensor,
    sampled: Tensor,
    learned: Tensor,
    coef: float,
    config: PolicyConfig,
    lam: float,
) -> Experience:
    """Token rewards, importance weights, generalised advantages (whitened over the batch) and returns.

    Source: Secrets of RLHF II (arXiv:2401.06080), Eq. 3; Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    Args:
        batch: B sequences.
        old: the models' views of it before the update.
        shaped: [B] float, from ``shaped_scores``.
        sampled: [B, T] float, nats, from ``sampler_logprobs``.
        learned: [B] bool, True = a rollout that is learned from; at least one.
        coef: KL coefficient of the rewards.
        config: the policy section.
        lam: GAE's lambda.

    Returns:
        The experience.

    Raises:
        ValueError: if no rollout is learned from.

    Padding contract: nothing outside the response mask is read; results are 0 there.
    """
    if not bool(learned.any()):
        raise ValueError(
            f"all {len(learned)} responses were cut by the token limit, and policy.truncated mask leaves none to learn from: "
            "raise rollout.max_new_tokens, or set policy.truncated to score or lowest"
        )
    mask = batch.response_mask
    rewards = token_rewards(shaped, old.logprobs, old.ref_logprobs, mask, coef, config.kl.estimator)
    advantages, returns = gae(rewards, old.values, mask, config.gamma, lam)
    counted = mask & learned[:, None]
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, counted)
    weights = importance_weights(old.logprobs, sampled, mask, config.importance_cap)
    return Experience(batch, old, rewards, advantages, returns, weights, counted)


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
