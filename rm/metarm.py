"""One gradient of the reward model under MetaRM: Algorithm 1 of Secrets of RLHF Part II, and what it is compared with.

    theta' = theta + eta * gJ                   (ascend on the shifted samples, Eq 12)
    g      = gL(theta')                         (descend on the preference pairs, Eq 13)
    theta is put back bit for bit; the optimizer steps theta with g (Eq 14)

g = gL + eta * H_L gJ + O(eta^2), with gL, gJ, H_L taken at theta. Order 2 differentiates through theta' as well, joint descends
L - lambda J at theta, and a random or reversed direction of equal length tells whether the direction matters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rm.config import Direction, Order
from rm.records import MetaStep
from rm.second_order import hessian_product
from rm.spread import Separation
from tokens.errors import UserError
from tokens.guards import BadNumber
from tokens.ranks import ALONE, Ranks, full, shard_like

Loss = Callable[[], Tensor] | Sequence[Callable[[], Tensor]]
"""Returns a scalar that depends on the parameters; or several such functions, of terms that sum to the loss: each has a backward
pass of its own, so that no more than one term's activations are held."""


def metarm_gradient(
    parameters: Iterable[nn.Parameter],
    ascend: Loss,
    descend: Loss,
    eta: float,
    *,
    order: Order = 1,
    direction: Direction = "ascent",
    generator: torch.Generator | None = None,
    measure: bool = False,
    heldout: Callable[[], Separation] | None = None,
    ranks: Ranks = ALONE,
) -> MetaStep:
    """Leave in ``.grad`` the gradient of L at theta' = theta + eta * gJ(theta), and theta itself unchanged.

    theta is saved before the ascent and copied back afterwards, whether or not an error is raised: the restored bits are
    equal, which subtracting eta * gJ again would not give. Gradients that stood in ``.grad`` before are discarded.
    With eta = 0 the result is the vanilla gradient exactly. Held in memory beside theta and its gradient: theta's copy and gJ.

        order 1:   g = gL(theta')
        order 2:   g = d/dtheta L(theta + eta gJ(theta)) = gL(theta') + eta H_J(theta) gL(theta')

    Order 1 works on plain tensors and on the shards of FSDP2 (DTensor): both passes run ``backward``, the rest is elementwise.

    Source: Secrets of RLHF Part II, Algorithm 1 and Eqs 11-14 (order 1: nothing is differentiated through theta'). Order 2 is
    the total derivative that its Eq 15 is about; Eqs 16 and 17 as printed lack eta (and a matrix factor) and are not this.

    Args:
        parameters: theta; those that need no gradient are left alone.
        ascend: returns J, or its terms.
        descend: returns L, or its terms.
        eta: ascent step size, >= 0.
        order: 2 only on one rank, and with operations that can be differentiated twice.
        direction: "descent" moves to theta - eta * gJ; "random" moves as far as the ascent would, along a direction drawn for
            this step. Both are controls.
        generator: of the random direction; in one state on all ranks.
        measure: also evaluate J at theta' (one more forward pass, no gradient).
        heldout: called at theta and at theta', without gradient.
        ranks: that share the parameters; J and L are then each rank's part of a sum, and all ranks must call this.

    Returns:
        The diagnostics.

    Raises:
        ValueError: if ``eta`` is negative or not finite, nothing is trainable, or a random direction has no generator.
        UserError: if order 2 is asked for on several ranks, with a random direction, or of a model that cannot do it.
        BadNumber: if J, L or a gradient is not finite.
    """
    _check_eta(eta)
    if order == 2 and (ranks.size > 1 or direction == "random"):
        raise UserError(
            f"meta.order 2 needs one rank and a direction that depends on J: got {ranks.size} ranks, direction {direction!r}. "
            "Set meta.order to 1."
        )
    theta = _trainable(parameters)
    at_theta = heldout() if heldout is not None else None
    of_difference, of_preference = _terms(ascend), _terms(descend)
    difference, ascent, ascent_norm = _gradient(theta, of_difference, "the difference loss J", ranks)
    towards, signed = _towards(ascent, ascent_norm, eta, direction, generator)
    with _displaced(theta, towards, signed) as (displacement, scale):
        with torch.no_grad():
            ascended = sum(float(ranks.sum(term().detach())) for term in of_difference) if measure else None
        at_theta_prime = heldout() if heldout is not None else None
        loss, gradient, norm = _gradient(theta, of_preference, "the preference loss L at theta'", ranks)
    alignment = _alignment(gradient, ascent, norm * ascent_norm)
    if order == 2:
        first, *others = of_difference
        curved = hessian_product(first, theta, gradient)
        for term in others:
            for whole, part in zip(curved, hessian_product(term, theta, gradient), strict=True):
                whole.add_(part)
        for slope, product in zip(gradient, curved, strict=True):
            slope.add_(product, alpha=signed)
        norm = _norm(gradient)
        if not math.isfinite(norm):
            raise BadNumber("the gradient norm through theta' of the preference loss L at theta'", norm)
    for parameter, slope in zip(theta, gradient, strict=True):
        parameter.grad = slope
    return MetaStep(
        loss=loss,
        difference=difference,
        difference_ascended=ascended,
        heldout=at_theta,
        heldout_ascended=at_theta_prime,
        displacement=displacement,
        relative_displacement=displacement / scale if scale > 0 else 0.0,
        ascent_norm=ascent_norm,
        gradient_norm=norm,
        alignment_cos=alignment,
    )


