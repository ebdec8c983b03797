"""Three ways to differentiate the upper loss of ``rm.bilevel`` by the rewards, behind one interface.

Each is called with the candidates' rewards and returns the upper loss at the optimised policy, as a scalar whose gradient by the
rewards is the hypergradient; backward carries it on into whatever model the rewards came from.

    A  ClosedForm   theta* is known: dF/dr = beta dF/dtheta                              exact, tabular policies only
    B  Unrolled     theta_k = theta_(k-1) - lr grad G, k = 1 ... S; backward through the last T of them    T = 1 is first-order
    C  Implicit     dF/dr = -(d2G / dr dtheta)^T v,  H v = grad F,  H the Hessian of G at theta*           no step is kept

All three are our reconstruction; the paper (2402.14760) gives the two levels. B is a truncated back-propagation, C the implicit
function theorem.

Letters: X prompts, K candidates, D policy parameters, S inner steps, T differentiated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rm.bilevel import NEVER, Distribution, lower_loss, upper_loss
from rm.bilevel_config import GeneralizeConfig, Solver, check_beta
from tokens.errors import UserError

MAX_ITERATIONS = 1000
"""Of L-BFGS in the lower level of C."""
SLACK = 1e-6
"""By which the lower objective may end above its start, relative to it, before the inner optimisation counts as diverged."""
UNSOLVED = 0.1
"""Norm of H v - g, relative to g's, above which a solver that ran out of iterations has not solved."""


class Form(Protocol):
    """A way to differentiate."""

    def __call__(self, rewards: Tensor, distribution: Distribution, beta: float) -> Tensor:
        """The upper loss, nats per comparison; its gradient by ``rewards`` [X, K] is the hypergradient."""


@dataclass(frozen=True)
class ClosedForm:
    """A: the lower level solved on paper.

        pi*(y | x) = pi_ref(y | x) exp(beta r(x, y)) / Z(x)
        F = -mean log sigma( beta (r_w - r_l) + log pi_ref(y_w | x) - log pi_ref(y_l | x) )

    Z cancels, so only compared candidates play a part: Bradley-Terry with an offset that the domain's reference policy gives.
    Costs as much as Bradley-Terry. As beta grows the offset fades.

    Our reconstruction of 2402.14760.
    """

    def __call__(self, rewards: Tensor, distribution: Distribution, beta: float) -> Tensor:
        check_beta(beta)
        if distribution.features is not None:
            raise ValueError(f"{distribution.name}: the closed form is that of a tabular policy, got one with shared parameters")
        return upper_loss(beta * rewards.flatten(), distribution)


@dataclass(frozen=True)
class Unrolled:
    """B: gradient steps on the lower level, and back-propagation through them.

        theta_0 = 0 (the reference),  theta_k = theta_(k-1) - lr * X * grad_theta G(theta_(k-1), r),  F at theta_S

    X cancels G's mean over prompts, so that for a tabular policy ``lr`` does not depend on the number of prompts. Its curvature
    at theta* is at most 1/2, so that lr must stay below 4 there; on the way only 2 or less is sure to come nearer. A tabular
    policy that ends further from theta* than it began is refused; of one with shared parameters theta* is not known, and what is
    refused is an objective that rose. S steps need not reach theta*: the loss is that of the policy where they end.

    Our reconstruction of 2402.14760; with ``differentiated`` below ``steps`` a truncated back-propagation, 1 being first-order.

    Args:
        steps: S, >= 1.
        lr: > 0.
        differentiated: T, the last so many steps; None = all.
    """

    steps: int
    lr: float
    differentiated: int | None = None

    def __call__(self, rewards: Tensor, distribution: Distribution, beta: float) -> Tensor:
        check_beta(beta)
        kept = self.steps if self.differentiated is None else min(self.differentiated, self.steps)
        theta = torch.zeros(distribution.num_parameters, dtype=rewards.dtype, device=rewards.device, requires_grad=True)
        start = float(lower_loss(theta, rewards, distribution, beta).detach())
        size = self.lr * len(distribution.reference)
        for step in range(self.steps):
            follow = step >= self.steps - kept
            seen = rewards if follow else rewards.detach()
            (slope,) = torch.autograd.grad(lower_loss(theta, seen, distribution, beta), theta, create_graph=follow)
            theta = theta - size * slope
            if not follow:
                theta = theta.detach().requires_grad_(True)
        end = float(lower_loss(theta.detach(), rewards.detach(), distribution, beta))
        how = f"{self.steps} steps of size {self.lr:g}"
        _refuse_divergence(distribution.name, start, end, how, beta)
        if distribution.features is None:
            _refuse_straying(theta.detach(), beta * rewards.detach(), distribution, how, beta)
        return upper_loss(theta, distribution)


