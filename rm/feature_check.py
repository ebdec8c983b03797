"""How well reward features serve raters, those that they were trained on and new ones: accuracy on held-out pairs.

Letters: n answers, d reward features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rm.feature_fit import Judged
from rm.features import FeatureModel, scores
from rm.person import fit_person

FOLDS = 10
"""Of cross-validation; with fewer answers, one answer at a time is left out."""
FEWEST_TO_VALIDATE = 5
"""Answers below which nothing is said of how well a person's weights predict."""


@dataclass(frozen=True)
class RaterAccuracy:
    """One rater's held-out pairs.

    Args:
        rater: by name.
        num_labels: answers that the weights were fitted to.
        num_tests: held-out pairs.
        accuracy: share of them ranked as the rater did; a tie counts one half.
        mean_accuracy: the same of the mean rater's weights, which know nothing of this one.
    """

    rater: str
    num_labels: int
    num_tests: int
    accuracy: float
    mean_accuracy: float


def ranked_right(rewards: Tensor) -> float:
    """Share of differences of rewards above 0, preferred response minus other; a tie counts one half.

    Args:
        rewards: [n] float, n >= 1.

    Returns:
        In [0, 1].
    """
    return float((0.5 * (1 + rewards.sign())).mean())


def trained_raters(model: FeatureModel, seen: Judged, tests: Judged, batch_size: int, pad_id: int) -> list[RaterAccuracy]:
    """Accuracy of each training rater's own weights.

    Args:
        model: trained.
        seen: what it was trained on.
        tests: held-out pairs of the same raters.
        batch_size: sequences per forward pass.
        pad_id: id written at padding.

    Returns:
        One for each rater with a held-out pair.
    """
    counts = np.bincount(seen.raters, minlength=len(model.raters))
    differences = model.differences(tests.pairs, batch_size, pad_id)
    rewards = (differences * model.weights.detach().cpu()[list(tests.raters)]).sum(-1)
    by_mean, index = scores(differences, model.mean_weights), torch.tensor(tests.raters)
    found = []
    for place in sorted(set(tests.raters)):
        own = index == place
        right, mean = ranked_right(rewards[own]), ranked_right(by_mean[own])
        found.append(RaterAccuracy(model.raters[place], int(counts[place]), int(own.sum()), right, mean))
    return found


def new_rater(
    rater: str, answers: Tensor, tests: Tensor, counts: Sequence[int], l2: float, towards: Tensor | None, mean: Tensor
) -> list[RaterAccuracy]:
    """Accuracy of a new rater's weights after so many answers.

    Args:
        rater: by name.
        answers: [n, d] float, differences of the features of their answers, in the order in which they were given.
        tests: [t, d] float, of their held-out pairs; t >= 1.
        counts: how many answers; those beyond n are left out.
        l2: see ``rm.person``.
        towards: [d] float, likewise; with 0 answers and None, nothing is known and accuracy is one half.
        mean: [d] float, the mean rater's weights.

    Returns:
        One for each count.
    """
    by_mean = ranked_right(scores(tests, mean))
    rights = [
        (count, ranked_right(fit_person(answers[:count], l2, towards).scores(tests))) for count in counts if count <= len(answers)
    ]
    return [RaterAccuracy(rater, count, len(tests), right, by_mean) for count, right in rights]


def cross_validated(differences: Tensor, l2: float, towards: Tensor | None) -> float | None:
    """Share of answers that weights fitted to the others predict.

    Args:
        differences: [n, d] float, of the answers.
        l2: see ``rm.person``.
        towards: likewise.

    Returns:
        The share; None where there are fewer than ``FEWEST_TO_VALIDATE`` answers.
    """
    n = len(differences)
    if n < FEWEST_TO_VALIDATE:
        return None
    held = torch.zeros(n, dtype=torch.float64)
    folds = torch.arange(n) % min(FOLDS, n)
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        held[out] = fit_person(differences[~out], l2, towards).scores(differences[out])
    return ranked_right(held)
