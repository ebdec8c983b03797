"""The ensemble's arithmetic by hand, against numpy, and on scores that are not finite."""

import logging
import math

import numpy as np
import pytest
import torch

from rm.config import Aggregate
from rm.ensemble import Moments, aggregate, disagreement, fill, finite_members, normalise
from tokens.guards import BadNumber

SCORES = torch.tensor([[1.0, 3.0, 5.0], [0.0, -3.0, 0.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("primary", [1.0, 0.0]),
        ("mean", [3.0, -1.0]),
        ("worst", [1.0, -3.0]),
        ("mean_minus_std", [3.0 - 0.5 * math.sqrt(8 / 3), -1.0 - 0.5 * math.sqrt(2)]),  # population std
    ],
)
def test_aggregate_by_hand(rule: Aggregate, expected: list[float]) -> None:
    assert aggregate(SCORES, rule, 0.5).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", ["primary", "mean", "worst", "mean_minus_std"])
def test_an_ensemble_of_one_is_its_member(rule: Aggregate) -> None:
    scores = torch.randn(5, 1)
    torch.testing.assert_close(aggregate(scores, rule, 2.0), scores[:, 0])


def test_aggregate_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="std_coef"):
        aggregate(SCORES, "mean_minus_std", -1.0)
    with pytest.raises(ValueError, match="finite_members"):
        aggregate(torch.tensor([[math.nan, math.nan]]), "worst", 0.0)
    with pytest.raises(ValueError, match="M >= 1"):
        aggregate(torch.zeros(3), "mean", 0.0)


def test_normalise_gives_each_member_mean_0_and_std_1() -> None:
    scores = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 5.0, -2.0])
    moments = [Moments.of(scores[:, member]) for member in range(3)]
    means, stds = (torch.tensor(x, dtype=torch.float64) for x in ([m.mean for m in moments], [m.std for m in moments]))
    np.testing.assert_allclose(stds, np.std(scores.numpy(), axis=0, ddof=0), rtol=1e-12)
    normal = normalise(scores, means, stds).numpy()
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(normal.std(0, ddof=0), 1, rtol=1e-12)


def test_normalise_by_hand_and_bad_input() -> None:
    got = normalise(torch.tensor([[3.0, 0.0]]), torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.5]))
    assert got.tolist() == [[0.5, 2.0]]
    with pytest.raises(ValueError, match="each of 3 members"):
        normalise(SCORES, torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="above 0"):
        normalise(SCORES, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0], [1.0, math.nan], [1.0, math.inf]])
def test_moments_refuse_scores_without_spread(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="moments need"):
        Moments.of(torch.tensor(scores))


def test_all_members_stay_when_all_scores_are_finite() -> None:
    assert finite_members(SCORES, None, 0.0, "mean") == (0, 1, 2)
    assert finite_members(SCORES, 1, 0.0, "primary") == (0, 1, 2)
    assert torch.equal(fill(SCORES), SCORES)
    assert torch.equal(disagreement(SCORES), SCORES.std(1, correction=0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_few_bad_scores_do_not_count_in_their_samples(value: float, caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.tensor([[1.0, 3.0, 5.0], [value, -3.0, 1.0], [2.0, 2.0, 8.0]])
    with caplog.at_level(logging.WARNING):
        assert finite_members(scores, None, 0.2, "mean") == (0, 1, 2)  # 1 of 9
    assert "1 scores of 9 are not finite and do not count (reward models [0])" in caplog.text
    assert fill(scores).tolist() == [[1.0, 3.0, 5.0], [-1.0, -3.0, 1.0], [2.0, 2.0, 8.0]]
    rest = torch.tensor([[-3.0, 1.0]])
    for rule in ("mean", "worst", "mean_minus_std"):
        assert aggregate(scores, rule, 0.5)[1].item() == pytest.approx(aggregate(rest, rule, 0.5).item(), abs=1e-6)  # type: ignore[arg-type]
        others = aggregate(scores[[0, 2]], rule, 0.5)  # type: ignore[arg-type]
        assert torch.equal(aggregate(scores, rule, 0.5)[[0, 2]], others)  # type: ignore[arg-type]
    assert disagreement(scores)[1].item() == pytest.approx(2.0)
    for min_members, share, rule in ((None, 0.1, "mean"), (None, 0.2, "primary"), (3, 0.2, "mean")):
        with pytest.raises(BadNumber, match="score of reward model 0 for sequence 1 of the batch"):
            finite_members(scores, min_members, share, rule)  # type: ignore[arg-type]


def test_a_sample_that_nobody_scores_is_an_error() -> None:
    scores = torch.zeros(50, 2)
    scores[7] = math.nan
    with pytest.raises(BadNumber, match="sequence 7"):
        finite_members(scores, None, 0.05, "mean")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_score_names_member_and_row(value: float) -> None:
    scores = SCORES.clone()
    scores[1, 2] = value
    for min_members in (None, 3):
        with pytest.raises(BadNumber, match=f"model 2 for sequence 1 of the batch is {value} .*2 of 3 members"):
            finite_members(scores, min_members, 0.0, "mean")


def test_a_bad_member_is_left_out_where_the_config_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    scores = SCORES.clone()
    scores[1, 1] = math.nan
    with caplog.at_level(logging.WARNING):
        assert finite_members(scores, 2, 0.0, "mean") == (0, 2)
    assert "[1] left out" in caplog.text


def test_the_rounds_own_model_is_never_left_out() -> None:
    scores = SCORES.clone()
    scores[0, 0] = math.nan
    with pytest.raises(BadNumber, match="member 0 is the round's own"):
        finite_members(scores, 1, 0.0, "mean")


@pytest.mark.parametrize("min_members", [0, 4])
def test_min_members_out_of_range(min_members: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        finite_members(SCORES, min_members, 0.0, "mean")
