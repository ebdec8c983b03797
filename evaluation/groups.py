"""Arithmetic of groups of pairs: equal groups by a value, agreement with an interval, calibration.

Letters: N pairs, G groups, S seeds, B bins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

Z_95 = 1.959963984540054
FEWEST_SEEDS = 3
"""That an interval over seeds is made of."""
FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]
IndexArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs that a model is about equally sure of.

    Args:
        count: of the pairs.
        confidence: mean of sigma(|c - r|), in [1/2, 1].
        accuracy: share of them ranked as labelled; a tie counts one half.
    """

    count: int
    confidence: float
    accuracy: float


def equal_groups(values: FloatArray, num: int) -> list[IndexArray]:
    """Cut N values, in ascending order, into groups of equal size.

    Source: Secrets of RLHF Part II, section 2.2 (20 groups) and 2.3 (10 groups) of the training set by preference strength.

    Args:
        values: [N] float64; equal ones keep their order.
        num: G, at least 1.

    Returns:
        min(G, N) index arrays, the lowest values first. Sizes differ by one at most, the larger groups first.

    Raises:
        ValueError: if there are no values, or G is below 1.

    Padding contract: there is none.
    """
    if num < 1 or not len(values):
        raise ValueError(f"cannot cut {len(values)} values into {num} groups")
    return [part for part in np.array_split(np.argsort(values, kind="stable"), num) if len(part)]


def share(successes: float, total: int) -> Estimate:
    """A share with Wilson's 95% interval.

    centre = (p + z^2 / 2n) / (1 + z^2 / n);  half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Source: Wilson 1927, "Probable inference", J. Am. Stat. Ass. 22.

    Args:
        successes: out of ``total``; halves count for ties.
        total: n, at least 1.

    Returns:
        The share and its interval, which stays inside [0, 1].

    Raises:
        ValueError: if ``total`` is 0 or successes are not among it.

    Padding contract: there is none.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is no share")
    p, z2 = successes / total, Z_95 * Z_95
    scale = 1 + z2 / total
    centre = (p + z2 / (2 * total)) / scale
    half = Z_95 * float(np.sqrt(p * (1 - p) / total + z2 / (4 * total * total))) / scale
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))  # rounding must not leave p outside


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's 95% interval.

    mean +- t(0.975; S - 1) s / sqrt(S), s with S - 1

    Source: Student 1908. With one seed there is no interval, with two its half width is 12.7 standard errors and says nothing.

    Args:
        values: [S] float, at least one.

    Returns:
        The mean and its interval, of width 0 with fewer than 3 seeds.

    Raises:
        ValueError: if there are none.

    Padding contract: there is none.
    """
    if not values:
        raise ValueError("no seed to average over")
    mean = float(np.mean(values))
    if len(values) < FEWEST_SEEDS:
        return Estimate(mean, mean, mean)
    half = float(_t_95(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


class Seeded(Protocol):
    """What came of a fit with some seed."""

    @property
    def seed(self) -> int:
        """Of the fit."""
        ...


def how_many_seeds(rows: Iterable[Seeded]) -> str:
    """Words on the number of seeds and the interval, for captions.

    Source: none needed.

    Args:
        rows: of fits.

    Returns:
        A part of a sentence.

    Padding contract: there is none.
    """
    num = len({row.seed for row in rows})
    if num >= FEWEST_SEEDS:
        return f"{num} seeds, 95% intervals"
    return f"{num} seed{'s' if num > 1 else ''}, too few for an interval"


@lru_cache
def _t_95(degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def calibration_bins(difference: FloatArray, num: int) -> list[CalibrationBin]:
    """Bins of equal width over the confidence of a reward model in the response that it prefers.

    p_i = sigma(|c_i - r_i|) in [1/2, 1];  right_i = 1, 1/2 or 0 as c_i - r_i is positive, 0 or negative

    Source: Guo et al. 2017 (arXiv 1706.04599), section 2, reliability diagrams.

    Args:
        difference: [N] float64, c - r.
        num: B, at least 1.

    Returns:
        The bins that hold a pair, by rising confidence.

    Raises:
        ValueError: if there are no pairs, or B is below 1.

    Padding contract: there is none.
    """
    if num < 1 or not len(difference):
        raise ValueError(f"cannot put {len(difference)} pairs into {num} bins")
    from scipy.special import expit

    sure, right = expit(np.abs(difference)), 0.5 * (1 + np.sign(difference))
    which = np.minimum(((sure - 0.5) * 2 * num).astype(np.int64), num - 1)
    return [
        CalibrationBin(int(inside.sum()), float(sure[inside].mean()), float(right[inside].mean()))
        for inside in (which == number for number in range(num))
        if inside.any()
    ]
