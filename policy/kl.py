"""Estimates of the KL divergence from samples, and the controllers of its coefficient.

Letters: any shape; usually [B, T], B rollouts, T positions.
"""

from typing import Literal

import torch
from torch import Tensor

from policy.config import KLConfig


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(pi || ref) from tokens that pi sampled. With log r = log ref - log pi:

        k1 = -log r             unbiased, may be negative; its sum over a response is the log-ratio of the whole response
        k2 = (log r)^2 / 2      biased (second order in the distance), never negative, low variance
        k3 = r - 1 - log r      unbiased, never negative

    Source: Schulman 2020, "Approximating KL Divergence".

    Args:
        logprobs: any shape, float, nats; log pi of the sampled tokens.
        ref_logprobs: same shape, nats; log ref of the same tokens.
        kind: which estimator.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if shapes differ or the kind is unknown.

    Padding contract: element by element; where both log-probabilities are 0 the estimate is 0.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"kl_estimate needs equal shapes, got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}")
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"kl_estimate kind must be 'k1', 'k2' or 'k3', got {kind!r}")


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_rollouts: int) -> None:
        """Look at the KL of a batch; change nothing."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Take over a checkpoint's state. A fixed coefficient belongs to the config, so it stays the config's."""


class AdaptiveKL:
    """A coefficient that moves until the policy's KL meets a target.

        error = clip(kl / target - 1, -0.2, 0.2),    coef <- coef * (1 + error * num_rollouts / horizon)

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_rollouts: int) -> None:
        """Move the coefficient.

        Args:
            kl: KL per response of the batch, nats.
            num_rollouts: size of the batch.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_rollouts / self.horizon

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Take over a checkpoint's state."""
        self.coef = state["coef"]


def kl_controller(config: KLConfig) -> FixedKL | AdaptiveKL:
    """The controller that a config asks for.

    Args:
        config: the ``policy.kl`` section.

    Returns:
        A controller whose ``coef`` is ``config.coef``.

    Padding contract: none, there are no sequences.
    """
    if config.controller == "adaptive":
        return AdaptiveKL(config.coef, config.target, config.horizon)
    return FixedKL(config.coef)
