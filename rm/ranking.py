"""Ranking any number of scored responses to a query.

Letters: Q queries, R responses of all queries, C comparisons (ordered pairs of one query's responses with different scores).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rm.losses import bradley_terry_loss, pair_accuracy
from tokens.queries import Query


def comparisons(queries: Sequence[Query]) -> Tensor:
    """Which of R scores, laid out query by query, should be above which.

    Args:
        queries: Q of them.

    Returns:
        [2, C] int64: rows of the better and of the worse response; ties make none, so C may be 0.
    """
    first, found = 0, []
    for query in queries:
        found += [(first + better, first + worse) for better, worse in query.comparisons]
        first += len(query.responses)
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T


def ranking_loss(scores: Tensor, compared: Tensor, denominator: Tensor | float) -> Tensor:
    """Negative log-likelihood of all comparisons of scored responses.

        L = -sum over {j, l of one query with s_j > s_l} of log sigma(r_j - r_l) / denominator

    With C as the denominator it is the mean over the comparisons of a batch; a query with more responses counts for more. For
    queries of two responses it is the Bradley-Terry loss.

    Source: Everyone Deserves A Reward (2309.03126), the ranking loss of its official code, which counts every comparison in both
    directions and divides by twice their number.

    Args:
        scores: [R] float, the model's scores of all responses, query by query.
        compared: [2, C] int64, see ``comparisons``; C >= 1.
        denominator: comparisons that the caller averages over: C, or the count over all microbatches.

    Returns:
        A scalar of the scores' dtype, nats per comparison.

    Raises:
        ValueError: if there is nothing to compare.

    Padding contract: sees scores only.
    """
    better, worse = _sides(scores, compared)
    return bradley_terry_loss(better, worse, denominator)


def ranking_accuracy(scores: Tensor, compared: Tensor) -> Tensor:
    """Share of the comparisons in which the better response scores higher; a tie of the model's counts one half.

    Args:
        scores: [R] float.
        compared: [2, C] int64, C >= 1.

    Returns:
        A float32 scalar in [0, 1], without gradient.

    Raises:
        ValueError: if there is nothing to compare.
    """
    return pair_accuracy(*_sides(scores, compared))


def _sides(scores: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    if compared.dim() != 2 or len(compared) != 2 or compared.shape[1] == 0:
        raise ValueError(f"ranking needs comparisons [2, C] with C >= 1, got {tuple(compared.shape)}: all scores are tied")
    index = compared.to(scores.device)
    return scores[index[0]], scores[index[1]]
