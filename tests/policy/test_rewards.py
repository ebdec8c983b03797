"""Running moments against numpy, normalisation and token rewards by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.rewards import RunningMoments, normalise_scores, token_rewards


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), offset=st.sampled_from([0.0, 3.0, 1e4]))
def test_moments_of_chunks_equal_numpys_of_the_whole(sizes: list[int], offset: float) -> None:
    generator = np.random.default_rng(sum(sizes))
    chunks = [generator.normal(offset, 2.0, size) for size in sizes]
    moments = RunningMoments()
    for chunk in chunks:
        moments.update(torch.from_numpy(chunk))
    whole = np.concatenate(chunks)
    assert moments.count == len(whole)
    assert moments.mean == pytest.approx(whole.mean(), rel=1e-12)
    assert moments.std == pytest.approx(whole.std(), rel=1e-9, abs=1e-9)


def test_moments_state_is_exact_through_json() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([0.1, 0.7, -3.3]))
    other = RunningMoments()
    other.load(json.loads(json.dumps(moments.state())))
    for each in (moments, other):
        each.update(torch.tensor([0.2]))
    assert moments.state() == other.state()
    copy = moments.copy()
    copy.update(torch.tensor([5.0]))
    assert moments.count == 4 and copy.count == 5


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_moments_refuse_what_is_no_score_and_stay_as_they_were(bad: list[float]) -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 2.0]))
    before = moments.state()
    with pytest.raises(ValueError, match="finite"):
        moments.update(torch.tensor(bad))
    assert moments.state() == before


def test_normalise_by_hand() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))  # mean 2, std 1
    shaped = normalise_scores(torch.tensor([2.5, 4.0, -7.0]), moments, 0.8)
    torch.testing.assert_close(shaped, torch.tensor([0.5, 0.8, -0.8]))


def test_normalise_of_equal_scores_is_zero() -> None:
    moments = RunningMoments()
    moments.update(torch.full((5,), 0.3))
    assert normalise_scores(torch.full((5,), 0.3), moments, 0.8).tolist() == [0.0] * 5


def test_normalise_refuses_empty_moments_and_no_clip() -> None:
    with pytest.raises(ValueError, match="0 scores"):
        normalise_scores(torch.ones(2), RunningMoments(), 0.8)
    moments = RunningMoments()
    moments.update(torch.ones(2))
    with pytest.raises(ValueError, match="positive clip"):
        normalise_scores(torch.ones(2), moments, 0.0)


def test_token_rewards_by_hand_with_padding_on_both_sides() -> None:
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    logprobs = torch.tensor([[9.0, -1.0, -2.0, 9.0], [9.0, 9.0, -0.5, -0.25]])
    ref = torch.tensor([[float("nan"), -2.0, -1.0, 0.0], [0.0, float("inf"), -0.5, -0.75]])
    rewards = token_rewards(torch.tensor([10.0, -20.0]), logprobs, ref, mask, coef=0.1)
    # row 0: -.1 * 1, then -.1 * -1 + 10; row 1: 0, then -.1 * .5 - 20
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.1, 10.1, 0.0], [0.0, 0.0, 0.0, -20.05]]))


def test_token_rewards_sum_to_score_minus_coef_times_log_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    mask[:, 3] = True
    logprobs, ref = torch.randn(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    scores = torch.randn(5, generator=generator)
    expected = scores - 0.3 * ((logprobs - ref) * mask).sum(-1)
    torch.testing.assert_close(token_rewards(scores, logprobs, ref, mask, 0.3).sum(-1), expected)


def test_token_rewards_refuse_a_row_without_response_and_other_shapes() -> None:
    x, mask = torch.zeros(2, 3), torch.tensor([[True, False, False], [False, False, False]])
    with pytest.raises(ValueError, match="no response token"):
        token_rewards(torch.zeros(2), x, x, mask, 0.1)
    with pytest.raises(ValueError, match=r"\[B\]"):
        token_rewards(torch.zeros(2, 3), x, x, ~mask, 0.1)
