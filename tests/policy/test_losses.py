"""The clipped losses: by hand in every region, against a second writing in numpy, and cut into microbatches."""

import math

import numpy as np
import pytest
import torch

from policy.losses import importance_weights, policy_loss, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (2.0, 1.1, -2.2, -2.2, 0),  # inside: -ratio * A; d loss / d logp = -ratio * A
        (2.0, 1.5, -2.4, 0.0, 1),  # above, A > 0: -1.2 * 2, flat
        (2.0, 0.5, -1.0, -1.0, 0),  # below, A > 0: not clipped, may still grow
        (-2.0, 1.5, 3.0, 3.0, 0),  # above, A < 0: not clipped, may still shrink
        (-2.0, 0.5, 1.6, 0.0, 1),  # below, A < 0: .8 * 2, flat
        (-2.0, 0.9, 1.8, 1.8, 0),  # inside, A < 0
    ],
)
def test_policy_loss_by_hand(advantage: float, ratio: float, loss: float, gradient: float, clipped: int) -> None:
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    result = policy_loss(logprobs, old, torch.tensor([[advantage]], dtype=torch.float64), ONE, 0.2, 1.0)
    torch.autograd.backward(result.loss)
    assert logprobs.grad is not None
    assert result.loss.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert result.num_clipped.item() == clipped
    assert result.ratio_max.item() == pytest.approx(ratio)
    assert result.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [
        (1.1, 0.5 * 0.9**2, -0.9, 0),  # old 1, return 2: moved .1, inside the clip
        (1.5, 0.5 * 0.8**2, 0.0, 1),  # moved .5 toward the return: the clipped 1.2 is worse, flat
        (0.5, 0.5 * 1.5**2, -1.5, 0),  # moved away: the plain error is worse than the clipped .8
    ],
)
def test_value_loss_by_hand(value: float, loss: float, gradient: float, clipped: int) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    result = value_loss(values, torch.ones(1, 1).double(), torch.full((1, 1), 2.0).double(), ONE, 0.2, 1.0)
    torch.autograd.backward(result.loss)
    assert values.grad is not None
    assert result.loss.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert result.num_clipped.item() == clipped


def _batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, old, target = (torch.randn(4, 6, generator=generator, dtype=torch.float64) * 0.4 for _ in range(3))
    mask = torch.rand(4, 6, generator=generator) < 0.7
    return new, old, target, mask


def test_both_losses_equal_a_second_writing_in_numpy() -> None:
    new, old, target, mask = _batch(0)
    policy = critic = num_clipped = kl = 0.0
    for row, column in zip(*np.nonzero(mask.numpy()), strict=True):
        n, o, a = (float(x[row, column]) for x in (new, old, target))
        ratio = np.exp(n - o)
        bound = 1.2 if a > 0 else 0.8  # the surrogate written as min(ratio * A, g(A)), the other way to state it
        policy -= min(ratio * a, bound * a)
        num_clipped += ratio * a > bound * a
        kl += ratio - 1 - (n - o)
        critic += max((n - a) ** 2, (min(max(n, o - 0.2), o + 0.2) - a) ** 2) / 2
    result = policy_loss(new, old, target, mask, 0.2, 17.0)
    assert result.loss.item() == pytest.approx(policy / 17, rel=1e-12)
    assert result.num_clipped.item() == num_clipped > 0
    assert result.approx_kl.item() == pytest.approx(kl, rel=1e-12)
    assert value_loss(new, old, target, mask, 0.2, 17.0).loss.item() == pytest.approx(critic / 17, rel=1e-12)


