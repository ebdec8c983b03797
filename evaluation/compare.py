"""Our responses against theirs: wins, ties, losses, and how sure one may be.

Letters: N prompts (or seeds).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
BOOTSTRAP_SEED = 20240131


@dataclass(frozen=True)
class WinTieLose:
    """The outcome of N paired comparisons.

    Args:
        num: N, the number of prompts compared.
        win: share of prompts on which ours is better, in [0, 1].
        tie: share of prompts on which neither is.
        lose: share of prompts on which theirs is better.
        margin: win - lose, in [-1, 1].
        low: lower end of the 95% interval of the margin.
        high: upper end of it.

    Raises:
        ValueError: if the shares do not sum to 1, or the margin is not inside its interval.
    """

    num: int
    win: float
    tie: float
    lose: float
    margin: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if abs(self.win + self.tie + self.lose - 1.0) > 1e-9:
            raise ValueError(f"win, tie and lose must sum to 1, got {self.win} + {self.tie} + {self.lose}")
        if not self.low <= self.margin <= self.high:
            raise ValueError(f"the margin {self.margin} lies outside its interval [{self.low}, {self.high}]")


def win_tie_lose(ours: Sequence[float], theirs: Sequence[float], tie: float) -> WinTieLose:
    """Share of prompts on which ours is better, equal or worse, with a paired bootstrap interval of win - lose.

    win  = mean over prompts of [ours - theirs > tie]
    lose = mean over prompts of [theirs - ours > tie]
    tie  = 1 - win - lose

    The interval resamples prompts, so that both judgements of a prompt stay together. The margin depends on how often a
    prompt of each outcome is drawn and on nothing else, therefore the resamples are drawn as multinomial counts.

    Source: percentile bootstrap, Efron and Tibshirani 1993, section 13.3; outcomes as in MetaRM (Dou et al. 2024), section 4.

    Args:
        ours: [N] float, the judge's value of our response to each prompt.
        theirs: [N] float, the judge's value of the other response to the same prompt.
        tie: differences up to this, it included, are ties; >= 0; in units of the judge.

    Returns:
        The outcome; the same input gives the same interval, always. When all prompts have one outcome the interval has no width:
        the bootstrap cannot imagine what it never saw.

    Raises:
        ValueError: if the two differ in number, are none, are not finite, or ``tie`` is negative or not finite.

    Padding contract: there is none; one entry is one prompt.
    """
    a = _finite("ours", ours)  # [N]
    b = _finite("theirs", theirs)  # [N]
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs as many of ours as of theirs, got {len(a)} and {len(b)}")
    if not (np.isfinite(tie) and tie >= 0):
        raise ValueError(f"tie must be finite and not negative, got {tie}")
    num = len(a)
    num_win, num_lose = int((a - b > tie).sum()), int((b - a > tie).sum())
    shares = np.array([num_win, num - num_win - num_lose, num_lose], dtype=np.float64) / num
    counts = np.random.default_rng(BOOTSTRAP_SEED).multinomial(num, shares, size=NUM_RESAMPLES)  # [resamples, 3]
    low, high = np.quantile((counts[:, 0] - counts[:, 2]) / num, [0.025, 0.975])
    margin = (num_win - num_lose) / num
    return WinTieLose(
        num=num,
        win=float(shares[0]),
        tie=float(shares[1]),
        lose=float(shares[2]),
        margin=margin,
        low=min(float(low), margin),
        high=max(float(high), margin),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values (one per seed) with its 95% t-interval.

    mean +- t(0.975, N - 1) * s / sqrt(N), s the standard deviation with N - 1 in the denominator.

    Source: Student 1908; scipy.stats.t gives the quantile.

    Args:
        values: [N] float, N >= 2.

    Returns:
        (mean, low, high), in units of the values.

    Raises:
        ValueError: if there are fewer than two values or one is not finite.

    Padding contract: there is none; one entry is one seed.
    """
    from scipy.stats import t

    x = _finite("values", values)  # [N]
    if len(x) < 2:
        raise ValueError(f"an interval over seeds needs at least two values, got {len(x)}")
    mean = float(x.mean())
    half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half


def _finite(name: str, values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name} must be a flat sequence of at least one number, got shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} of {len(x)} values are not finite, the first at {bad[0]} is {x[bad[0]]}")
    return x
