"""The two levels on a finite set of candidates: the three hypergradients agree where they must, and say when they cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rm.bilevel import NEVER, Distribution, lower_loss, table, upper_loss
from rm.hypergradient import ClosedForm, Form, Implicit, Unrolled, conjugate_gradient, neumann
from tokens.errors import UserError

BETA = 1.5
X, K = 4, 5


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tabular(seed: int = 0) -> tuple[Distribution, Tensor]:
    """Four prompts, five candidates each but the last prompt's two, six comparisons; and rewards."""
    reference = functional.log_softmax(0.5 * torch.randn(X, K, generator=draws(seed), dtype=torch.float64), -1)
    reference[3, 2:] = NEVER
    compared = torch.tensor([[0, 1, 7, 9, 11, 15], [2, 3, 5, 6, 14, 16]])
    return Distribution.tabular("cooking", reference, compared), 0.5 * torch.randn(
        X, K, generator=draws(seed + 1), dtype=torch.float64
    )


def shared(seed: int = 0) -> tuple[Distribution, Tensor]:
    """A policy of three parameters for all prompts."""
    given, rewards = tabular(seed)
    features = torch.randn(X, K, 3, generator=draws(seed + 2), dtype=torch.float64)
    contrast = torch.randn(6, 3, generator=draws(seed + 3), dtype=torch.float64)
    return replace(given, features=features, contrast=contrast), rewards


def hypergradient(form: Form, distribution: Distribution, rewards: Tensor, beta: float = BETA) -> tuple[float, Tensor]:
    seen = rewards.clone().requires_grad_(True)
    loss = form(seen, distribution, beta)
    (gradient,) = torch.autograd.grad(loss, seen)
    return float(loss.detach()), gradient


def test_the_closed_form_is_bradley_terry_with_the_offset_of_the_reference() -> None:
    distribution, rewards = tabular()
    better, worse = distribution.contrast
    reward, reference = rewards.flatten(), distribution.reference.flatten()
    by_hand = -functional.logsigmoid(BETA * (reward[better] - reward[worse]) + reference[better] - reference[worse]).mean()
    assert math.isclose(float(ClosedForm()(rewards, distribution, BETA)), float(by_hand), rel_tol=1e-12)


