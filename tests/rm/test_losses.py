"""The losses against hand-computed cases, naive loops and stated properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rm.losses import bradley_terry_loss, difference_loss, pair_accuracy


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    # sigma(1) = 0.7310586, sigma(0) = 0.5
    assert float(bradley_terry_loss(chosen, rejected, 2)) == pytest.approx((0.3132617 + math.log(2)) / 2, abs=1e-6)


def test_bradley_terry_equals_binary_cross_entropy() -> None:
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64) * 4
    reference = functional.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, 50), reference, rtol=0, atol=1e-12)


def test_bradley_terry_adds_up_over_microbatches() -> None:
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    parts = bradley_terry_loss(chosen[:3], rejected[:3], 7) + bradley_terry_loss(chosen[3:], rejected[3:], 7)
    torch.testing.assert_close(parts, bradley_terry_loss(chosen, rejected, 7), rtol=0, atol=1e-12)


def test_bradley_terry_keeps_its_gradient_when_badly_wrong() -> None:
    chosen = torch.tensor([-200.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([200.0]), 1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(400.0)
    assert chosen.grad is not None
    assert float(chosen.grad) == -1.0


@pytest.mark.parametrize(("chosen", "rejected"), [((0,), (0,)), ((3,), (2,)), ((2, 2), (2, 2))])
def test_pairs_of_wrong_shape_are_refused(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        bradley_terry_loss(torch.zeros(chosen), torch.zeros(rejected), 1)
    with pytest.raises(ValueError, match="N >= 1"):
        pair_accuracy(torch.zeros(chosen), torch.zeros(rejected))


def test_accuracy_counts_a_tie_one_half() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, -1.0, 5.0]), torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert float(pair_accuracy(chosen, rejected)) == 0.625


def naive_difference(scores: Tensor) -> float:
    """Equation 11 with two loops over each prompt's responses."""
    total, rows = 0.0, scores.tolist()
    for row in rows:
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                total += 2 / len(row) ** 2 / (1 + math.exp(-abs(row[i] - row[j])))
    return total / len(rows)


@pytest.mark.parametrize(("m", "k"), [(1, 2), (3, 2), (4, 5), (2, 9)])
def test_difference_equals_two_loops(m: int, k: int) -> None:
    scores = torch.randn(m, k, dtype=torch.float64) * 2
    assert float(difference_loss(scores)) == pytest.approx(naive_difference(scores), abs=1e-12)


def test_difference_by_hand() -> None:
    # k = 3, gaps 1, 1, 2: 2/9 (2 * 0.7310586 + 0.8807971)
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    assert float(difference_loss(scores)) == pytest.approx(2 / 9 * (2 * 0.7310586 + 0.8807971), abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_difference_reaches_its_lower_bound_and_stays_under_its_upper(k: int) -> None:
    ties = torch.full((2, k), 3.7, dtype=torch.float64)
    far = torch.arange(k, dtype=torch.float64).mul(30).expand(2, k)
    assert float(difference_loss(ties)) == pytest.approx((k - 1) / (2 * k), abs=1e-15)
    assert (k - 1) / k - 1e-9 < float(difference_loss(far)) < (k - 1) / k
    assert (k - 1) / (2 * k) < float(difference_loss(torch.randn(4, k, dtype=torch.float64))) < (k - 1) / k


def test_difference_ignores_a_shift_per_prompt_and_the_order_but_not_the_scale() -> None:
    scores = torch.randn(4, 5, dtype=torch.float64)
    base = difference_loss(scores)
    shifted = scores + torch.randn(4, 1, dtype=torch.float64)
    torch.testing.assert_close(difference_loss(shifted), base, rtol=0, atol=1e-12)
    torch.testing.assert_close(difference_loss(scores[:, torch.randperm(5)]), base, rtol=0, atol=1e-12)
    torch.testing.assert_close(difference_loss(scores[torch.randperm(4)]), base, rtol=0, atol=1e-12)
    assert float(difference_loss(2 * scores)) > float(base) + 1e-3


def test_difference_gradient_is_the_formula_and_zero_at_ties() -> None:
    k = 5
    values = torch.randn(1, k, dtype=torch.float64)
    values[0, 3] = values[0, 1]
    scores = values.clone().requires_grad_()
    difference_loss(scores).backward()
    gap = values[0][:, None] - values[0][None, :]
    s = torch.sigmoid(gap.abs())
    expected = 2 / k**2 * (s * (1 - s) * gap.sign()).sum(-1)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[0], expected, rtol=0, atol=1e-12)
    tied = torch.ones(2, 4, requires_grad=True)
    difference_loss(tied).backward()
    assert tied.grad is not None
    assert not bool(tied.grad.any())


def test_difference_adds_up_over_microbatches() -> None:
    scores = torch.randn(5, 3, dtype=torch.float64)
    parts = difference_loss(scores[:2], 5) + difference_loss(scores[2:], 5)
    torch.testing.assert_close(parts, difference_loss(scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (0, 4), (4,), (2, 2, 2)])
def test_scores_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="k >= 2"):
        difference_loss(torch.zeros(shape))