def backward(terms: Iterable[Callable[[], Tensor]], name: str, ranks: Ranks) -> float:
    """Add the gradient of a sum of terms to ``.grad``, one backward pass each.

    Args:
        terms: functions that return scalars, each rank's part of a sum; all ranks must call this.
        name: of the sum, for messages.
        ranks: that share the parameters.

    Returns:
        The sum, over all ranks.

    Raises:
        BadNumber: if it is not finite.
    """
    value = 0.0
    for term in terms:
        found = term()
        value += float(ranks.sum(found.detach()))
        if not math.isfinite(value):
            raise BadNumber(name, value)
        torch.autograd.backward(found)
    return value


def joint_gradient(
    parameters: Iterable[nn.Parameter],
    ascend: Loss,
    descend: Loss,
    coef: float,
    *,
    heldout: Callable[[], Separation] | None = None,
    ranks: Ranks = ALONE,
) -> MetaStep:
    """Leave in ``.grad`` the gradient of L - coef * J at theta; nothing is moved.

        g = gL - coef * gJ

    What MetaRM is compared with: the same two losses on the same samples, summed. Costs as many passes and no copy of theta.

    Args:
        parameters: theta; those that need no gradient are left alone.
        ascend: returns J, or its terms.
        descend: returns L, or its terms.
        coef: lambda, >= 0.
        heldout: called at theta, without gradient.
        ranks: that share the parameters; J and L are then each rank's part of a sum, and all ranks must call this.

    Returns:
        The diagnostics; no theta', so no displacement.

    Raises:
        ValueError: if nothing is trainable.
        BadNumber: if J, L or a gradient is not finite.
    """
    theta = _trainable(parameters)
    at_theta = heldout() if heldout is not None else None
    difference, ascent, ascent_norm = _gradient(theta, _terms(ascend), "the difference loss J", ranks)
    loss, gradient, norm = _gradient(theta, _terms(descend), "the preference loss L", ranks)
    alignment = _alignment(gradient, ascent, norm * ascent_norm)
    for parameter, slope, spread in zip(theta, gradient, ascent, strict=True):
        parameter.grad = slope.add_(spread, alpha=-coef)
    return MetaStep(
        loss=loss,
        difference=difference,
        difference_ascended=None,
        heldout=at_theta,
        heldout_ascended=None,
        displacement=0.0,
        relative_displacement=0.0,
        ascent_norm=ascent_norm,
        gradient_norm=_norm(gradient),
        alignment_cos=alignment,
    )


