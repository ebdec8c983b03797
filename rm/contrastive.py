"""Contrastive losses between two dropout views of a reward model's features (Secrets of RLHF Part II, section 3.1).

Letters: N rows of a view, H features, K prototypes. Row i of both views is one text, under two dropout masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def contrasted(chosen: Tensor, rejected: Tensor, on: Literal["pairs", "differences"]) -> Tensor:
    """The rows that are contrasted: features of both responses, or what the preferred one has over the other.

    "pairs": f(chosen) and f(rejected), 2N rows. "differences": f(chosen) - f(rejected), N rows. The paper's set of differences
    holds each with both signs; only this sign is here. A row's own mirror image would be a negative at cosine -1 whatever the
    model does, the others' mirror images would pull against the others, and prototypes would be spent on them.

    Source: Secrets of RLHF Part II, section 3.1.1.

    Args:
        chosen: [N, H] float, features of the preferred responses.
        rejected: [N, H] float, features of the others.
        on: which of the two.

    Returns:
        [2N, H], all chosen and then all rejected, or [N, H].

    Padding contract: sees features only.
    """
    return torch.cat([chosen, rejected]) if on == "pairs" else chosen - rejected


def simcse_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """How badly a row's other view is found among all rows of the other view (InfoNCE).

    L = -mean_i log( exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau) ), j over all rows, i among them

    Lies in [0, log N + 2 / tau]; log N where all rows are alike, and exactly 0 for a single row. Permuting the rows of both views
    alike changes nothing. Not symmetric in the views.

    Source: Secrets of RLHF Part II, Eq 9 (SimCSE: Gao et al. 2021, Eq 1).

    Args:
        first: [N, H] float, view s.
        second: [N, H] float, view t.
        temperature: tau > 0.

    Returns:
        A scalar of the features' dtype, nats per row.

    Raises:
        ValueError: if the two are not both [N, H] with N >= 1, or ``temperature`` is not above 0.

    Padding contract: sees features only.
    """
    _check_views(first, second)
    _check_positive("temperature", temperature)
    similarity = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T  # [N, N], cosines
    return functional.cross_entropy(similarity / temperature, torch.arange(len(first), device=first.device))


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes: the rows handed out to prototypes according to their scores, so that every prototype gets about equally much.

    q ~ diag(u) exp(scores / epsilon) diag(v), where each iteration first makes every prototype's share N / K and then every
    row's 1. After the last one the rows sum to 1 exactly, the prototypes' shares are N / K in the limit of many iterations.
    Computed in logarithms: no score or epsilon overflows. No gradient.

    Source: Caron et al. 2020 (SwAV), Eqs 3 and 5; the q of Secrets of RLHF Part II, Eqs 7-8.

    Args:
        scores: [N, K] float, products of rows and prototypes.
        epsilon: entropy regularisation > 0; the larger, the flatter.
        iterations: >= 1.

    Returns:
        [N, K] of the scores' dtype, every row sums to 1; without gradient.

    Raises:
        ValueError: if ``scores`` is not [N, K] with N, K >= 1, or a setting is out of range.

    Padding contract: sees features only.
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"sinkhorn needs scores [N, K] with N, K >= 1, got {tuple(scores.shape)}")
    _check_positive("epsilon", epsilon)
    if iterations < 1:
        raise ValueError(f"sinkhorn needs at least 1 iteration, got {iterations}")
    q = scores.detach() / epsilon
    for _ in range(iterations):
        q = q.log_softmax(0)
        q = q.log_softmax(1)
    return q.exp()


def swav_loss(first: Tensor, second: Tensor, prototypes: Tensor, temperature: float, epsilon: float, iterations: int) -> Tensor:
    """How badly each view predicts the prototypes that the other view was handed out to (swapped prediction).

    l(h, q) = -mean_i sum_k q_ik log p_ik,  p_i = softmax(cos(h_i, c_k) / tau)
    L = l(h_t, q_s) + l(h_s, q_t),  q = sinkhorn(cos(h, c)), without gradient through q

    The sum, as both papers print it; SwAV's published code takes the mean, which is half of it. Never below the entropy of the
    codes; 2 log K where all prototypes are alike. Permuting the rows of both views alike, permuting the prototypes, or swapping
    the views changes nothing.

    Source: Secrets of RLHF Part II, Eqs 7-8 (SwAV: Caron et al. 2020, Eqs 1-2).

    Args:
        first: [N, H] float, view s.
        second: [N, H] float, view t.
        prototypes: [K, H] float, any length but 0: only their direction counts.
        temperature: tau > 0.
        epsilon: entropy regularisation of the codes, > 0.
        iterations: of Sinkhorn, >= 1.

    Returns:
        A scalar of the features' dtype, nats per row.

    Raises:
        ValueError: if shapes do not fit, or a setting is out of range.

    Padding contract: sees features only.
    """
    _check_views(first, second)
    _check_positive("temperature", temperature)
    scores = [prototype_scores(view, prototypes) for view in (first, second)]
    codes = [sinkhorn(of_view, epsilon, iterations) for of_view in scores]
    swapped = [-(q * (s / temperature).log_softmax(-1)).sum(-1).mean() for q, s in zip(codes, reversed(scores), strict=True)]
    return swapped[0] + swapped[1]


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines of rows and prototypes.

    Args:
        features: [N, H] float.
        prototypes: [K, H] float.

    Returns:
        [N, K], in [-1, 1].

    Raises:
        ValueError: if shapes do not fit.

    Padding contract: sees features only.
    """
    if prototypes.dim() != 2 or features.dim() != 2 or prototypes.shape[1] != features.shape[1]:
        raise ValueError(f"need features [N, H] and prototypes [K, H], got {tuple(features.shape)} and {tuple(prototypes.shape)}")
    return functional.normalize(features, dim=-1) @ functional.normalize(prototypes, dim=-1).T


