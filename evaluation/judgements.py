"""Verdicts of judges on two models' responses: what each comes to, whether the order decided, and whether judges agree.

Letters: N prompts, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation.compare import BOOTSTRAP_SEED, NUM_RESAMPLES, WinTieLose, win_tie_lose
from evaluation.groups import Estimate, share

Choice = Literal["a", "tie", "b"]
"""What a judge says is better, whatever stood first."""
CHOICES: tuple[Choice, ...] = ("a", "tie", "b")
VALUE: dict[Choice, int] = {"a": 1, "tie": 0, "b": -1}


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one prompt.

    Args:
        a_first: with A's response shown first; None = no verdict, or not asked in this order.
        b_first: likewise with B's first.
        orders: how many orders the judge is asked in: 2, or 1 for a person.
        why: there is no verdict, for a reader; "" where there is one.

    Raises:
        ValueError: if there are verdicts of more orders than it is asked in.
    """

    a_first: Choice | None
    b_first: Choice | None
    orders: int = 2
    why: str = ""

    def __post_init__(self) -> None:
        if self.orders not in (1, 2) or len(self.given) > self.orders:
            raise ValueError(f"a judge is asked in one order or in two, got {self.orders} with {len(self.given)} verdicts")

    @property
    def given(self) -> tuple[Choice, ...]:
        """The verdicts there are."""
        return tuple(choice for choice in (self.a_first, self.b_first) if choice is not None)

    @property
    def choice(self) -> Choice | None:
        """What they come to: a model wins if it is better in every order that is asked; None if one of these has no verdict."""
        if len(self.given) < self.orders:
            return None
        return self.given[0] if len(set(self.given)) == 1 else "tie"


@dataclass(frozen=True)
class OrderEffect:
    """Whether what is shown first is preferred.

    Args:
        num: N, prompts with a verdict.
        consistent: share of them on which both orders say the same; None for a judge that is asked in one order.
        bias: mean over prompts of [first preferred] - [second preferred], in [-1, 1], with its 95% interval; 0 = no effect.
    """

    num: int
    consistent: float | None
    bias: Estimate


@dataclass(frozen=True)
class Agreement:
    """How far two judges say the same.

    Args:
        num: N, prompts on which both have a verdict.
        same: share of them on which it is the same, ties being one verdict, with Wilson's 95% interval.
        kappa: Cohen's kappa with its 95% bootstrap interval; None where both judges always say one and the same thing.
        opposed: share on which one says A and the other B.
    """

    num: int
    same: Estimate
    kappa: Estimate | None
    opposed: float


@dataclass(frozen=True)
class LengthEffect:
    """Whether the longer response is preferred.

    Args:
        num: prompts on which one model won and the responses differ in length.
        longer: share of them on which the longer one won, with Wilson's 95% interval; None where there are none.
    """

    num: int
    longer: Estimate | None


def outcome(verdicts: Sequence[Verdict]) -> WinTieLose | None:
    """Wins, ties and losses of A over the prompts that have a verdict.

    Source: a win needs both orders, Zheng et al. 2023 (arXiv:2306.05685), section 3.4; interval as ``win_tie_lose``.

    Args:
        verdicts: [N] of one judge.

    Returns:
        The outcome; None if no prompt has a verdict.

    Padding contract: prompts without a verdict change nothing.
    """
    values = [VALUE[v.choice] for v in verdicts if v.choice is not None]
    return win_tie_lose(values, [0.0] * len(values), tie=0.0) if values else None


def order_effect(verdicts: Sequence[Verdict]) -> OrderEffect | None:
    """Whether a judge prefers what it is shown first.

        bias = mean over prompts of the mean over its orders of [first preferred] - [second preferred]

    A judge that keeps its mind cancels itself out; for one order, the order must have been drawn at random.

    Source: position bias as in Zheng et al. 2023 (arXiv:2306.05685), section 3.3; percentile bootstrap over prompts.

    Args:
        verdicts: [N] of one judge.

    Returns:
        The effect; None if no prompt has a verdict.

    Padding contract: prompts without a verdict change nothing.
    """
    given = [v for v in verdicts if v.choice is not None]
    if not given:
        return None
    per_prompt = [
        ((0 if v.a_first is None else VALUE[v.a_first]) - (0 if v.b_first is None else VALUE[v.b_first])) / v.orders
        for v in given
    ]
    both = [v for v in given if v.orders == 2]
    consistent = sum(v.a_first == v.b_first for v in both) / len(both) if both else None
    return OrderEffect(len(given), consistent, bootstrap_mean(per_prompt))


