"""The clipped losses of PPO. The denominator is an argument: the response tokens of the whole minibatch.

Letters: B rollouts, T positions (prompt + response + padding).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from policy.kl import kl_estimate
from tokens.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """Policy loss of a (micro)batch, and sums to be added over microbatches before they are divided.

    Args:
        loss: scalar with gradient, already divided by the denominator.
        num_clipped: scalar, tokens whose gradient the clip removed.
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
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, denominator: Tensor | float
) -> PolicyLoss:
    """PPO's clipped surrogate, to be minimised.

        loss = -1/denominator * sum_t min(ratio_t * A_t, clip(ratio_t, 1 - clip, 1 + clip) * A_t),   ratio = exp(logp - old logp)

    Source: Schulman et al. 2017 (arXiv:1707.06347), Eq. 7.

    Args:
        logprobs: [B, T] float, nats, of the policy being trained (with gradient).
        old_logprobs: [B, T] float, nats, of the policy before this update, from the same forward pass as ``logprobs``.
        advantages: [B, T] float.
        mask: [B, T] bool, True = a response token.
        clip: > 0.
        denominator: response tokens of the whole minibatch (all microbatches, all ranks).

    Returns:
        The loss and its diagnostics.

    Raises:
        ValueError: if shapes differ or ``clip`` is not positive.

    Padding contract: positions outside ``mask`` are never read; no gradient reaches them.
    """
    _check(clip, logprobs, old_logprobs, advantages, mask)
    zero = torch.zeros((), device=logprobs.device)
    old_logprobs = old_logprobs.detach()
    log_ratio = torch.where(mask, logprobs - old_logprobs, zero)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages.detach(), zero)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    with torch.no_grad():
        num_clipped = masked_sum((clipped < free).float(), mask)
        approx_kl = masked_sum(kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3"), mask)
        ratio_max = torch.where(mask, ratio, zero).max()
    return PolicyLoss(-masked_sum(torch.minimum(free, clipped), mask, denominator), num_clipped, approx_kl, ratio_max)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: Tensor | float
) -> ValueLoss:
    """Squared error of the critic, pessimistic about moves of more than ``clip``.

        v_clipped = old + clip(v - old, -clip, clip)
        loss = 1/denominator * sum_t 0.5 * max((v_t - return_t)^2, (v_clipped_t - return_t)^2)

    Source: Secrets of RLHF I (arXiv:2307.04964), value function clipping.

    Args:
        values: [B, T] float, of the critic being trained (with gradient).
        old_values: [B, T] float, of the critic before this update.
        returns: [B, T] float, the targets.
        mask: [B, T] bool, True = a response token.
        clip: > 0, in units of the normalised score; ``math.inf`` is the plain squared error.
        denominator: response tokens of the whole minibatch (all microbatches, all ranks).

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
    free = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    with torch.no_grad():
        num_clipped = masked_sum((clipped > free).float(), mask)
    return ValueLoss(masked_sum(0.5 * torch.maximum(free, clipped), mask, denominator), num_clipped)


def _check(clip: float, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"the tensors of a loss must have one shape [B, T], got {shapes}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
