"""Sums and means over the positions that count.

The denominator is an argument, so that a batch cut into microbatches or spread over ranks gives the same loss.
Padding contract of all three: a position outside ``mask`` is never read, not even as 0 * NaN.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, denominator: Tensor | float = 1.0) -> Tensor:
    """Sum of ``x`` where ``mask``, divided by ``denominator``.

    Args:
        x: any shape, float.
        mask: same shape, bool, True = counts.
        denominator: the *global* count that the caller averages over (all microbatches, all ranks).

    Returns:
        A scalar.
    """
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum() / denominator


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``.

    Args:
        x: any shape, float.
        mask: same shape, bool, True = counts.

    Returns:
        A scalar.

    Raises:
        ValueError: if nothing counts.
    """
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_mean: no position counts")
    return masked_sum(x, mask, count)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale ``x`` to mean 0 and (population) variance 1 over the positions that count.

    Args:
        x: any shape, float.
        mask: same shape, bool, True = counts.
        eps: added to the variance.

    Returns:
        Same shape; 0 outside ``mask``.

    Raises:
        ValueError: if nothing counts.
    """
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, torch.zeros((), dtype=x.dtype, device=x.device))
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + eps)
