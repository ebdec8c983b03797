"""GAE: by hand, against the O(T^2) definition, and with padding anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.gae import gae


def _definition(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_l (gamma lam)^l delta_(t+l) of one unpadded response, in float64."""
    length = len(rewards)
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)])


def test_three_tokens_by_hand() -> None:
    # gamma .5, lam .5: delta = [1 + .5*2 - 1, 0 + .5*4 - 2, 3 - 4] = [1, 0, -1]
    # A_2 = -1, A_1 = 0 + .25 * -1 = -.25, A_0 = 1 + .25 * -.25 = .9375
    advantages, returns = gae(
        torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5
    )
    assert advantages.tolist() == [[0.9375, -0.25, -1.0]]
    assert returns.tolist() == [[1.9375, 1.75, 3.0]]


def test_lambda_one_gives_monte_carlo_returns_whatever_the_values() -> None:
    rewards = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    values = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[1.5, 1.0, 2.0]], dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kept=st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=3),
    gamma=st.floats(0.1, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_equals_the_definition_with_padding_left_middle_and_right(
    seed: int, kept: list[list[bool]], gamma: float, lam: float
) -> None:
    mask = torch.tensor(kept)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    poison = torch.tensor(float("nan"), dtype=torch.float64)  # what lies outside the mask is never read
    rewards, values = torch.where(mask, rewards, poison), torch.where(mask, values, poison)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for row in range(len(mask)):
        keep = mask[row]
        expected = _definition(rewards[row, keep].numpy(), values[row, keep].numpy(), gamma, lam)
        np.testing.assert_allclose(advantages[row, keep].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(returns[row, keep].numpy(), expected + values[row, keep].numpy(), atol=1e-12)


def test_four_pad_columns_move_no_advantage_at_all() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 5, generator=generator), torch.randn(2, 5, generator=generator)
    mask = torch.tensor([[False, True, True, True, True], [False, False, True, True, False]])
    plain, _ = gae(rewards, values, mask, 1.0, 0.95)
    for left, right in ((4, 0), (0, 4), (2, 2)):
        pad = (left, right)
        wide, _ = gae(
            torch.nn.functional.pad(rewards, pad, value=9.0),
            torch.nn.functional.pad(values, pad, value=9.0),
            torch.nn.functional.pad(mask, pad, value=False),
            1.0,
            0.95,
        )
        assert torch.equal(wide[:, left : left + 5], plain)


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.9), (1.1, 0.9), (1.0, -0.1), (1.0, 1.1)])
def test_refuses_factors_out_of_range(gamma: float, lam: float) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="gamma"):
        gae(x, x, torch.ones(1, 2, dtype=torch.bool), gamma, lam)


def test_refuses_shapes_that_differ_and_masks_that_are_not_bool() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        gae(x, torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), 1.0, 0.9)
    with pytest.raises(ValueError, match="bool"):
        gae(x, x, torch.ones(1, 2), 1.0, 0.9)
