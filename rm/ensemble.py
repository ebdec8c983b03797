"""Scores of several reward models made into one.

Letters: B sequences, M members, C sequences of the calibration set.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from rm.config import Aggregate
from tokens.guards import FINITE, BadNumber

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Where one member's scores lie on a calibration set (samples of the SFT policy), so that members share a unit.

    Args:
        mean: of its scores.
        std: of its scores, population; > 0.

    Raises:
        ValueError: if either is not finite, or the scores do not vary.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"moments need a finite mean and a std above 0, got mean {self.mean} and std {self.std}")

    @classmethod
    def of(cls, scores: Tensor) -> Moments:
        """Mean and population std of one member's scores.

        Args:
            scores: [C] float, C >= 2.

        Returns:
            The moments.

        Raises:
            ValueError: if there are fewer than two scores, one is not finite, or all are equal.
        """
        if scores.dim() != 1 or scores.numel() < 2:
            raise ValueError(f"moments need scores [C] with C >= 2, got {tuple(scores.shape)}")
        wide = scores.double()
        return cls(float(wide.mean()), float(wide.std(correction=0)))


def finite_members(scores: Tensor, min_members: int | None, bad_scores: float, rule: Aggregate) -> tuple[int, ...]:
    """Members that have a say in a batch. A few scores that are not finite do not count, each in its sample alone.

    Beyond ``bad_scores`` that would hide a broken model: then a member with such scores is left out of the whole batch where
    ``min_members`` allows it, so that every row is aggregated over the same members, and else it is an error. Member 0 (the
    round's own reward model) is never left out. Whatever is left out is logged as a warning.

    Args:
        scores: [B, M] float.
        min_members: fewest members that a score may rest on; None = all M, or a single one where its others were let go.
        bad_scores: share of the B M scores that may be let go.
        rule: of ``aggregate``; ``primary`` needs every score of member 0.

    Returns:
        Indices of the members kept, ascending; pick the scores' columns and the moments with them.

    Raises:
        BadNumber: if a score is not finite and can neither be let go nor its member be left out; names member and row.
        ValueError: if ``scores`` is not [B, M], or ``min_members`` is not in 1..M.
    """
    _check_scores(scores)
    num_rows, num_members = scores.shape
    needed = num_members if min_members is None else min_members
    if not 1 <= needed <= num_members:
        raise ValueError(f"scorer.min_members is {needed}, expected 1 to {num_members} (the number of members)")
    finite = torch.isfinite(scores)  # [B, M]
    bad = (~finite.all(0)).nonzero().flatten().tolist()
    num_bad = int((~finite).sum())
    enough = int(finite.sum(1).min()) >= (1 if min_members is None else min_members)
    if num_bad <= bad_scores * finite.numel() and enough and not (rule == "primary" and bad[:1] == [0]):
        if bad:
            log.warning("%d scores of %d are not finite and do not count (reward models %s)", num_bad, finite.numel(), bad)
        return tuple(range(num_members))
    kept = tuple(member for member in range(num_members) if member not in bad)
    if bad[0] == 0 or len(kept) < needed:
        row = int((~finite[:, bad[0]]).nonzero()[0])
        own = "; member 0 is the round's own reward model and cannot be left out" if bad[0] == 0 else ""
        raise BadNumber(
            f"the score of reward model {bad[0]} for sequence {row} of the batch",
            float(scores[row, bad[0]]),
            f"{FINITE} but for a share of {bad_scores:g} (guards.bad_scores), {num_bad} of {finite.numel()} are not; {len(kept)} "
            f"of {num_members} members are finite, {needed} are needed (scorer.min_members){own}",
            "the scorer",
        )
    log.warning("reward models %s left out of %d sequences: scores that are not finite", bad, num_rows)
    return kept


def fill(scores: Tensor) -> Tensor:
    """Put the mean of a sample's other scores where one is not finite: every mean is then that of the others.

    Args:
        scores: [B, M] float, normalised; at least one of each row is finite.

    Returns:
        [B, M] float, finite.
    """
    finite = torch.isfinite(scores)
    means = torch.where(finite, scores, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True)
    return torch.where(finite, scores, means)


def disagreement(scores: Tensor) -> Tensor:
    """Population standard deviation over those of a sample's scores that are finite.

    Args:
        scores: [B, M] float, normalised; at least one of each row is finite.

    Returns:
        [B] float, units of the scores.
    """
    filled, num_finite = fill(scores), torch.isfinite(scores).sum(1)
    return filled.std(1, correction=0) * (scores.shape[1] / num_finite).sqrt()


def normalise(scores: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """(score - mean) / std, per member. Before taking a minimum or a spread over members, or units are mixed.

    Args:
        scores: [B, M] float.
        means: [M] float, each member's mean on the calibration set.
        stds: [M] float, its std there; > 0.

    Returns:
        [B, M], units of each member's own std.

    Raises:
        ValueError: if shapes differ, or a std is not above 0.
    """
    _check_scores(scores)
    if means.shape != scores.shape[1:] or stds.shape != scores.shape[1:]:
        raise ValueError(
            f"need a mean and a std for each of {scores.shape[1]} members, got {tuple(means.shape)}, {tuple(stds.shape)}"
        )
    if not bool((stds > 0).all()):
        raise ValueError(f"each member's std must be above 0, got {stds.tolist()}")
    return (scores - means) / stds


def aggregate(scores: Tensor, rule: Aggregate, std_coef: float) -> Tensor:
    """One score per sequence.

    primary: score of member 0; mean: mean_m; worst: min_m; mean_minus_std: mean_m - std_coef * std_m (population).

    Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization" (mean, worst-case and
    uncertainty-weighted optimisation; the last subtracts the variance there, the standard deviation here).

    Args:
        scores: [B, M] float, normalised; those that are not finite do not count, and at least one of each row is.
        rule: one of the four.
        std_coef: c >= 0 of mean_minus_std; unused by the others.

    Returns:
        [B], units of the scores.

    Raises:
        ValueError: if ``scores`` is not [B, M], a row has no score that counts, or ``std_coef`` is negative.
    """
    _check_scores(scores)
    counts = torch.isfinite(scores)
    if not bool((counts[:, 0] if rule == "primary" else counts.any(1)).all()):
        raise ValueError("a row has no finite score: choose the members with finite_members first")
    if not std_coef >= 0:
        raise ValueError(f"std_coef must be >= 0, got {std_coef}")
    match rule:
        case "primary":
            return scores[:, 0]
        case "mean":
            return fill(scores).mean(-1)
        case "worst":
            return fill(scores).amin(-1)
        case "mean_minus_std":
            return fill(scores).mean(-1) - std_coef * disagreement(scores)
        case _:
            assert_never(rule)


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"need scores [rows, M] with M >= 1, got {tuple(scores.shape)}")
