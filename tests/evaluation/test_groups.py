import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.groups import calibration_bins, equal_groups, over_seeds, share
from evaluation.reward_figures import CALIBRATION_BINS
from rm.losses import calibration_error
from rm.validation import CALIBRATION_BINS as BINS_OF_THE_CARD


def test_equal_groups_by_hand() -> None:
    values = np.array([5.0, 1.0, 4.0, 1.0, 3.0, 2.0, 0.0])
    assert [group.tolist() for group in equal_groups(values, 3)] == [[6, 1, 3], [5, 4], [2, 0]]  # ties keep their order
    assert [group.tolist() for group in equal_groups(values[:2], 5)] == [[1], [0]]
    with pytest.raises(ValueError, match="cannot cut 0 values into 3 groups"):
        equal_groups(values[:0], 3)


@given(st.integers(1, 60), st.integers(1, 25))
def test_groups_part_the_values(num_values: int, num: int) -> None:
    values = np.random.default_rng(num_values).normal(size=num_values)
    groups = equal_groups(values, num)
    assert sorted(np.concatenate(groups)) == list(range(num_values))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert all(values[a].max() <= values[b].min() for a, b in zip(groups, groups[1:], strict=False))


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (3, 20), (481, 500)])
def test_share_equals_scipys_wilson(hits: int, total: int) -> None:
    ours, theirs = share(hits, total), stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert ours.value == hits / total
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_share_needs_something_to_share() -> None:
    with pytest.raises(ValueError, match="is no share"):
        share(0, 0)
    with pytest.raises(ValueError, match="is no share"):
        share(3, 2)


def test_over_seeds_equals_scipys_interval() -> None:
    values = [0.7, 0.72, 0.69, 0.74]
    theirs = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    ours = over_seeds(values)
    assert (ours.value, ours.low, ours.high) == pytest.approx((np.mean(values), *theirs))
    assert (over_seeds([0.7]).low, over_seeds([0.7]).high) == (0.7, 0.7)
    assert (over_seeds([0.6, 0.8]).low, over_seeds([0.6, 0.8]).high) == pytest.approx((0.7, 0.7))  # t(1) = 12.7 says nothing
    with pytest.raises(ValueError, match="no seed"):
        over_seeds([])


def test_calibration_by_hand() -> None:
    logit = lambda p: float(np.log(p / (1 - p)))  # noqa: E731
    bins = calibration_bins(np.array([logit(0.95), -logit(0.86), logit(0.52), 0.0]), 5)
    assert [(b.count, b.accuracy) for b in bins] == [(2, 0.75), (1, 0.0), (1, 1.0)]  # a tie counts one half
    assert [b.confidence for b in bins] == pytest.approx([0.51, 0.86, 0.95])
    with pytest.raises(ValueError, match="cannot put 0 pairs into 5 bins"):
        calibration_bins(np.array([]), 5)


def test_the_bins_are_those_of_the_calibration_error_in_the_card() -> None:
    assert CALIBRATION_BINS == BINS_OF_THE_CARD
    difference = np.random.default_rng(1).normal(0.8, 1.5, 300)
    theirs = calibration_error(torch.from_numpy(difference), torch.zeros(300, dtype=torch.double), CALIBRATION_BINS)
    bins = calibration_bins(difference, CALIBRATION_BINS)
    ours = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / 300
    assert ours == pytest.approx(theirs.expected_error, abs=1e-12)
