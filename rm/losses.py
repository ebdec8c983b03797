"""Losses over the scores of a reward model, and how well its probabilities are calibrated.

Letters: N pairs, m prompts, k responses per prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, denominator: Tensor | float) -> Tensor:
    """Negative log-likelihood of the preferences under Bradley-Terry.

    L = -sum_i log sigma(c_i - r_i) / denominator

    Source: Secrets of RLHF Part II, Eq 2, again as Eq 10 (Eq 1's printed denominator is a slip; p = sigma(c - r)). Computed with
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


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, smoothing: Tensor, denominator: Tensor | float) -> Tensor:
    """Negative log-likelihood of preferences whose labels may be wrong (smoothing) or say by how much (margin).

    x_i = c_i - r_i - mu_i;  L = -sum_i [(1 - a_i) log sigma(x_i) + a_i log sigma(-x_i)] / denominator

    With mu = a = 0 this is ``bradley_terry_loss``, bit for bit. A pair's loss is least at c - r = mu + log((1 - a) / a), so
    that a smoothed pair stops asking for more there; where x = 0 it is log 2 for every a. A negative margin relaxes its pair.

    Source: Secrets of RLHF Part II, Eq 2; Eq 5 (label smoothing); Eq 6 (adaptive margin). Eq 6 prints mu outside of log sigma,
    where it has no gradient; it stands inside here, as in the work that the paper takes it from (Llama 2, its Eq 2). With both,
    p = sigma(c - r - mu) in both of Eq 5's terms.

    Args:
        chosen: [N] float, scores of the preferred responses.
        rejected: [N] float, scores of the others.
        margin: [N] float, mu: by how much the preferred response should lead; units of the scores, any sign.
        smoothing: [N] float, a: probability that the label is wrong; in [0, 1].
        denominator: pairs that the caller averages over: N, or the count over all microbatches and ranks.

    Returns:
        A scalar of the scores' dtype, nats per pair.

    Raises:
        ValueError: if the four are not all [N] with N >= 1, a margin is not finite, or a smoothing not in [0, 1].

    Padding contract: sees scores only.
    """
    _check_pairs(chosen, rejected)
    if margin.shape != chosen.shape or smoothing.shape != chosen.shape:
        raise ValueError(
            f"need a margin and a smoothing for each of {len(chosen)} pairs, got {tuple(margin.shape)}, {tuple(smoothing.shape)}"
        )
    if not bool(torch.isfinite(margin).all()):
        raise ValueError(f"the margin of pair {int((~torch.isfinite(margin)).nonzero()[0])} of the batch is not finite")
    if not bool(((smoothing >= 0) & (smoothing <= 1)).all()):
        raise ValueError(f"label smoothing must lie in [0, 1], got {smoothing.tolist()}")
    ahead = chosen - rejected - margin
    likelihood = (1 - smoothing) * functional.logsigmoid(ahead) + smoothing * functional.logsigmoid(-ahead)
    return -likelihood.sum() / denominator


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


@dataclass(frozen=True)
class Calibration:
    """How far a reward model's probabilities can be believed.

    Args:
        expected_error: expected calibration error, in [0, 1]; 0 = of pairs judged with p, a share p is judged rightly.
        brier: mean squared error of sigma(c - r) against the label, in [0, 1]; 0.25 for a model that always says one half.
    """

    expected_error: float
    brier: float


def calibration_error(chosen: Tensor, rejected: Tensor, num_bins: int) -> Calibration:
    """Whether a pair that is judged with probability p is judged rightly with probability p.

    p_i = sigma(|c_i - r_i|), how sure the model is of the response that it prefers; right_i = 1 if that is the chosen one,
    one half at a tie. Pairs fall into bins of equal width over [1/2, 1]:
    ECE = sum_b (N_b / N) |mean_b right - mean_b p|;  Brier = mean_i (1 - sigma(c_i - r_i))^2

    Which of the two responses is called the first does not matter: the error over [0, 1], with every pair taken in both orders,
    is the same.

    Source: Guo et al. 2017, "On calibration of modern neural networks", Eq 3; Brier 1950.

    Args:
        chosen: [N] float, scores of the responses preferred by the labels.
        rejected: [N] float, scores of the others.
        num_bins: bins over [1/2, 1], >= 1.

    Returns:
        Both errors.

    Raises:
        ValueError: if the two are not both [N] with N >= 1, a score is not finite, or there is no bin.

    Padding contract: sees scores only.
    """
    _check_pairs(chosen, rejected)
    if num_bins < 1:
        raise ValueError(f"calibration needs at least 1 bin, got {num_bins}")
    ahead = (chosen - rejected).detach().double()
    if not bool(torch.isfinite(ahead).all()):
        raise ValueError(f"the scores of pair {int((~torch.isfinite(ahead)).nonzero()[0])} are not finite")
    sure = torch.sigmoid(ahead.abs())  # [N], in [1/2, 1]
    right = 0.5 * (1 + ahead.sign())
    which = ((sure - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    excess = torch.zeros(num_bins, dtype=torch.double, device=ahead.device).index_add(0, which, right - sure)
    return Calibration(float(excess.abs().sum()) / len(ahead), float((1 - torch.sigmoid(ahead)).square().mean()))


def _check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.dim() != 1 or chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(f"need chosen and rejected [N] with N >= 1, got {tuple(chosen.shape)} and {tuple(rejected.shape)}")
