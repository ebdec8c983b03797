"""The numbers that one PPO update reports. docs/metrics.md says what each should do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.experience import Experience, explained_variance, sampler_logprobs
from policy.kl import kl_estimate
from policy.rewards import RunningMoments, normalise_scores
from tokens.masked import masked_mean
from tokens.ranks import Ranks
from tokens.records import Rollout


@dataclass(frozen=True)
class UpdateMetrics:
    """One update. Counts are shares in [0, 1]; KL and entropy in nats. What an option that is off would say is None.

    Args:
        score: mean score of the rollouts, the reward model's units.
        score_std: population standard deviation of those scores.
        score_clipped: share of scores at the clip after normalisation.
        reward: mean over rollouts of the summed token rewards (shaped score and KL penalty).
        kl: mean over rollouts of sum over tokens of log pi - log ref (k1).
        kl_coef: coefficient of the KL in this update, be it in the reward or in the loss.
        loss: mean over minibatches of PPO's surrogate; KL, entropy and PTX in the loss are left out.
        value_loss: mean over minibatches of the value loss.
        clip_fraction: share of tokens whose gradient a ratio clip removed.
        value_clip_fraction: share of tokens at which the clipped value gave the larger error.
        approx_kl: mean per token of KL(old || new) (k3), over all minibatches.
        ratio_max: largest probability ratio new / old.
        entropy: mean per token of -log pi of the sampled tokens, before the update.
        explained_variance: of the returns by the critic, before the update.
        length: mean response tokens.
        finished: share of responses that ended by themselves.
        sampler_gap: largest |sampler's - learner's| log-prob of one token.
        sampler_kl: mean per token of KL(sampler || learner) (k3), before the update.
        importance_mean: mean importance weight of the tokens.
        importance_capped: share of tokens whose weight is at the cap.
        steps_taken: share of the update's optimizer steps that were taken.
        grad_norm: mean over minibatches of the policy's gradient norm before clipping.
        critic_grad_norm: the critic's.
        exact_entropy: mean per token of the whole distribution's entropy, over all minibatches; with an entropy bonus.
        ptx_loss: mean over minibatches of the language-modelling loss, nats per token; with ``ptx_coef``.
        update_kl: mean per token of KL(before the update || after it) (k3), on some of the rollouts; with ``guards.update_kl``.
    """

    score: float
    score_std: float
    score_clipped: float
    reward: float
    kl: float
    kl_coef: float
    loss: float
    value_loss: float
    clip_fraction: float
    value_clip_fraction: float
    approx_kl: float
    ratio_max: float
    entropy: float
    explained_variance: float
    length: float
    finished: float
    sampler_gap: float
    sampler_kl: float
    importance_mean: float
    importance_capped: float
    steps_taken: float
    grad_norm: float
    critic_grad_norm: float
    exact_entropy: float | None
    ptx_loss: float | None
    update_kl: float | None

    def as_dict(self) -> dict[str, float]:
        """The metrics under their public names, ``policy/...``; without those of options that are off."""
        return {f"policy/{field.name}": vars(self)[field.name] for field in fields(self) if vars(self)[field.name] is not None}


@dataclass
class Sums:
    """Diagnostics of one update, added up over its minibatches and divided once at the end.

    Args:
        minibatches: optimizer steps taken.
        seen: minibatches that gradients were computed of: one more than steps, where the last moved too far.
        tokens: response tokens learned from, over all minibatches and ranks.
        loss: sum of the policy losses of the minibatches.
        value_loss: sum of their value losses.
        clipped: tokens whose gradient the ratio clip removed.
        value_clipped: tokens at which the clipped value gave the larger error.
        approx_kl: sum over tokens, nats.
        ratio_max: largest probability ratio so far.
        grad_norm: sum of the policy's gradient norms.
        critic_grad_norm: sum of the critic's.
        exact_entropy: sum over tokens, nats.
        ptx_loss: sum over minibatches, nats per token.
        update_kl: mean per token over some rollouts of all ranks, after the last step, nats; None where it is not measured.
    """

    minibatches: int = 0
    seen: int = 0
    tokens: int = 0
    loss: float = 0.0
    value_loss: float = 0.0
    clipped: float = 0.0
    value_clipped: float = 0.0
    approx_kl: float = 0.0
    ratio_max: float = 0.0
    grad_norm: float = 0.0
    critic_grad_norm: float = 0.0
    exact_entropy: float = 0.0
    ptx_loss: float = 0.0
    update_kl: float | None = None

    def together(self, ranks: Ranks, device: torch.device) -> Sums:
        """What all ranks saw: losses and counts of their rows added up, the largest ratio; communicates.

        Args:
            ranks: that share the models.
            device: to communicate on.

        Returns:
            The sums, equal on all ranks; the counts and norms that every rank knows already are kept.
        """
        names = ("loss", "value_loss", "clipped", "value_clipped", "approx_kl", "exact_entropy", "ptx_loss")
        totals = ranks.sum(torch.tensor([vars(self)[name] for name in names], dtype=torch.float64, device=device))
        ratio = ranks.max(torch.tensor(self.ratio_max, dtype=torch.float64, device=device))
        return replace(self, **dict(zip(names, totals.tolist(), strict=True)), ratio_max=ratio.item())


def update_metrics(
    rollouts: Sequence[Rollout],
    scores: Tensor,
    data: Experience,
    sums: Sums,
    moments: RunningMoments,
    coef: float,
    steps: int,
    config: PolicyConfig,
) -> UpdateMetrics:
    """What an update reports.

    Args:
        rollouts: B rollouts.
        scores: [B] float, the reward model's units.
        data: what the update learned from.
        sums: diagnostics of its minibatches; at least one was seen.
        moments: history of scores that normalised them.
        coef: KL coefficient of the rewards.
        steps: optimizer steps that the update was to take.
        config: the policy section.

    Returns:
        The metrics.

    Padding contract: positions outside the response mask are never read.
    """
    mask, old, clip, cap = data.batch.response_mask, data.old, config.reward_clip, config.importance_cap
    normalised = normalise_scores(scores, moments, clip, config.reward_normalisation)
    sampled = sampler_logprobs(rollouts, data.batch)
    return UpdateMetrics(
        score=scores.mean().item(),
        score_std=scores.std(correction=0).item(),
        score_clipped=0.0 if clip is None else (normalised.abs() >= clip).float().mean().item(),
        reward=data.rewards.sum(-1).mean().item(),
        kl=(old.logprobs - old.ref_logprobs).sum(-1).mean().item(),
        kl_coef=coef,
        loss=sums.loss / sums.seen,
        value_loss=sums.value_loss / sums.seen,
        clip_fraction=sums.clipped / sums.tokens,
        value_clip_fraction=sums.value_clipped / sums.tokens,
        approx_kl=sums.approx_kl / sums.tokens,
        ratio_max=sums.ratio_max,
        entropy=-masked_mean(old.logprobs, mask).item(),
        explained_variance=explained_variance(old.values, data.returns, mask),
        length=mask.sum(-1).float().mean().item(),
        finished=sum(r.finished for r in rollouts) / len(rollouts),
        sampler_gap=(sampled - old.logprobs.double())[mask].abs().max().item(),
        sampler_kl=masked_mean(kl_estimate(sampled, old.logprobs.double(), "k3"), mask).item(),
        importance_mean=masked_mean(data.weights, mask).item(),
        importance_capped=0.0 if cap is None else masked_mean((data.weights >= cap).float(), mask).item(),
        steps_taken=sums.minibatches / steps,
        grad_norm=sums.grad_norm / max(1, sums.minibatches),
        critic_grad_norm=sums.critic_grad_norm / max(1, sums.minibatches),
        exact_entropy=sums.exact_entropy / sums.tokens if config.entropy_coef else None,
        ptx_loss=sums.ptx_loss / max(1, sums.minibatches) if config.ptx_coef else None,
        update_kl=sums.update_kl,
    )
