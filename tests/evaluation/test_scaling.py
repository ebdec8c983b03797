"""Gao's curve by least squares."""

import math

import numpy as np
import pytest

from evaluation.scaling import Overoptimisation, fit_overoptimisation


def test_a_curve_is_found_again() -> None:
    curve = Overoptimisation(alpha=2.0, beta=0.5, residual=0.0)
    assert curve.at(1.0) == 2.0 and curve.at(math.e) == pytest.approx(1.5 * math.e) and curve.at(0.0) == 0.0
    kls = [0.25, 1.0, 4.0, 9.0, 25.0]
    fit = fit_overoptimisation(kls, [curve.at(math.sqrt(kl)) for kl in kls])
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.residual) == pytest.approx((2.0, 0.5, 0.0), abs=1e-9)
    assert fit.peak == pytest.approx(math.exp(3.0))
    slope = (fit.at(math.exp(3.0) + 1e-4) - fit.at(math.exp(3.0) - 1e-4)) / 2e-4
    assert slope == pytest.approx(0.0, abs=1e-6)


def test_it_is_the_least_squares_of_another_solver() -> None:
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(0)
    d = rng.uniform(0.2, 6.0, size=40)
    gains = d * (1.3 - 0.4 * np.log(d)) + rng.normal(size=40) * 0.2
    fit = fit_overoptimisation((d**2).tolist(), gains.tolist())
    (alpha, beta), _ = curve_fit(lambda x, a, b: x * (a - b * np.log(x)), d, gains)
    assert fit is not None
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-5)
    assert fit.residual == pytest.approx(float(np.sqrt(np.mean((gains - d * (alpha - beta * np.log(d))) ** 2))), abs=1e-6)


def test_points_at_sft_change_nothing_and_three_distances_are_needed() -> None:
    some = fit_overoptimisation([1.0, 4.0, 9.0], [1.0, 1.5, 1.2])
    assert some == fit_overoptimisation([1.0, 0.0, 4.0, -0.1, 9.0], [1.0, 0.0, 1.5, 0.3, 1.2])
    assert fit_overoptimisation([1.0, 1.0, 4.0], [1.0, 1.1, 1.5]) is None


def test_a_curve_that_does_not_bend_has_no_peak() -> None:
    assert Overoptimisation(1.0, 0.0, 0.0).peak is None and Overoptimisation(1.0, -0.5, 0.0).peak is None
    assert Overoptimisation(1.0, 0.01, 0.0).peak is None, "e^99 is nowhere"