def test_the_closed_form_is_where_the_lower_level_is_least() -> None:
    distribution, rewards = tabular()
    best = (BETA * rewards.flatten()).requires_grad_(True)
    (slope,) = torch.autograd.grad(lower_loss(best, rewards, distribution, BETA), best)
    assert float(slope.abs().max()) < 1e-12
    probabilities = distribution.log_policy(best.detach()).exp()
    assert torch.allclose(probabilities.sum(-1), torch.ones(X, dtype=torch.float64)) and float(probabilities[3, 2:].sum()) == 0.0
    by_hand = (distribution.reference.exp() * (BETA * rewards).exp()) / (
        (distribution.reference.exp() * (BETA * rewards).exp()).sum(-1, keepdim=True)
    )
    assert torch.allclose(probabilities, by_hand, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", [Implicit(), Implicit("neumann", iterations=500, step=3.0)], ids=["cg", "neumann"])
def test_closed_and_implicit_form_agree_on_a_tabular_policy(form: Form, seed: int) -> None:
    distribution, rewards = tabular(10 * seed)
    (loss, exact), (other, implicit) = (hypergradient(each, distribution, rewards) for each in (ClosedForm(), form))
    assert abs(loss - other) < 1e-9
    assert float((exact - implicit).abs().max()) < 1e-6
    assert float(exact.abs().max()) > 1e-2


def test_the_unrolled_form_approaches_the_closed_one_as_its_steps_grow() -> None:
    distribution, rewards = tabular()
    _, exact = hypergradient(ClosedForm(), distribution, rewards)
    found = [hypergradient(Unrolled(steps, lr=3.0), distribution, rewards)[1] for steps in (1, 5, 25, 125)]
    distances = [float((gradient - exact).norm() / exact.norm()) for gradient in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1 and distances[-1] < 1e-3


@pytest.mark.parametrize("form", [Unrolled(8, lr=0.5), Implicit()], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("make", [tabular, shared], ids=["tabular", "shared"])
def test_hypergradients_are_those_of_finite_differences(make: object, form: Form) -> None:
    distribution, rewards = tabular() if make is tabular else shared()
    _, gradient = hypergradient(form, distribution, rewards)
    step, slow = 1e-5, torch.zeros_like(rewards)
    for x in range(X):
        for k in range(K):
            ends = []
            for sign in (1, -1):
                moved = rewards.clone()
                moved[x, k] += sign * step
                ends.append(hypergradient(form, distribution, moved)[0])
            slow[x, k] = (ends[0] - ends[1]) / (2 * step)
    assert float((gradient - slow).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-3


def test_implicit_and_unrolled_form_meet_where_parameters_are_shared() -> None:
    distribution, rewards = shared()
    _, implicit = hypergradient(Implicit(), distribution, rewards)
    _, unrolled = hypergradient(Unrolled(400, lr=0.3), distribution, rewards)
    assert float((implicit - unrolled).abs().max()) < 1e-6
    assert float(implicit[3, 2:].abs().max()) == 0.0  # where there is no candidate


def test_first_order_is_the_last_step_alone() -> None:
    distribution, rewards = tabular()
    steps, lr = 5, 0.5
    theta = torch.zeros(X * K, dtype=torch.float64)
    for _ in range(steps - 1):
        theta = theta.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(lower_loss(theta, rewards, distribution, BETA), theta)
        theta = (theta - lr * X * slope).detach()
    seen = rewards.clone().requires_grad_(True)
    theta.requires_grad_(True)
    (slope,) = torch.autograd.grad(lower_loss(theta, seen, distribution, BETA), theta, create_graph=True)
    (by_hand,) = torch.autograd.grad(upper_loss(theta.detach() - lr * X * slope, distribution), seen)
    _, first_order = hypergradient(Unrolled(steps, lr, differentiated=1), distribution, rewards)
    assert torch.equal(first_order, by_hand)
    _, whole = hypergradient(Unrolled(steps, lr), distribution, rewards)
    _, as_many = hypergradient(Unrolled(steps, lr, differentiated=steps), distribution, rewards)
    assert torch.equal(whole, as_many) and not torch.allclose(whole, first_order)


def test_as_beta_grows_the_closed_form_tends_to_pooled_bradley_terry() -> None:
    distribution, rewards = tabular()
    pooled = replace(distribution, lead=torch.zeros_like(distribution.lead))
    gaps = []
    for beta in (1.0, 10.0, 100.0):
        ours, plain = (hypergradient(ClosedForm(), each, rewards, beta)[1] / beta for each in (distribution, pooled))
        gaps.append(float((ours - plain).abs().max()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3 < gaps[0]


def test_rows_of_unlike_lengths_become_a_rectangle() -> None:
    assert table([[1.0, 2.0], [3.0]], NEVER).tolist() == [[1.0, 2.0], [3.0, NEVER]]


@pytest.mark.parametrize("form", [ClosedForm(), Unrolled(2, 0.1), Implicit()])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_reward_factor_that_is_not_positive_is_refused(form: Form, beta: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        form(tabular()[1], tabular()[0], beta)


def test_an_inner_optimisation_that_diverges_is_refused_by_its_domains_name() -> None:
    distribution, rewards = shared()
    with pytest.raises(UserError, match=r"inner optimisation of cooking diverges: .* in 30 steps of size 50"):
        hypergradient(Unrolled(30, lr=50.0), distribution, rewards)
    broken = rewards.clone()
    broken[0, 0] = math.nan
    for form in (Unrolled(3, lr=0.1), Implicit()):
        with pytest.raises(UserError, match="inner optimisation of cooking diverges"):
            hypergradient(form, distribution, broken)


def test_solvers_say_where_they_cannot_solve() -> None:
    target = torch.tensor([1.0, 1.0], dtype=torch.float64)
    with pytest.raises(UserError, match="of cooking ended at no minimum"):
        conjugate_gradient(lambda v: -v, target, 5, 1e-8, "cooking")
    with pytest.raises(UserError, match="Neumann series of cooking diverges"):
        neumann(lambda v: 3 * v, target, 50, 1.0, "cooking")
    uneven = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    with pytest.raises(UserError, match="of cooking is not solved: 1 iterations of conjugate gradient leave"):
        conjugate_gradient(lambda v: v * uneven, target, 1, 1e-8, "cooking")
    with pytest.raises(UserError, match="of cooking is not solved: 100 terms of the Neumann series leave"):
        neumann(lambda v: v * uneven, target, 100, 1.0, "cooking")
    solved = conjugate_gradient(lambda v: v * torch.tensor([2.0, 4.0]), target, 5, 1e-12, "cooking")
    assert torch.allclose(solved, torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_shapes_that_do_not_fit_are_refused() -> None:
    distribution, rewards = tabular()
    with pytest.raises(ValueError, match="expected a lead"):
        replace(distribution, lead=torch.zeros(0))
    with pytest.raises(ValueError, match="features of"):
        replace(distribution, features=torch.zeros(X, K + 1, 3), contrast=torch.zeros(6, 3))
    with pytest.raises(ValueError, match="closed form is that of a tabular policy"):
        ClosedForm()(rewards, shared()[0], BETA)


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("lr", [40.0, 1e9])
def test_steps_that_run_off_are_not_trained_through_though_the_objective_fell(beta: float, lr: float) -> None:
    rewards = torch.tensor([[5.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    distribution = Distribution.tabular("law", torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[0], [1]]))
    with pytest.raises(UserError, match="inner optimisation of law diverges"):
        Unrolled(1, lr)(rewards, distribution, beta)
    Unrolled(1, 2.0)(rewards, distribution, beta)
