"""From scores to token rewards: running moments, normalisation and clip, KL penalty.

Letters: B rollouts, T positions (prompt + response + padding).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from policy.kl import kl_estimate


class RunningMoments:
    """Mean and population standard deviation of all scores seen so far, in float64.

    Batches merge exactly: with d = mean_b - mean,
    mean += d * n_b / n,  M2 += M2_b + d^2 * n_a * n_b / n,  n = n_a + n_b,  std = sqrt(M2 / n).

    Source: Chan, Golub, LeVeque 1983, the pairwise update of sample variances.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first score."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch.

        Args:
            scores: [B] float, finite, B >= 1.

        Raises:
            ValueError: if the batch is empty or a score is not finite.
        """
        batch = scores.detach().double().flatten()
        if not len(batch) or not bool(batch.isfinite().all()):
            raise ValueError(f"running moments need at least one score and finite ones, got {batch.tolist()}")
        count, mean = len(batch), batch.mean().item()
        total, delta = self.count + count, mean - self.mean
        self.m2 += (batch - mean).square().sum().item() + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def copy(self) -> "RunningMoments":
        """An independent copy."""
        other = RunningMoments()
        other.load(self.state())
        return other

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; exact through JSON."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load(self, state: dict[str, float]) -> None:
        """Take over a checkpoint's state."""
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def normalise_scores(
    scores: Tensor, moments: RunningMoments, clip: float | None, kind: Literal["running", "scale", "none"] = "running"
) -> Tensor:
    """Scores in units that PPO can rely on, whatever the reward model's.

        running: clip((score - mean) / std, -clip, clip)
        scale:   clip(score / std, -clip, clip)
        none:    clip(score, -clip, clip)

    with the running moments of the scores.

    Source: Secrets of RLHF I (arXiv:2307.04964), score normalisation and clip of PPO-max; Secrets II, appendix B: clip 0.8.

    Args:
        scores: [B] float, the reward model's units.
        moments: history of scores, of the same reward model.
        clip: in units of the result, > 0; None = no clip.
        kind: what is done before the clip.

    Returns:
        [B] float32; all 0 where every score seen so far was the same and ``kind`` is ``running``.

    Raises:
        ValueError: if ``clip`` is not positive or the moments are empty.

    Padding contract: none, one number per rollout.
    """
    if (clip is not None and clip <= 0) or not moments.count:
        raise ValueError(f"normalise_scores needs a positive clip and moments of some scores, got {clip}, {moments.count} scores")
    centre = moments.mean if kind == "running" else 0.0
    unit = 1.0 if kind == "none" else moments.std + 1e-8
    normalised = (scores.detach().double() - centre) / unit
    return (normalised if clip is None else normalised.clamp(-clip, clip)).float()


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    coef: float,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:
    """Reward of every response token: the KL penalty, and the score at the last one.

        r_t = -coef * kl_t + [t is the last response token] * score,    kl_t = kl_estimate(log pi_t, log ref_t)

    With k1, kl_t = log pi_t - log ref_t.

    Source: Secrets of RLHF II (arXiv:2401.06080), Eq. 3, written per token; estimators: ``policy.kl``.

    Args:
        scores: [B] float, already normalised.
        logprobs: [B, T] float, nats, the policy's before the update.
        ref_logprobs: [B, T] float, nats, the reference's.
        mask: [B, T] bool, True = a response token.
        coef: KL coefficient, >= 0.
        estimator: of the KL.

    Returns:
        [B, T] float32; 0 outside ``mask``; no gradient.

    Raises:
        ValueError: if shapes differ, or a row has no response token.

    Padding contract: the last True of each row carries the score, wherever padding lies; other positions are never read.
    """
    if not (logprobs.shape == ref_logprobs.shape == mask.shape) or scores.shape != mask.shape[:1]:
        raise ValueError(
            "token_rewards needs scores [B] and logprobs, ref_logprobs, mask [B, T], got "
            f"{tuple(scores.shape)}, {tuple(logprobs.shape)}, {tuple(ref_logprobs.shape)}, {tuple(mask.shape)}"
        )
    if not bool(mask.any(-1).all()):
        raise ValueError("token_rewards: a rollout has no response token to carry its score")
    penalty = kl_estimate(logprobs.detach(), ref_logprobs.detach(), estimator).float()
    rewards = torch.where(mask, -coef * penalty, 0.0)
    is_last = mask & (mask.flip(-1).long().cumsum(-1).flip(-1) == 1)  # [B, T]
    return torch.where(is_last, rewards + scores.detach().float()[:, None], rewards)
