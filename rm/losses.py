"""Losses over the scores of a reward model.

Letters: N pairs, m prompts, k responses per prompt.
"""

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, denominator: Tensor | float) -> Tensor:
    """Negative log-likelihood of the preferences under Bradley-Terry.

    L = -sum_i log sigma(c_i - r_i) / denominator

    Source: Secrets of RLHF Part II, Eq 2 (Eq 1's printed denominator is a slip; p = sigma(c - r)). Computed with
    logsigmoid, so that a pair that is badly wrong still has gradient -1.

    Args:
        chosen: [N] float, scores of the preferred responses.
        rejected: [N] float, scores of the others.
        denominator: pairs that the caller averages over: N, or the count over all microbatches and ranks.

    Returns:
        A scalar of the scores' dtype, nats per pair.

    Raises:
        ValueError: if the two are not both [N] with N >= 1.

    Padding contract: sees scores only.
    """
    _check_pairs(chosen, rejected)
    return -functional.logsigmoid(chosen - rejected).sum() / denominator


def difference_loss(scores: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """How far apart the responses to one prompt are scored; MetaRM ascends it on the shifted samples.

    J = mean over prompts of (2 / k^2) sum_{i<j} sigma(|r_i - r_j|)

    J lies in [(k-1)/(2k), (k-1)/k), ignores a constant added to all scores of a prompt and their order, and grows with
    the scale of the scores. dJ/dr_i is largest at near-ties and exactly 0 at ties: equal responses are dead weight.

    Source: Secrets of RLHF Part II, Eq 11 (which prints no sum over prompts; the mean is taken here).

    Args:
        scores: [m, k] float, a row per prompt.
        denominator: prompts that the caller averages over; None = m.

    Returns:
        A scalar of the scores' dtype.

    Raises:
        ValueError: if ``scores`` is not [m, k] with m >= 1 and k >= 2.

    Padding contract: sees scores only.
    """
    if scores.dim() != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(f"the difference loss needs scores [m, k] with m >= 1 and k >= 2, got {tuple(scores.shape)}")
    num_prompts, k = scores.shape
    first, second = torch.triu_indices(k, k, offset=1, device=scores.device)
    gaps = (scores[:, first] - scores[:, second]).abs()  # [m, k (k-1) / 2]
    return torch.sigmoid(gaps).sum() * (2 / k**2) / (num_prompts if denominator is None else denominator)


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs whose preferred response scores higher; a tie counts one half.

    Args:
        chosen: [N] float, scores of the preferred responses.
        rejected: [N] float, scores of the others.

    Returns:
        A float32 scalar in [0, 1], without gradient.

    Raises:
        ValueError: if the two are not both [N] with N >= 1.
    """
    _check_pairs(chosen, rejected)
    margin = (chosen - rejected).detach()
    return (0.5 * (1 + margin.sign())).float().mean()


def _check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.dim() != 1 or chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(f"need chosen and rejected [N] with N >= 1, got {tuple(chosen.shape)} and {tuple(rejected.shape)}")