@dataclass(frozen=True)
class PrototypeUsage:
    """Whether the rows are told apart by the prototypes.

    Args:
        effective: prototypes that the rows are told apart by: exp(H(mean_i p_i) - mean_i H(p_i)), the perplexity of the mean
            prediction over the (geometric) mean perplexity of the single ones; in [1, min(N, K)]. 1 = collapse: all rows look the
            same to the prototypes, be it that all lie at one of them, that all features are alike, or that all prototypes are.
        share: prototypes that are nearest to at least one row, of all K; in [1 / K, 1].
    """

    effective: float
    share: float


def prototype_usage(scores: Tensor, temperature: float) -> PrototypeUsage:
    """How many prototypes a batch uses. Taken from the predictions, since Sinkhorn makes the codes even by force.

    Source: the exponential of the mutual information of row and prototype under p_i = softmax(scores_i / tau).

    Args:
        scores: [N, K] float, cosines of rows and prototypes.
        temperature: tau > 0.

    Returns:
        Both numbers.

    Raises:
        ValueError: if ``scores`` is not [N, K] with N, K >= 1, or ``temperature`` is not above 0.

    Padding contract: sees features only.
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"prototype usage needs scores [N, K] with N, K >= 1, got {tuple(scores.shape)}")
    _check_positive("temperature", temperature)
    predictions = (scores.detach().double() / temperature).softmax(-1)
    information = torch.special.entr(predictions.mean(0)).sum() - torch.special.entr(predictions).sum(-1).mean()
    used = len(scores.argmax(-1).unique())
    return PrototypeUsage(effective=max(1.0, math.exp(float(information))), share=used / scores.shape[1])


def _check_views(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or first.shape != second.shape or first.numel() == 0:
        raise ValueError(f"need two views [N, H] with N, H >= 1, got {tuple(first.shape)} and {tuple(second.shape)}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
