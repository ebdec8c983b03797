"""The losses against hand-computed cases, naive loops and stated properties."""

import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import brier_score_loss
from torch import Tensor
from torch.nn import functional

from rm.losses import bradley_terry_loss, calibration_error, difference_loss, pair_accuracy, preference_loss


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


def random_pairs(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen, rejected, margin, smoothing."""
    chosen, rejected, margin = torch.randn(3, n, dtype=dtype) * 3
    return chosen, rejected, margin, torch.rand(n, dtype=dtype)


def test_preference_loss_by_hand() -> None:
    # x = 2 - 0.5 - 0.5 = 1 at a = 0.2: 0.8 * 0.3132617 + 0.2 * 1.3132617;  x = 0 + 1 = 1 at a = 0: 0.3132617
    arguments = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.5, -1.0], [0.2, 0.0]])
    loss = preference_loss(*arguments, 2)
    assert float(loss) == pytest.approx((0.8 * 0.3132617 + 0.2 * 1.3132617 + 0.3132617) / 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_margin_and_smoothing_it_is_the_plain_loss_to_the_bit(dtype: torch.dtype) -> None:
    chosen, rejected = (torch.randn(100, dtype=dtype).mul(20).requires_grad_() for _ in range(2))
    zeros = torch.zeros(100, dtype=dtype)
    plain = bradley_terry_loss(chosen, rejected, 100)
    general = preference_loss(chosen, rejected, zeros, zeros, 100)
    assert general.equal(plain)
    of_plain, of_general = (torch.cat(torch.autograd.grad(loss, (chosen, rejected))) for loss in (plain, general))
    assert of_general.equal(of_plain)


def test_preference_loss_equals_cross_entropy_with_soft_targets() -> None:
    chosen, rejected, margin, smoothing = random_pairs(50)
    reference = functional.binary_cross_entropy_with_logits(chosen - rejected - margin, 1 - smoothing)
    torch.testing.assert_close(preference_loss(chosen, rejected, margin, smoothing, 50), reference, rtol=0, atol=1e-12)


def test_the_margin_is_taken_as_trl_takes_it() -> None:
    from trl import RewardTrainer

    chosen, rejected, margin, _ = random_pairs(20, torch.float32)
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics: dict[str, list[float]] = {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=accelerator,
        _metrics={"eval": metrics},
        _total_train_tokens=0,
    )
    scores = torch.cat([chosen, rejected])[:, None]
    reference = RewardTrainer.compute_loss(trainer, lambda **inputs: SimpleNamespace(logits=scores), {"margin": margin})
    torch.testing.assert_close(preference_loss(chosen, rejected, margin, torch.zeros(20), 20), reference, rtol=0, atol=1e-6)


def test_preference_loss_gradient_is_that_of_finite_differences() -> None:
    chosen, rejected, margin, smoothing = random_pairs(6)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_(), margin)
    assert torch.autograd.gradcheck(lambda c, r, mu: preference_loss(c, r, mu, smoothing, 6), inputs)


def test_a_margin_is_a_shift_of_the_difference() -> None:
    chosen, rejected, margin, smoothing = random_pairs(30)
    shifted = preference_loss(chosen - margin, rejected, torch.zeros_like(margin), smoothing, 30)
    torch.testing.assert_close(preference_loss(chosen, rejected, margin, smoothing, 30), shifted, rtol=0, atol=1e-12)
    further = preference_loss(chosen, rejected, margin + 0.5, torch.zeros_like(margin), 30)
    assert float(further) > float(preference_loss(chosen, rejected, margin, torch.zeros_like(margin), 30))


@pytest.mark.parametrize("a", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("margin", [0.0, 1.5, -2.0])
def test_a_smoothed_pair_is_content_at_the_log_odds(a: float, margin: float) -> None:
    def slope(difference: float) -> float:
        chosen = torch.tensor([difference], dtype=torch.float64, requires_grad=True)
        of_pair = (torch.tensor([x], dtype=torch.float64) for x in (0.0, margin, a))
        (gradient,) = torch.autograd.grad(preference_loss(chosen, *of_pair, 1), chosen)
        return float(gradient)

    optimum = margin + math.log((1 - a) / a)
    assert slope(optimum) == pytest.approx(0, abs=1e-12)
    assert slope(optimum - 0.1) < 0 < slope(optimum + 0.1)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_at_a_tie_every_smoothing_costs_log_2(a: float) -> None:
    zero, margin = torch.zeros(1, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    smoothing = torch.tensor([a], dtype=torch.float64)
    assert float(preference_loss(zero, zero, zero, smoothing, 1)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(preference_loss(margin, zero, margin, smoothing, 1)) == pytest.approx(math.log(2), abs=1e-12)


def test_smoothing_of_one_is_a_flipped_label_and_the_margin_turns_with_it() -> None:
    chosen, rejected, margin, _ = random_pairs(30)
    ones, zeros = torch.ones_like(margin), torch.zeros_like(margin)
    flipped = preference_loss(rejected, chosen, -margin, zeros, 30)
    torch.testing.assert_close(preference_loss(chosen, rejected, margin, ones, 30), flipped, rtol=0, atol=1e-12)


def test_preference_loss_adds_up_over_microbatches() -> None:
    arguments = torch.stack(random_pairs(7))
    parts = preference_loss(*arguments[:, :3], 7) + preference_loss(*arguments[:, 3:], 7)
    torch.testing.assert_close(parts, preference_loss(*arguments, 7), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("margin", "smoothing", "message"),
    [
        ([0.0], [0.0, 0.0], "each of 2 pairs"),
        ([0.0, 0.0], [0.0], "each of 2 pairs"),
        ([0.0, math.nan], [0.0, 0.0], "pair 1 of the batch"),
        ([0.0, 0.0], [0.0, 1.1], "must lie in"),
        ([0.0, 0.0], [math.nan, 0.0], "must lie in"),
    ],
)
def test_bad_margins_and_smoothings_are_refused(margin: list[float], smoothing: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2), torch.zeros(2), torch.tensor(margin), torch.tensor(smoothing), 2)


def test_calibration_by_hand() -> None:
    # sigma(|d|) = 0.8, 0.8, 0.6, 0.5 and right 1, 0, 1, one half: in bins of 0.1 from 0.5, |1 - 1.6| + |1 - 0.6| + |0.5 - 0.5|
    odds = torch.tensor([math.log(4), -math.log(4), math.log(1.5), 0.0], dtype=torch.float64)
    calibration = calibration_error(odds + 3, torch.full((4,), 3.0, dtype=torch.float64), 5)
    assert calibration.expected_error == pytest.approx((0.6 + 0.4 + 0) / 4, abs=1e-9)
    assert calibration.brier == pytest.approx((0.2**2 + 0.8**2 + 0.4**2 + 0.5**2) / 4, abs=1e-9)


def test_calibration_is_that_of_both_orders_over_the_whole_interval() -> None:
    chosen, rejected = torch.randn(2, 500) + torch.tensor([[0.3], [0.0]])
    p = torch.sigmoid((chosen - rejected).double()).numpy()
    both = [(float(x), 1.0) for x in p] + [(1 - float(x), 0.0) for x in p]
    bins: dict[int, list[tuple[float, float]]] = {}
    for probability, label in both:
        bins.setdefault(min(19, int(probability * 20)), []).append((probability, label))
    error = sum(abs(sum(y for _, y in rows) - sum(x for x, _ in rows)) for rows in bins.values()) / len(both)
    calibration = calibration_error(chosen, rejected, 10)
    assert calibration.expected_error == pytest.approx(error, abs=1e-9)
    reference = brier_score_loss([y for _, y in both], [x for x, _ in both])
    assert calibration.brier == pytest.approx(reference, abs=1e-9)


def test_labels_drawn_from_the_model_itself_are_calibrated_and_scaled_scores_are_not() -> None:
    generator = torch.Generator().manual_seed(1)
    difference = torch.randn(20000, generator=generator) * 1.5
    right = torch.rand(20000, generator=generator) < torch.sigmoid(difference)
    labelled = torch.where(right, difference, -difference)
    zero = torch.zeros(20000)
    assert calibration_error(labelled, zero, 10).expected_error < 0.02
    assert calibration_error(5 * labelled, zero, 10).expected_error > 0.1
    assert calibration_error(0.1 * labelled, zero, 10).expected_error > 0.1


@pytest.mark.parametrize(
    ("scores", "num_bins", "message"), [([1.0], 0, "at least 1 bin"), ([math.nan], 3, "pair 0"), ([], 3, "N >= 1")]
)
def test_calibration_refuses_bad_input(scores: list[float], num_bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(torch.tensor(scores), torch.zeros(len(scores)), num_bins)


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


def test_difference_and_plain_losses_have_the_gradients_of_finite_differences() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: difference_loss(s, 5), (scores,))
    chosen, rejected, _, _ = random_pairs(6)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_loss(c, r, 6), (chosen.requires_grad_(), rejected.requires_grad_())
    )


def test_difference_adds_up_over_microbatches() -> None:
    scores = torch.randn(5, 3, dtype=torch.float64)
    parts = difference_loss(scores[:2], 5) + difference_loss(scores[2:], 5)
    torch.testing.assert_close(parts, difference_loss(scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (0, 4), (4,), (2, 2, 2)])
def test_scores_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="k >= 2"):
        difference_loss(torch.zeros(shape))
