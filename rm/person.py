"""One person's reward on fixed features: fitted to optimality from a few answers, with how sure it is.

    p(a before b) = sigma(<phi(x, a) - phi(x, b), w>)

Letters: n answers, B sequences, d reward features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog, minimize
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from tokens.errors import UserError

TOLERANCE = 1e-10
"""Nats by which the objective may be above its least where a person counts as fitted."""
GRADIENT = 1e-8
"""Largest entry of the objective's gradient, per answer, at which the solver stops."""
_ATTEMPTS = 500
"""Of the solver; Newton's method needs about ten."""


@dataclass(frozen=True, eq=False)
class Person:
    """What is known of a person's weights: a Gaussian.

    Weights mean something only beside the features that they were fitted on: phi -> A phi with w -> A^-T w changes every number
    here and no prediction. Compare persons by ``preferred`` or ``scores``, never by weights.

    Args:
        weights: [d] float64, w.
        covariance: [d, d] float64, symmetric and positive definite.

    Raises:
        ValueError: if shapes do not go together, or a number is not finite, or the covariance is not one.
    """

    weights: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        d = self.weights.shape[0] if self.weights.dim() == 1 else 0
        if d < 1 or self.covariance.shape != (d, d) or {self.weights.dtype, self.covariance.dtype} != {torch.float64}:
            raise ValueError(
                f"a person needs weights [d] and covariance [d, d], float64; got {tuple(self.weights.shape)} "
                f"{self.weights.dtype} and {tuple(self.covariance.shape)} {self.covariance.dtype}"
            )
        if not bool(torch.isfinite(self.weights).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("a person's weights and covariance must be finite")
        asymmetry = float((self.covariance - self.covariance.T).abs().max())
        largest = float(self.covariance.abs().max())
        if asymmetry > 1e-6 * largest or int(torch.linalg.cholesky_ex(self.covariance).info) != 0:
            raise ValueError("a person's covariance must be symmetric and positive definite")

    @property
    def d(self) -> int:
        """Reward features."""
        return len(self.weights)

    def scores(self, features: Tensor) -> Tensor:
        """The person's reward of each text.

        Args:
            features: [B, d] float.

        Returns:
            [B] float64.
        """
        return features.double() @ self.weights

    def deviations(self, features: Tensor) -> Tensor:
        """Standard deviation of each text's reward: how unsure it is.

        Args:
            features: [B, d] float; of differences of features, that of the difference of rewards.

        Returns:
            [B] float64.
        """
        rows = features.double()
        return torch.einsum("bi,ij,bj->b", rows, self.covariance, rows).clamp(min=0).sqrt()

    def preferred(self, differences: Tensor) -> Tensor:
        """Probability that the first response is preferred, over what is not known of the weights.

        p = E_w sigma(<D, w>) ~ sigma(m / sqrt(1 + pi v / 8)),  m = <D, E w>,  v = D^T Cov(w) D

        Source: MacKay 1992, "The evidence framework applied to classification networks".

        Args:
            differences: [B, d] float, D = features of the first response - features of the second.

        Returns:
            [B] float64.
        """
        mean, deviation = self.scores(differences), self.deviations(differences)
        return torch.sigmoid(mean / (1 + math.pi * deviation.square() / 8).sqrt())


def person_objective(weights: Tensor, differences: Tensor, l2: float, towards: Tensor) -> Tensor:
    """What a person's weights minimise.

    E(w) = -sum_i log sigma(<D_i, w>) + (l2 / 2) |w - w0|^2

    It is the negative log posterior under the prior w ~ N(w0, I / l2). There is no intercept: which response came first means
    nothing. E is strictly convex for l2 > 0, so that weights are finite also where the answers are separable, or fewer than d.

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338), adaptation to a new rater, with a penalty.

    Args:
        weights: [d] float64, w.
        differences: [n, d] float64, D_i = features of the preferred response - features of the other.
        l2: > 0.
        towards: [d] float64, w0.

    Returns:
        A scalar, nats.
    """
    return -functional.logsigmoid(differences @ weights).sum() + 0.5 * l2 * (weights - towards).square().sum()


def fit_person(differences: Tensor, l2: float, towards: Tensor | None = None) -> Person:
    """The least of ``person_objective``, and Laplace's approximation around it.

    Cov(w) = (sum_i s_i (1 - s_i) D_i D_i^T + l2 I)^-1,  s_i = sigma(<D_i, w>)

    Args:
        differences: [n, d] float, D_i = features of the preferred response - features of the other; n may be 0, which gives the
            prior.
        l2: > 0.
        towards: [d] float, w0; None = zero.

    Returns:
        The person.

    Raises:
        ValueError: if shapes do not go together, or ``l2`` is not above 0.
        UserError: if a difference is not finite, or so large that no least is found.
    """
    if differences.dim() != 2 or differences.shape[1] < 1:
        raise ValueError(f"a person needs differences [n, d] with d >= 1, got {tuple(differences.shape)}")
    d = differences.shape[1]
    if towards is not None and towards.shape != (d,):
        raise ValueError(f"the weights to pull towards must be [{d}] as the features are, got {tuple(towards.shape)}")
    if not (math.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 must be a number above 0, got {l2}: without it weights of separable answers are infinite")
    rows = differences.detach().cpu().double().numpy()
    if not np.isfinite(rows).all():
        raise UserError("the features of an answer are not finite: the model is broken. Train it again with a lower reward.lr")
    start = np.zeros(d) if towards is None else towards.detach().cpu().double().numpy()

    def value(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -(rows @ w)).sum() + 0.5 * l2 * np.square(w - start).sum())

    def gradient(w: np.ndarray) -> np.ndarray:
        return np.asarray(-(expit(-(rows @ w)) @ rows) + l2 * (w - start))

    def hessian(w: np.ndarray) -> np.ndarray:
        s = expit(rows @ w)
        return np.asarray((rows * (s * (1 - s))[:, None]).T @ rows + l2 * np.eye(d))

    found = minimize(
        value,
        start,
        jac=gradient,
        hess=hessian,
        method="trust-exact",
        options={"gtol": GRADIENT * max(1, len(rows)), "maxiter": _ATTEMPTS},
    )
    slope, covariance = gradient(found.x), np.linalg.inv(hessian(found.x))
    left = float(slope @ covariance @ slope) / 2  # by which E is above its least, in whatever units the features are
    if not left <= TOLERANCE:
        raise UserError(
            f"a person's weights did not converge ({left:.2g} nats are left): the features are badly scaled. Raise l2, or train "
            "the model again with a lower features.lr"
        )
    return Person(torch.from_numpy(found.x.copy()), torch.from_numpy((covariance + covariance.T) / 2))


def separable(differences: Tensor) -> bool:
    """Whether weights would be infinite without a penalty: some w explains answers and contradicts none.

    max_w sum_i <D_i, w> with 0 <= <D_i, w> <= 1 is above 0, which includes answers on the edge (<D_i, w> = 0).

    Source: Albert and Anderson 1984, "On the existence of maximum likelihood estimates in logistic regression models".

    Args:
        differences: [n, d] float, as ``fit_person``; n >= 1.

    Returns:
        True if there is such w.
    """
    rows = differences.detach().cpu().double().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    n, d = rows.shape
    both, limits = np.concatenate([rows, -rows]), np.concatenate([np.ones(n), np.zeros(n)])
    found = linprog(-rows.sum(0), A_ub=both, b_ub=limits, bounds=[(None, None)] * d, method="highs")
    return bool(found.status == 0 and -found.fun > 1e-6)
