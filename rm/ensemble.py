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

log = logging.getLogger(__name__)


class NonFiniteScoreError(FloatingPointError):
    """A member scored a sequence with NaN or infinity.

    Args:
        member: index of the member.
        row: index of the first such sequence in the batch.
        value: the score.
        reason: why the member was not left out.
    """

    def __init__(self, member: int, row: int, value: float, reason: str) -> None:
        super().__init__(member, row, value, reason)
        self.member = member
        self.row = row

    def __str__(self) -> str:
        member, row, value, reason = self.args
        return f"reward model {member} scores sequence {row} of the batch with {value}; {reason}"


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


def finite_members(scores: Tensor, min_members: int | None) -> tuple[int, ...]:
    """Members all of whose scores are finite; anything less is an error unless the config allows it.

    A member with one bad score is left out of the whole batch, so that every row is aggregated over the same members.
    Member 0 (the round's own reward model) is never left out. Leaving one out is logged as a warning.

    Args:
        scores: [B, M] float.
        min_members: fewest members that a score may rest on; None = all M.

    Returns:
        Indices of the members kept, ascending; pick the scores' columns and the moments with them.

    Raises:
        NonFiniteScoreError: if a score is not finite and its member may not be left out; names member and row.
        ValueError: if ``scores`` is not [B, M], or ``min_members`` is not in 1..M.
    """
    _check_scores(scores)
    num_members = scores.shape[1]
    needed = num_members if min_members is None else min_members
    if not 1 <= needed <= num_members:
        raise ValueError(f"scorer.min_members is {needed}, expected 1 to {num_members} (the number of members)")
    finite = torch.isfinite(scores)  # [B, M]
    bad = [member for member in range(num_members) if not bool(finite[:, member].all())]
    kept = tuple(member for member in range(num_members) if member not in bad)
    if bad and (bad[0] == 0 or len(kept) < needed):
        row = int((~finite[:, bad[0]]).nonzero()[0])
        reason = (
            "member 0 is the round's own reward model and cannot be left out"
            if bad[0] == 0
            else f"{len(kept)} of {num_members} members are finite, {needed} are needed (scorer.min_members)"
        )
        raise NonFiniteScoreError(bad[0], row, float(scores[row, bad[0]]), reason)
    if bad:
        log.warning("reward models %s left out of %d sequences: scores that are not finite", bad, scores.shape[0])
    return kept


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
        scores: [B, M] float, finite, normalised.
        rule: one of the four.
        std_coef: c >= 0 of mean_minus_std; unused by the others.

    Returns:
        [B], units of the scores.

    Raises:
        ValueError: if ``scores`` is not [B, M] or not finite, or ``std_coef`` is negative.
    """
    _check_scores(scores)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("a score is not finite: choose the members with finite_members first")
    if not std_coef >= 0:
        raise ValueError(f"std_coef must be >= 0, got {std_coef}")
    match rule:
        case "primary":
            return scores[:, 0]
        case "mean":
            return scores.mean(-1)
        case "worst":
            return scores.amin(-1)
        case "mean_minus_std":
            return scores.mean(-1) - std_coef * scores.std(-1, correction=0)
        case _:
            assert_never(rule)


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"need scores [rows, M] with M >= 1, got {tuple(scores.shape)}")
