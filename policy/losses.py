"""The clipped losses of PPO. The denominator is an argument: the response tokens of the whole minibatch.

Letters: B rollouts, T positions (prompt + response + padding).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from policy.kl import kl_estimate
from tokens.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """Policy loss of a (micro)batch, and sums to be added over microbatches before they are divided.

    Args:
        loss: scalar with gradient, already divided by the denominator.
        num_clipped: scalar, tokens whose gradient a clip removed.
        approx_kl: scalar, sum over tokens of the k3 estimate of KL(old || new), nats.
        ratio_max: scalar, largest probability ratio new / old.
    """

    loss: Tensor
    num_clipped: Tensor
    approx_kl: Tensor
    ratio_max: Tensor


@dataclass(frozen=True)
class ValueLoss:
    """Value loss of a (micro)batch, and sums to be added over microbatches before they are divided.

    Args:
        loss: scalar with gradient, already divided by the denominator.
        num_clipped: scalar, tokens at which the clipped value gave the larger error.
    """

    loss: Tensor
    num_clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    denominator: Tensor | float,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, to be minimised.

        s_t = min(ratio_t * A_t, clip(ratio_t, 1 - clip, 1 + clip) * A_t),   ratio = exp(logp - old logp)
        s_t = max(s_t, dual_clip * A_t)  where A_t < 0 and there is a dual clip
        loss = -1/denominator * sum_t w_t * s_t

    Source: Schulman et al. 2017 (arXiv:1707.06347), Eq. 7; dual clip: Ye et al. 2020 (arXiv:1912.09729), Eq. 5; weights: the
    decoupled objective of Hilton et al. 2021 (arXiv:2110.00641), where the proximal policy is not the one that sampled.

    Args:
        logprobs: [B, T] float, nats, of the policy being trained (with gradient).
        old_logprobs: [B, T] float, nats, of the policy before this update, from the same forward pass as ``logprobs``.
        advantages: [B, T] float.
        mask: [B, T] bool, True = a token that is learned from.
        clip: > 0.
        denominator: such tokens of the whole minibatch (all microbatches, all ranks).
        weights: [B, T] float, ``importance_weights``; None = all 1.
        dual_clip: > 1; None = none.

    Returns:
        The loss and its diagnostics.

    Raises:
        ValueError: if shapes differ, ``clip`` is not positive, or ``dual_clip`` is not above 1.

    Padding contract: positions outside ``mask`` are never read; no gradient reaches them.
    """
    _check(clip, logprobs, old_logprobs, advantages, mask, *([] if weights is None else [weights]))
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    zero = torch.zeros((), device=logprobs.device)
    old_logprobs = old_logprobs.detach()
    log_ratio = torch.where(mask, logprobs - old_logprobs, zero)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages.detach(), zero)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    surrogate, flat = torch.minimum(free, clipped), clipped < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        bounded = (advantages < 0) & (surrogate < floor)
        surrogate, flat = torch.where(bounded, floor, surrogate), flat | bounded
    if weights is not None:
        surrogate = surrogate * weights.detach()
    with torch.no_grad():
        num_clipped = masked_sum(flat.float(), mask)
        approx_kl = masked_sum(kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3"), mask)
        ratio_max = torch.where(mask, ratio, zero).max()
    return PolicyLoss(-masked_sum(surrogate, mask, denominator), num_clipped, approx_kl, ratio_max)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """How much more likely the learner finds each token than the engine that drew it did, bounded above.

        w_t = min(exp(old_t - sampler_t), cap)

    The two differ by numerics (another kernel, bfloat16), by sampling that cuts or bends the distribution (top-p, top-k,
    repetition penalty), and by age, where the engine held earlier weights. The cap keeps the variance of the gradient finite
    for the price of a bias on the tokens it touches.

    Source: truncated importance sampling, Ionides 2008 (J. Comput. Graph. Stat. 17), Eq. 4; per token as Espeholt et al. 2018
    (arXiv:1802.01561), section 4.1.

    Args:
        old_logprobs: [B, T] float, nats, the learner's before the update.
        sampler_logprobs: [B, T] float, nats, of the distribution each token was drawn from.
        mask: [B, T] bool, True = a response token.
        cap: > 0; None = every weight is 1.

    Returns:
        [B, T] float32; 0 outside ``mask``; no gradient.

    Raises:
        ValueError: if shapes differ or the cap is not positive.

    Padding contract: positions outside ``mask`` are never read.
    """
    _check(1.0 if cap is None else cap, old_logprobs, sampler_logprobs, mask)
    if cap is None:
        return mask.float()
    zero = torch.zeros((), device=mask.device)
    difference = torch.where(mask, (old_logprobs - sampler_logprobs).detach().float(), zero)
    return torch.where(mask, difference.exp().clamp(max=cap), zero)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    denominator: Tensor | float,
    kind: Literal["squared", "huber"] = "squared",
) -> ValueLoss:
    """Error of the critic, pessimistic about moves of more than ``clip``.

        v_clipped = old + clip(v - old, -clip, clip)
        loss = 1/denominator * sum_t max(e(v_t - return_t), e(v_clipped_t - return_t))
        squared: e(x) = x^2 / 2;    huber: e(x) = x^2 / 2 where |x| <= 1, else |x| - 1/2

    Source: Secrets of RLHF I (arXiv:2307.04964), value function clipping; Huber 1964.

    Args:
        values: [B, T] float, of the critic being trained (with gradient).
        old_values: [B, T] float, of the critic before this update.
        returns: [B, T] float, the targets.
        mask: [B, T] bool, True = a token that is learned from.
        clip: > 0, in units of the normalised score; ``math.inf`` is the plain error.
        denominator: such tokens of the whole minibatch (all microbatches, all ranks).
        kind: of the error.

    Returns:
        The loss and its diagnostics.

    Raises:
        ValueError: if shapes differ or ``clip`` is not positive.

    Padding contract: positions outside ``mask`` are never read; no gradient reaches them.
    """
    _check(clip, values, old_values, returns, mask)
    zero = torch.zeros((), device=values.device)
    old_values, returns = (torch.where(mask, x.detach(), zero) for x in (old_values, returns))
    values = torch.where(mask, values, zero)
    free = _error(values - returns, kind)
    if math.isinf(clip):
        return ValueLoss(masked_sum(free, mask, denominator), zero)
    clipped = _error(old_values + (values - old_values).clamp(-clip, clip) - returns, kind)
    with torch.no_grad():
        moved = (values - old_values).abs() > clip  # within the clip the two differ by rounding
        num_clipped = masked_sum((moved & (clipped > free)).float(), mask)
    return ValueLoss(masked_sum(torch.maximum(free, clipped), mask, denominator), num_clipped)


def _error(x: Tensor, kind: Literal["squared", "huber"]) -> Tensor:
    return 0.5 * x.square() if kind == "squared" else nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none")


def _check(clip: float, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"the tensors of a loss must have one shape [B, T], got {shapes}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
