import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.compare import WinTieLose, mean_interval, win_tie_lose

NUMBERS = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=40)


def test_hand_computed_outcome() -> None:
    result = win_tie_lose([1.0, 0.5, 0.0, 2.0], [0.0, 0.45, 1.0, 1.0], tie=0.1)  # win, tie, lose, win
    assert (result.num, result.win, result.tie, result.lose, result.margin) == (4, 0.5, 0.25, 0.25, 0.25)


def test_the_tie_width_itself_is_a_tie() -> None:
    assert win_tie_lose([1.0, 0.0], [0.5, 0.5], tie=0.5).tie == 1.0
    assert win_tie_lose([1.0, 0.5], [1.0, 0.0], tie=0.0).tie == 0.5


def test_interval_equals_scipys_bootstrap_of_the_paired_outcomes() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.4, 1, 200), rng.normal(0, 1, 200)
    result = win_tie_lose(ours.tolist(), theirs.tolist(), tie=0.1)
    outcomes = np.sign(ours - theirs) * (np.abs(ours - theirs) > 0.1)
    reference = stats.bootstrap(
        (outcomes,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    assert result.low == pytest.approx(reference.low, abs=0.015)
    assert result.high == pytest.approx(reference.high, abs=0.015)
    assert result.margin == pytest.approx(outcomes.mean(), abs=1e-12)


def test_same_input_same_interval_and_more_prompts_less_width() -> None:
    ours, theirs = [1.0, 0.0, 1.0, 0.0, 1.0] * 4, [0.0, 1.0, 0.0, 0.0, 0.0] * 4
    small, again = win_tie_lose(ours, theirs, 0.1), win_tie_lose(ours, theirs, 0.1)
    large = win_tie_lose(ours * 25, theirs * 25, 0.1)
    assert small == again
    assert large.high - large.low < 0.5 * (small.high - small.low)


@given(NUMBERS)
def test_exchanging_the_sides_turns_the_outcome_round(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = win_tie_lose(ours, theirs, 0.2), win_tie_lose(theirs, ours, 0.2)
    assert (there.win, there.tie, there.lose) == (back.lose, back.tie, back.win)
    assert there.margin == -back.margin
    assert there.low <= there.margin <= there.high


@pytest.mark.parametrize(
    ("ours", "theirs", "tie", "message"),
    [
        ([], [], 0.1, "at least one number"),
        ([1.0], [1.0, 2.0], 0.1, "got 1 and 2"),
        ([1.0, math.nan], [1.0, 2.0], 0.1, "ours: 1 of 2 values are not finite, the first at 1 is nan"),
        ([1.0], [math.inf], 0.1, "theirs"),
        ([1.0], [1.0], -0.1, "tie must be"),
        ([1.0], [1.0], math.nan, "tie must be"),
    ],
)
def test_bad_input(ours: list[float], theirs: list[float], tie: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_tie_lose(ours, theirs, tie)


def test_an_impossible_outcome_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        WinTieLose(num=2, win=0.5, tie=0.0, lose=0.0, margin=0.5, low=0.5, high=0.5)
    with pytest.raises(ValueError, match="outside its interval"):
        WinTieLose(num=2, win=0.5, tie=0.0, lose=0.5, margin=0.0, low=0.1, high=0.5)


def test_mean_interval_by_hand() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653
    assert mean == 2.0
    assert (low, high) == (
        pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6),
        pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6),
    )


def test_mean_interval_equals_scipys_t_test() -> None:
    values = [0.31, 0.44, 0.29, 0.52, 0.37]
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(values)[1:] == (pytest.approx(reference.low, abs=1e-12), pytest.approx(reference.high, abs=1e-12))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
def test_mean_interval_needs_two_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least|not finite"):
        mean_interval(values)
