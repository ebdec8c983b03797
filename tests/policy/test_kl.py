"""KL estimators against exact sums, and the controllers by hand."""

import math

import pytest
import torch

from policy.config import KLConfig
from policy.kl import AdaptiveKL, FixedKL, kl_controller, kl_estimate


def test_one_token_by_hand() -> None:
    # pi = .5, ref = .25: log r = -log 2, r = .5
    logprobs, ref = torch.tensor([[0.5]]).double().log(), torch.tensor([[0.25]]).double().log()
    assert kl_estimate(logprobs, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logprobs, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logprobs, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    pi, ref = (torch.randn(6, generator=generator, dtype=torch.float64).softmax(0) for _ in range(2))
    exact = (pi * (pi / ref).log()).sum().item()
    expectation = {kind: (pi * kl_estimate(pi.log(), ref.log(), kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert expectation["k1"] == pytest.approx(exact, abs=1e-12)
    assert expectation["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(expectation["k2"] - exact) > 1e-3
    assert exact > 0.1


def test_k2_and_k3_are_never_negative_and_all_vanish_where_both_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, ref = torch.randn(2, 50, generator=generator), torch.randn(2, 50, generator=generator)
    assert (kl_estimate(logprobs, ref, "k1") < 0).any()
    for kind in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref, kind) >= 0).all()  # type: ignore[arg-type]
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(ref, ref, kind).any()  # type: ignore[arg-type]


def test_k3_keeps_its_digits_near_zero() -> None:
    logprobs = torch.tensor([-2.0], dtype=torch.float32)
    ref = logprobs + 2**-10
    assert kl_estimate(logprobs, ref, "k3").item() == pytest.approx(2**-21, rel=1e-2)  # x^2 / 2


def test_refuses_other_kinds_and_shapes() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="equal shapes"):
        kl_estimate(torch.zeros(2), torch.zeros(1), "k1")


def test_adaptive_by_hand() -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl=6.6, num_rollouts=100)  # error .1: factor 1 + .1 * .1
    assert controller.coef == pytest.approx(0.101)
    controller.update(kl=600.0, num_rollouts=100)  # error clipped at .2
    assert controller.coef == pytest.approx(0.101 * 1.02)
    controller.update(kl=0.0, num_rollouts=100)  # and at -.2
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.98)


def test_adaptive_state_goes_on_where_it_was() -> None:
    first = AdaptiveKL(0.1, 6.0, 1000)
    first.update(9.0, 64)
    second = AdaptiveKL(0.5, 6.0, 1000)
    second.load(first.state())
    first.update(3.0, 64)
    second.update(3.0, 64)
    assert first.coef == second.coef != 0.1


def test_fixed_stays_and_belongs_to_the_config() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 64)
    controller.load({"coef": 0.7})
    assert controller.coef == 0.05
    assert controller.state() == {"coef": 0.05}


def test_controller_of_a_config() -> None:
    assert isinstance(kl_controller(KLConfig(coef=0.3)), FixedKL)
    adaptive = kl_controller(KLConfig(controller="adaptive", coef=0.3, target=4.0, horizon=7))
    assert isinstance(adaptive, AdaptiveKL)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 4.0, 7)
