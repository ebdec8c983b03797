"""Where the learning of reward features begins: at random, or at the singular vectors of who preferred what.

Letters: N labels, P distinct pairs, m raters, H hidden size, d reward features.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rm.batches import Encoded
from rm.feature_fit import Judged, pair_key
from rm.features import FeatureModel
from rm.features_config import FeaturesConfig
from rm.heads import feature_differences, fresh_heads
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.records import Pair

IMPUTATIONS = 10
"""Times that missing labels are filled in by the decomposition of what was filled in before."""
RIDGE = 1e-2
"""Of the projection that the singular vectors are regressed on, times the mean square of a hidden feature."""
WEIGHTS_SEED_OFFSET = 32_452_843
"""Keeps the generator of raters' weights apart from those of the projection's rows."""


def start_features(
    backbone: RewardModel,
    raters: Sequence[str],
    judged: Judged,
    features: FeaturesConfig,
    seed: int,
    batch_size: int,
    pad_id: int,
) -> FeatureModel:
    """A feature model to be trained.

    Random: rows of P as a reward model's fresh head; w_h = (c + z_h) / sqrt(d) with one c for all raters and z_h of each, all
    N(0, I), so that raters begin half alike. Shared: one feature, every weight 1: an ordinary reward model.

    Args:
        backbone: on its device.
        raters: m names.
        judged: labels, that ``init`` svd goes by.
        features: d, shared, init.
        seed: of all draws.
        batch_size: sequences per forward pass.
        pad_id: id written at padding.

    Returns:
        The model, on the backbone's device.

    Raises:
        UserError: for ``init`` svd, if hardly a pair was judged by more than one rater, or d is larger than the matrix.
    """
    d, hidden = features.d, backbone.head.in_features
    device = backbone.head.weight.device
    if features.shared or features.init == "random":
        projection = fresh_heads(d, hidden, [seed + row for row in range(d)])
        generator = torch.Generator().manual_seed(seed + WEIGHTS_SEED_OFFSET)
        common, own = torch.randn(d, generator=generator), torch.randn(len(raters), d, generator=generator)
        weights = torch.ones(len(raters), 1) if features.shared else (common + own) / math.sqrt(d)
    else:
        pairs, matrix, known = label_matrix(judged, len(raters))
        left, weights = decompose(matrix, known, d)
        projection = _regress(feature_differences(backbone, pairs, batch_size, pad_id).double(), left)
    adaptation = (features.shared, features.l2, features.towards)
    return FeatureModel(backbone, projection.float(), raters, weights.float(), *adaptation).to(device)


def label_matrix(judged: Judged, num_raters: int) -> tuple[list[Pair], Tensor, Tensor]:
    """Who preferred what, as a matrix.

    Args:
        judged: N labels.
        num_raters: m.

    Returns:
        P distinct pairs, each as its first rater ordered it; [P, m] float64, 1 where a rater prefers the pair's ``chosen``, -1
        the other, 0 where they did not judge it, between where they contradict themselves; [P, m] bool, where they judged.
    """
    place: dict[frozenset[Encoded], int] = {}
    pairs: list[Pair] = []
    sums: dict[tuple[int, int], float] = defaultdict(float)
    counts: Counter[tuple[int, int]] = Counter()
    for pair, rater in zip(judged.pairs, judged.raters, strict=True):
        row = place.setdefault(pair_key(pair), len(pairs))
        if row == len(pairs):
            pairs.append(pair)
        cell = (row, rater)
        sums[cell] += 1.0 if pair.chosen_ids == pairs[row].chosen_ids else -1.0
        counts[cell] += 1
    matrix = torch.zeros(len(pairs), num_raters, dtype=torch.float64)
    for (row, rater), value in sums.items():
        matrix[row, rater] = value / counts[row, rater]
    known = torch.zeros(len(pairs), num_raters, dtype=torch.bool)
    known[tuple(torch.tensor(list(sums)).T)] = True
    return pairs, matrix, known


def decompose(matrix: Tensor, known: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Matrix ~ left right^T of rank d, what is missing filled in by the decomposition before, ``IMPUTATIONS`` times.

    U S V^T = svd(filled);  left = U_d S_d^1/2,  right = V_d S_d^1/2

    Source: iterated imputation by a truncated singular value decomposition (Mazumder, Hastie and Tibshirani 2010), with a rank
    instead of a threshold; missing labels begin as undecided.

    Args:
        matrix: [P, m] float64, labels in [-1, 1], 0 where there is none.
        known: [P, m] bool, where there is one.
        d: rank.

    Returns:
        [P, d] and [m, d] float64.

    Raises:
        UserError: if no pair was judged twice, or d is larger than the matrix.
    """
    per_pair = float(known.sum() / max(1, len(known)))
    if d > min(matrix.shape):
        raise UserError(
            f"features.init svd decomposes a matrix of {matrix.shape[0]} pairs and {matrix.shape[1]} raters: features.d is {d}, "
            "expected at most the smaller of the two. Lower features.d, or set features.init to random"
        )
    if int(known.sum(1).max()) < 2:
        raise UserError(
            f"features.init svd needs pairs that several raters judged, got {per_pair:.2f} raters a pair and none with two: "
            "the matrix says nothing of who is like whom. Set features.init to random"
        )
    filled = matrix.clone()
    for _ in range(IMPUTATIONS + 1):
        u, s, v = torch.linalg.svd(filled, full_matrices=False)
        left, right = u[:, :d] * s[:d].sqrt(), v[:d].T * s[:d].sqrt()
        filled = torch.where(known, matrix, left @ right.T)
    return left, right


def _regress(differences: Tensor, targets: Tensor) -> Tensor:
    """[d, H]: P that makes P D nearest to the targets, by ridge regression."""
    gram = differences.T @ differences
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(gram + ridge, differences.T @ targets)
    return solved.T