def test_dual_clip_weights_and_huber_equal_a_second_writing_in_numpy() -> None:
    new, old, target, mask = _batch(3)
    new, old, target = new * 4, old, target * 3  # far enough for every bound to bind
    weights = importance_weights(old, new, mask, 1.5)
    policy = critic = num_clipped = num_bounded = num_capped = num_linear = 0.0
    for row, column in zip(*np.nonzero(mask.numpy()), strict=True):
        n, o, a = (float(x[row, column]) for x in (new, old, target))
        ratio, weight = np.exp(n - o), min(np.exp(o - n), 1.5)
        assert weights[row, column].item() == pytest.approx(weight, rel=1e-6)
        surrogate = min(ratio * a, (1.2 if a > 0 else 0.8) * a)
        num_clipped += surrogate < ratio * a
        if a < 0 and surrogate < 2.0 * a:
            surrogate, num_bounded = 2.0 * a, num_bounded + 1
        policy -= surrogate * float(weights[row, column])
        errors = [abs(n - a), abs(min(max(n, o - 0.2), o + 0.2) - a)]
        critic += max(e * e / 2 if e <= 1 else e - 0.5 for e in errors)
        num_capped, num_linear = num_capped + (weight == 1.5), num_linear + (max(errors) > 1)
    result = policy_loss(new, old, target, mask, 0.2, 17.0, weights, dual_clip=2.0)
    assert result.loss.item() == pytest.approx(policy / 17, rel=1e-6)
    assert result.num_clipped.item() == num_clipped + num_bounded
    assert value_loss(new, old, target, mask, 0.2, 17.0, "huber").loss.item() == pytest.approx(critic / 17, rel=1e-9)
    assert min(num_clipped, num_bounded, num_capped, num_linear) > 0  # all of it was there to be compared


@pytest.mark.parametrize(("ratio", "loss", "gradient", "clipped"), [(2.0, 4.0, 4.0, 0), (4.0, 6.0, 0.0, 1)])
def test_the_dual_clip_bounds_a_negative_advantage(ratio: float, loss: float, gradient: float, clipped: int) -> None:
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[-2.0]], dtype=torch.float64)
    result = policy_loss(logprobs, old, advantage, ONE, 0.2, 1.0, dual_clip=3.0)
    torch.autograd.backward(result.loss)
    assert logprobs.grad is not None
    assert result.loss.item() == pytest.approx(loss) and logprobs.grad.item() == pytest.approx(gradient)
    assert result.num_clipped.item() == clipped
    with pytest.raises(ValueError, match="above 1"):
        policy_loss(logprobs, old, advantage, ONE, 0.2, 1.0, dual_clip=1.0)


def test_importance_weights_by_hand_and_padding_is_never_read() -> None:
    old = torch.log(torch.tensor([[0.5, 0.2, 0.3, float("nan")]]))
    sampler = torch.log(torch.tensor([[0.5, 0.4, 0.1, 0.0]]))
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(importance_weights(old, sampler, mask, 2.0), torch.tensor([[1.0, 0.5, 2.0, 0.0]]))
    assert importance_weights(old, sampler, mask, None).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="clip"):
        importance_weights(old, sampler, mask, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        importance_weights(old, sampler[:, :3], mask, 2.0)


def test_infinite_clip_is_the_plain_squared_error() -> None:
    new, old, target, mask = _batch(1)
    expected = 0.5 * (new - target)[mask].square().sum()
    torch.testing.assert_close(value_loss(new, old, target, mask, math.inf, 1.0).loss, expected)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_microbatches_add_up_and_padding_is_never_read(loss: object) -> None:
    function = policy_loss if loss is policy_loss else value_loss
    new, old, target, mask = _batch(2)
    whole = function(new, old, target, mask, 0.2, mask.sum()).loss
    parts = sum(
        function(new[i : i + 1], old[i : i + 1], target[i : i + 1], mask[i : i + 1], 0.2, mask.sum()).loss for i in range(4)
    )
    torch.testing.assert_close(whole, parts)
    new, old, target = (torch.where(mask, x, float("nan")) for x in (new, old, target))
    new.requires_grad_(True)
    padded = function(new, old, target, mask, 0.2, mask.sum()).loss
    torch.autograd.backward(padded)
    assert torch.equal(padded.detach(), whole)
    assert new.grad is not None
    assert not new.grad[~mask].any() and new.grad[mask].isfinite().all()


@pytest.mark.parametrize("function", [policy_loss, value_loss])
def test_refuses_other_shapes_and_clips(function: object) -> None:
    checked = policy_loss if function is policy_loss else value_loss
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="one shape"):
        checked(x, torch.zeros(1, 2), x, ONE, 0.2, 1.0)
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            checked(x, x, x, ONE, clip, 1.0)
