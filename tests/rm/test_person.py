"""One person's weights: against another solver, against a numeric Hessian, and where the answers say little."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rm.person import Person, fit_person, person_objective, separable

N, D = 60, 5


def answers(n: int = N, d: int = D, seed: int = 3) -> torch.Tensor:
    """Differences, turned so that a noisy person prefers the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    taste = torch.randn(d, generator=generator, dtype=torch.float64)
    prefers = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(rows @ taste)
    return torch.where(prefers[:, None], rows, -rows)


def test_the_objective_by_hand() -> None:
    w, w0 = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 5.0], dtype=torch.float64)
    rows = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert float(person_objective(w, rows, 0.5, w0)) == pytest.approx(math.log(4 / 3) + 0.25 * (1 + 9), rel=1e-12)


def test_the_gradient_vanishes_and_the_fit_is_scikit_learns() -> None:
    rows, l2 = answers(), 0.7
    person = fit_person(rows, l2)
    w = person.weights.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(person_objective(w, rows, l2, torch.zeros(D, dtype=torch.float64)), w)
    assert float(gradient.abs().max()) < 1e-6
    signs = np.where(np.arange(N) % 2, 1, -1)  # scikit-learn wants two classes; a pair turned round is the same pair
    reference = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-12, max_iter=10_000)
    reference.fit(rows.numpy() * signs[:, None], signs)
    np.testing.assert_allclose(person.weights.numpy(), reference.coef_[0], rtol=1e-5, atol=1e-6)


def test_towards_somebody_is_towards_zero_of_what_is_left() -> None:
    rows, w0 = answers(8), torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near, far = fit_person(rows, 1e4, w0), fit_person(rows, 1e4)
    assert float((near.weights - w0).norm()) < 0.01 and float(far.weights.norm()) < 0.01
    nothing = fit_person(rows[:0], 2.0, w0)
    torch.testing.assert_close(nothing.weights, w0)
    torch.testing.assert_close(nothing.covariance, torch.eye(D, dtype=torch.float64) / 2)


def test_the_covariance_is_the_inverse_of_a_numeric_hessian() -> None:
    rows, l2, w0 = answers(), 0.3, torch.ones(D, dtype=torch.float64)
    person, h = fit_person(rows, l2, w0), 1e-4
    steps = torch.eye(D, dtype=torch.float64) * h

    def at(*moves: torch.Tensor) -> float:
        return float(person_objective(person.weights + sum(moves), rows, l2, w0))

    numeric = torch.tensor(
        [[(at(a, b) - at(a, -b) - at(-a, b) + at(-a, -b)) / (4 * h * h) for b in steps] for a in steps], dtype=torch.float64
    )
    torch.testing.assert_close(person.covariance, torch.linalg.inv(numeric), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_few_separable_answers_in_many_dimensions_stay_finite(l2: float) -> None:
    rows = torch.randn(10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 5
    person = fit_person(rows, l2)
    assert separable(rows) and bool((person.scores(rows) > 0).all())
    assert bool(torch.isfinite(person.weights).all()) and float(person.weights.norm()) < 50
    across = torch.linalg.svd(rows).Vh[-1:]  # what no answer speaks of is as unsure as before
    assert float(person.deviations(across)) == pytest.approx(l2**-0.5, rel=1e-6)


def test_contradictions_are_not_separable_and_leave_the_person_undecided() -> None:
    rows = answers(4)
    both = torch.cat([rows, -rows])
    assert not separable(both) and not separable(torch.zeros(1, D))
    edge = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # the first answer alone would send a weight to infinity
    assert separable(edge)
    torch.testing.assert_close(fit_person(both, 1.0).weights, torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_separating_direction_agrees_with_plain_perceptron() -> None:
    for seed in range(8):
        rows = answers(12, 4, seed)
        w = torch.zeros(4, dtype=torch.float64)
        for _ in range(20_000):  # converges exactly where there is a direction
            wrong = (rows @ w <= 0).nonzero()
            if not len(wrong):
                break
            w = w + rows[int(wrong[0])]
        assert separable(rows) == bool((rows @ w > 0).all())


def test_predictions_do_not_depend_on_the_basis() -> None:
    rows, asked = answers(), answers(9, seed=8)
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    here, there = fit_person(rows, 0.5), fit_person(rows @ turn.T, 0.5)
    assert float((here.weights - there.weights).abs().max()) > 0.1
    torch.testing.assert_close(here.preferred(asked), there.preferred(asked @ turn.T), rtol=1e-6, atol=1e-7)
    shear = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    back = torch.linalg.inv(shear)
    moved = Person(back.T @ here.weights, back.T @ here.covariance @ back)
    torch.testing.assert_close(here.preferred(asked), moved.preferred(asked @ shear.T), rtol=1e-6, atol=1e-7)


def test_the_probability_by_sampling() -> None:
    person = fit_person(answers(12), 0.5)
    asked = answers(6, seed=9)
    draws = torch.distributions.MultivariateNormal(person.weights, person.covariance).sample((200_000,))
    torch.testing.assert_close(person.preferred(asked), torch.sigmoid(draws @ asked.T).mean(0), rtol=0, atol=0.02)
    assert bool(((person.preferred(asked) - 0.5).abs() < (torch.sigmoid(person.scores(asked)) - 0.5).abs()).all())


def test_bad_input() -> None:
    rows = answers()
    with pytest.raises(ValueError, match="l2 must be a number above 0, got 0"):
        fit_person(rows, 0)
    with pytest.raises(ValueError, match=r"must be \[5\] as the features are, got \(4,\)"):
        fit_person(rows, 1.0, torch.zeros(4))
    with pytest.raises(ValueError, match=r"differences \[n, d\] with d >= 1, got \(5,\)"):
        fit_person(rows[0], 1.0)
    with pytest.raises(ValueError, match="not finite"):
        fit_person(torch.full((2, 2), math.nan), 1.0)
    with pytest.raises(ValueError, match="positive definite"):
        Person(torch.zeros(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[d\] and covariance \[d, d\]"):
        Person(torch.zeros(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