def ascend_in_place(
    parameters: Iterable[nn.Parameter],
    parts: Iterable[Callable[[], Tensor]],
    eta: float,
    *,
    direction: Direction = "ascent",
    generator: torch.Generator | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """theta <- theta + eta * gJ(theta), for good: theta' is what is deployed.

    Source: Secrets of RLHF Part II, Eq 12; Algorithm 1 itself throws theta' away.

    Args:
        parameters: theta; those that need no gradient are left alone.
        parts: J as terms that sum to it, one after another, so that J may be of more samples than one backward pass takes.
        eta: ascent step size, >= 0.
        direction: as in ``metarm_gradient``.
        generator: of the random direction; in one state on all ranks.
        ranks: that share the parameters; each term is then each rank's part of a sum, and all ranks must call this.

    Returns:
        ||eta * gJ||.

    Raises:
        ValueError: if ``eta`` is negative or not finite, nothing is trainable, or a random direction has no generator.
        BadNumber: if J or its gradient is not finite; theta is then unchanged.
    """
    _check_eta(eta)
    theta = _trainable(parameters)
    _, ascent, norm = _gradient(theta, parts, "the difference loss J of all shifted samples", ranks)
    towards, signed = _towards(ascent, norm, eta, direction, generator)
    _move(theta, towards, signed)
    return eta * norm


def _terms(loss: Loss) -> Sequence[Callable[[], Tensor]]:
    return [loss] if callable(loss) else loss


def _check_eta(eta: float) -> None:
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and >= 0, got {eta}")


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    theta = [p for p in parameters if p.requires_grad]
    if not theta:
        raise ValueError("no parameter is trainable")
    return theta


def _gradient(
    theta: Sequence[nn.Parameter], terms: Iterable[Callable[[], Tensor]], name: str, ranks: Ranks
) -> tuple[float, list[Tensor], float]:
    """Value, gradient, and the gradient's norm, of a sum of terms, one backward pass each; leaves every ``.grad`` empty."""
    for parameter in theta:
        parameter.grad = None
    try:
        value = backward(terms, name, ranks)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
    finally:
        for parameter in theta:
            parameter.grad = None
    norm = _norm(gradient)
    if not math.isfinite(norm):
        raise BadNumber(f"the gradient norm of {name}", norm)
    return value, gradient, norm


def _towards(
    ascent: list[Tensor], norm: float, eta: float, direction: Direction, generator: torch.Generator | None
) -> tuple[list[Tensor], float]:
    """Where theta' lies from theta, and the step size with its sign."""
    if direction == "descent":
        return ascent, -eta
    if direction == "ascent":
        return ascent, eta
    if generator is None:
        raise ValueError("a random direction needs a generator of its own, got none")
    drawn = [shard_like(torch.randn(g.shape, generator=generator).to(g.dtype), g).to(g.device) for g in ascent]
    ratio = norm / _norm(drawn)
    for tensor in drawn:
        tensor.mul_(ratio)
    return drawn, eta


@contextmanager
def _displaced(theta: Sequence[nn.Parameter], direction: Sequence[Tensor], size: float) -> Iterator[tuple[float, float]]:
    """theta + size * direction inside, theta's own bits afterwards; gives the displacement's norm and theta's."""
    saved = [p.detach().clone() for p in theta]
    try:
        _move(theta, direction, size)
        yield _norm(p.detach() - s for p, s in zip(theta, saved, strict=True)), _norm(saved)
    finally:
        with torch.no_grad():
            for parameter, original in zip(theta, saved, strict=True):
                parameter.copy_(original)


def _move(theta: Sequence[nn.Parameter], direction: Sequence[Tensor], size: float) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(theta, direction, strict=True):
            parameter.add_(tensor, alpha=size)


def _alignment(gradient: Sequence[Tensor], ascent: Sequence[Tensor], norms: float) -> float:
    """cos(-gL, gJ), where ``norms`` is the product of their norms."""
    parts = [(g.to(_wide(g)) * a.to(_wide(g))).sum(dtype=torch.float64) for g, a in zip(gradient, ascent, strict=True)]
    dot = float(full(torch.stack(parts).sum()))
    return -dot / norms if norms > 0 else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    """Over all tensors and ranks, at least in float32; the tensors may be made one at a time, and a device is waited for once."""
    norms = [torch.linalg.vector_norm(tensor, dtype=_wide(tensor)) for tensor in tensors]
    return float(full(torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