@dataclass(frozen=True)
class Implicit:
    """C: the lower level solved to its end, and differentiated by the implicit function theorem.

        grad_theta G(theta*, r) = 0   =>   dF/dr = -(d2G / dr dtheta)^T v,   (H + damping) v = grad_theta F(theta*)

    H v is computed by differentiating twice; no matrix is made. A tabular policy's H is singular along the constants of a prompt,
    where grad F is 0: both solvers stay out of there. The lower level starts where a tabular policy would end, at beta r, or at 0
    where parameters are shared.

    Our reconstruction of 2402.14760.

    Args:
        solver: "cg" = conjugate gradient; "neumann" = step * sum over j < iterations of (1 - step H)^j grad F.
        iterations: of the solver, at most, >= 1.
        tolerance: largest entry of grad G, times X, at which the lower level is solved; conjugate gradient ends there too.
        step: of the Neumann series, times X; converges below 2 / the largest eigenvalue of X H (below 4 for a tabular
            policy).
        damping: added to H, >= 0; moves the answer towards a shorter v.
    """

    solver: Solver = "cg"
    iterations: int = 100
    tolerance: float = 1e-8
    step: float = 1.0
    damping: float = 0.0

    def __call__(self, rewards: Tensor, distribution: Distribution, beta: float) -> Tensor:
        check_beta(beta)
        number, fixed = len(distribution.reference), rewards.detach()

        def objective(theta: Tensor, seen: Tensor) -> Tensor:
            return lower_loss(theta, seen, distribution, beta) * number

        start = beta * fixed.flatten() if distribution.features is None else fixed.new_zeros(distribution.num_parameters)
        theta = self._solve_lower(lambda at: objective(at, fixed), start, distribution, beta).requires_grad_(True)
        upper = upper_loss(theta, distribution)
        (slope,) = torch.autograd.grad(upper, theta)
        (lower_slope,) = torch.autograd.grad(objective(theta, fixed), theta, create_graph=True)

        def curved(vector: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(lower_slope, theta, vector, retain_graph=True)
            return product + self.damping * vector

        if self.solver == "cg":
            solved = conjugate_gradient(curved, slope, self.iterations, self.tolerance, distribution.name)
        else:
            solved = neumann(curved, slope, self.iterations, self.step, distribution.name)
        (seen_slope,) = torch.autograd.grad(objective(theta, rewards), theta, create_graph=True)
        pull = -(solved.detach() * seen_slope).sum()
        return upper.detach() + pull - pull.detach()

    def _solve_lower(
        self, objective: Callable[[Tensor], Tensor], start: Tensor, distribution: Distribution, beta: float
    ) -> Tensor:
        theta = start.clone().requires_grad_(True)
        first = float(objective(theta).detach())
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=MAX_ITERATIONS, tolerance_grad=self.tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective(theta)
            torch.autograd.backward(value)
            return value.detach()

        optimizer.step(closure)
        last = float(closure())
        _refuse_divergence(distribution.name, first, last, f"at most {MAX_ITERATIONS} iterations of L-BFGS", beta)
        largest = float(theta.grad.abs().max()) if theta.grad is not None else math.nan
        reachable = max(self.tolerance, 100 * torch.finfo(theta.dtype).eps * max(1.0, abs(last)))
        if not largest <= 100 * reachable:
            raise UserError(
                f"the inner optimisation of {distribution.name} did not converge: its largest gradient is {largest:.2g} after "
                f"{MAX_ITERATIONS} iterations of L-BFGS, expected {reachable:.2g}. Lower generalize.beta (got {beta:g})"
            )
        return theta.detach()


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float, name: str
) -> Tensor:
    """The shortest v with H v = g, from H's products with vectors.

    Source: Hestenes and Stiefel 1952; our reconstruction's use of it in 2402.14760's upper level.

    Args:
        product: H times a vector; H positive semidefinite, g in its range.
        target: [D] float, g.
        iterations: at most.
        tolerance: norm of H v - g, relative to g's, at which it ends; one above ``UNSOLVED`` is refused.
        name: of the domain, for messages.

    Returns:
        [D].

    Raises:
        UserError: if H curves downwards, the lower level being at no minimum; or if the iterations ran out.

    Padding contract: there is none.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), float(residual @ residual)
    whole, least = square, (tolerance**2) * square
    how, more = f"{iterations} iterations of conjugate gradient", True
    for _ in range(iterations):
        if square <= least or square == 0.0:
            break
        curved = product(direction)
        curvature = float(direction @ curved)
        if not curvature > 0:
            if abs(curvature) <= torch.finfo(target.dtype).eps * float(direction @ direction):
                how, more = "conjugate gradient, at directions that do not curve,", False
                break  # along the constants of a prompt, where rounding has led: no further iteration gets on from there
            raise UserError(
                f"the inner optimisation of {name} ended at no minimum: the lower objective curves by {curvature:.2g} along a "
                "direction, expected more than 0. Raise generalize.damping, or lower generalize.beta"
            )
        length = square / curvature
        solution = solution + length * direction
        residual = residual - length * curved
        before, square = square, float(residual @ residual)
        direction = residual + (square / before) * direction
    _refuse_unsolved(name, how, math.sqrt(square), math.sqrt(whole), more)
    return solution


def neumann(product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, step: float, name: str) -> Tensor:
    """v with H v = g as a series: step * sum over j < J of (1 - step H)^j g.

    Source: our reconstruction's use of the Neumann series in 2402.14760's upper level.

    Args:
        product: H times a vector.
        target: [D] float, g.
        iterations: J.
        step: below 2 / the largest eigenvalue of H.
        name: of the domain, for messages.

    Returns:
        [D].

    Raises:
        UserError: if the terms grow, the step being too large; or if the last is still above ``UNSOLVED`` of the first.

    Padding contract: there is none.
    """
    term, total = target.clone(), target.clone()
    first = float(term.norm())
    for _ in range(iterations - 1):
        term = term - step * product(term)
        total = total + term
    last = float((term - step * product(term)).norm())  # g - H v
    if not last <= first * (1 + SLACK):
        raise UserError(
            f"the Neumann series of {name} diverges: what it leaves over is {last:.2g} of {first:.2g}. Lower "
            f"generalize.neumann_step (got {step:g}), or set generalize.solver to cg"
        )
    _refuse_unsolved(name, f"{iterations} terms of the Neumann series", last, first)
    return step * total


def _refuse_unsolved(name: str, how: str, left: float, whole: float, more: bool = True) -> None:
    """A gradient through equations that are not solved would be far too short.

    Raises:
        UserError: naming the domain.
    """
    if not left <= UNSOLVED * whole:
        raise UserError(
            f"the hypergradient of {name} is not solved: {how} leave {left:.2g} of {whole:.2g}, expected a share of "
            f"{UNSOLVED:g} at most. Raise {'generalize.solver_iterations or ' if more else ''}generalize.damping, or lower "
            "generalize.beta"
        )


def _refuse_divergence(name: str, start: float, end: float, how: str, beta: float) -> None:
    """Nothing is trained through a policy that was not optimised.

    Raises:
        UserError: naming the domain.
    """
    if not end <= start + SLACK * max(1.0, abs(start)):
        raise UserError(
            f"the inner optimisation of {name} diverges: the lower objective went from {start:.4g} to {end:.4g} in {how}, "
            f"expected it to fall. Lower generalize.inner_lr or generalize.beta (got {beta:g})"
        )


def _refuse_straying(theta: Tensor, answer: Tensor, distribution: Distribution, how: str, beta: float) -> None:
    """No prompt's policy ends further from the lower level's answer than the reference was.

    A step of size lr <= 2 brings every prompt's theta nearer to beta r, up to a constant of the prompt, since
    <p (g - mean_p g), g> = Var_p g >= 0 with g = theta - beta r. The objective does not tell: a policy that has run off to one
    candidate may still be better than the reference.

    Source: our own, for a tabular policy.

    Args:
        theta: [X * K] float, where the steps ended; they began at 0.
        answer: [X, K] float, beta r.
        distribution: tabular.
        how: the steps, in words.
        beta: for the message.

    Raises:
        UserError: naming the domain.
    """
    there = distribution.reference > NEVER / 2
    number = there.sum(-1, keepdim=True)

    def distance(gap: Tensor) -> Tensor:
        kept = torch.where(there, gap, torch.zeros_like(gap))
        centred: Tensor = torch.where(there, kept - kept.sum(-1, keepdim=True) / number, torch.zeros_like(gap))
        far: Tensor = torch.linalg.vector_norm(centred, dim=-1)
        return far

    begun, ended = distance(-answer), distance(theta.view_as(answer) - answer)
    if not bool((ended <= begun * (1 + SLACK) + SLACK).all()):
        worst = int((ended - begun).argmax())
        raise UserError(
            f"the inner optimisation of {distribution.name} diverges: after {how} the policy of prompt {worst} is "
            f"{ended[worst]:.4g} from the optimal one, and the reference was {begun[worst]:.4g}. Lower "
            f"generalize.inner_lr or generalize.beta (got {beta:g})"
        )


def form_of(config: GeneralizeConfig) -> Form:
    """The form that a config asks for.

    Source: the module's A, B and C.

    Args:
        config: ``generalize``.

    Returns:
        The form.
    """
    if config.form == "closed":
        return ClosedForm()
    if config.form == "implicit":
        return Implicit(config.solver, config.solver_iterations, 1e-4, config.neumann_step, config.damping)
    return Unrolled(config.inner_steps, config.inner_lr, 1 if config.form == "first_order" else None)