def agreement(one: Sequence[Verdict], other: Sequence[Verdict]) -> Agreement | None:
    """How far two judges say the same of the same prompts.

        kappa = (p_o - p_e) / (1 - p_e)

    with p_o the share of equal verdicts and p_e what it would be by chance, from how often each judge says what.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".

    Args:
        one: [N] of one judge.
        other: [N] of the other, of the same prompts.

    Returns:
        The agreement; None if there is no prompt on which both have a verdict.

    Raises:
        ValueError: if they are of different numbers of prompts.

    Padding contract: prompts without a verdict of either change nothing.
    """
    pairs = [(a.choice, b.choice) for a, b in zip(one, other, strict=True)]
    both = [(CHOICES.index(a), CHOICES.index(b)) for a, b in pairs if a is not None and b is not None]
    if not both:
        return None
    table = np.zeros((3, 3))  # [one says, other says]
    for a, b in both:
        table[a, b] += 1
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(len(both), table.reshape(-1) / len(both), size=NUM_RESAMPLES)
    kappas = cohen_kappa(drawn.reshape(-1, 3, 3).astype(np.float64))  # [R]
    kappa = float(cohen_kappa(table[None])[0])
    known = kappas[~np.isnan(kappas)]
    return Agreement(
        num=len(both),
        same=share(float(np.trace(table)), len(both)),
        kappa=None if np.isnan(kappa) else _interval(kappa, known),
        opposed=float(table[0, 2] + table[2, 0]) / len(both),
    )


def cohen_kappa(
    tables: "np.ndarray[tuple[int, int, int], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Cohen's kappa of many tables at once.

    Source: as ``agreement``.

    Args:
        tables: [R, C, C] counts, one judge's verdicts by the other's.

    Returns:
        [R] float64, NaN where chance alone gives agreement 1: both judges always say the same one thing.

    Padding contract: there is none.
    """
    total = tables.sum((1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    chance = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
    found = np.full(len(tables), np.nan)
    np.divide(observed - chance, 1 - chance, out=found, where=chance < 1)
    return found


def length_effect(verdicts: Sequence[Verdict], lengths: Sequence[tuple[int, int]]) -> LengthEffect:
    """How often the longer response wins; one half if length plays no part, and if better answers are not longer ones.

    Source: length bias of judges, Dubois et al. 2024 (arXiv:2404.04475).

    Args:
        verdicts: [N] of one judge.
        lengths: [N] of A's and B's response, in one unit.

    Returns:
        The effect.

    Raises:
        ValueError: if they differ in number.

    Padding contract: prompts without a winner, or with equal lengths, change nothing.
    """
    decided = [
        (v.choice == "a") == (a > b) for v, (a, b) in zip(verdicts, lengths, strict=True) if v.choice in ("a", "b") and a != b
    ]
    return LengthEffect(len(decided), share(sum(decided), len(decided)) if decided else None)


def bootstrap_mean(values: Sequence[float]) -> Estimate:
    """A mean with the 95% interval of the percentile bootstrap.

    Source: Efron and Tibshirani 1993, section 13.3. Resamples are drawn as counts of the distinct values.

    Args:
        values: [N] finite, at least one; few distinct ones.

    Returns:
        The mean; the same values give the same interval, always.

    Raises:
        ValueError: if there are none.

    Padding contract: there is none.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value, got none")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(len(values), counts / len(values), size=NUM_RESAMPLES)
    return _interval(float(np.mean(values)), drawn @ distinct / len(values))


def _interval(value: float, resampled: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (value, value)
    return Estimate(value, min(float(low), value), max(float(high), value))
