"""The MetaRM step: Algorithm 1 of Secrets of RLHF Part II, first order.

    theta' = theta + eta * grad J(theta)        (ascend on the shifted samples, Eq 12)
    g      = grad L(theta')                     (descend on the preference pairs, Eq 13)
    theta is put back bit for bit; the optimizer steps theta with g (Eq 14)

g = gL + eta * H_L gJ + O(eta^2), with gL, gJ, H_L taken at theta.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokens.ranks import ALONE, Ranks


@dataclass(frozen=True)
class MetaStep:
    """What one MetaRM step saw. Norms run over all parameters.

    Args:
        loss: L at theta', nats per pair.
        difference: J at theta.
        difference_ascended: J at theta'; None unless it was measured.
        displacement: ||theta' - theta|| as it really came out, after rounding.
        relative_displacement: displacement / ||theta||.
        ascent_norm: ||gJ|| at theta.
        gradient_norm: ||g||, before any clipping.
        alignment_cos: cos(-g, gJ): above 0, following the preferences also spreads the shifted samples. 0 if either norm is 0.
    """

    loss: float
    difference: float
    difference_ascended: float | None
    displacement: float
    relative_displacement: float
    ascent_norm: float
    gradient_norm: float
    alignment_cos: float


def metarm_gradient(
    parameters: Iterable[nn.Parameter],
    ascend: Callable[[], Tensor],
    descend: Callable[[], Tensor],
    eta: float,
    measure: bool = False,
    ranks: Ranks = ALONE,
) -> MetaStep:
    """Leave in ``.grad`` the gradient of L at theta' = theta + eta * grad J(theta), and theta itself unchanged.

    theta is saved before the ascent and copied back afterwards, whether or not an error is raised: the restored bits are
    equal, which subtracting eta * grad J again would not give. Gradients that stood in ``.grad`` before are discarded.
    With eta = 0 the result is the vanilla gradient exactly.

    Works on plain tensors and on the shards of FSDP2 (DTensor): both passes run ``backward``, and the rest is elementwise.

    Source: Secrets of RLHF Part II, Algorithm 1 and Eqs 11-14 (first order: nothing is differentiated through theta').

    Args:
        parameters: theta; those that need no gradient are left alone.
        ascend: returns J, a scalar that depends on the parameters.
        descend: returns L, likewise.
        eta: ascent step size, >= 0.
        measure: also evaluate J at theta' (one more forward pass, no gradient).
        ranks: that share the parameters; J and L are then each rank's part of a sum, and all ranks must call this.

    Returns:
        The diagnostics.

    Raises:
        ValueError: if ``eta`` is negative or not finite, or nothing is trainable.
        FloatingPointError: if J, L or either gradient is not finite.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and >= 0, got {eta}")
    theta = [p for p in parameters if p.requires_grad]
    if not theta:
        raise ValueError("no parameter is trainable")
    difference, ascent = _gradient(theta, ascend, "the difference loss J", ranks)
    saved = [p.detach().clone() for p in theta]
    try:
        with torch.no_grad():
            for parameter, direction in zip(theta, ascent, strict=True):
                parameter.add_(direction, alpha=eta)
            displacement = _norm([p.detach() - s for p, s in zip(theta, saved, strict=True)])
            ascended = float(ranks.sum(ascend().detach())) if measure else None
        loss, gradient = _gradient(theta, descend, "the preference loss L at theta'", ranks)
    finally:
        with torch.no_grad():
            for parameter, original in zip(theta, saved, strict=True):
                parameter.copy_(original)
    for parameter, slope in zip(theta, gradient, strict=True):
        parameter.grad = slope
    scale, ascent_norm, gradient_norm = _norm(saved), _norm(ascent), _norm(gradient)
    norms = ascent_norm * gradient_norm
    return MetaStep(
        loss=loss,
        difference=difference,
        difference_ascended=ascended,
        displacement=displacement,
        relative_displacement=displacement / scale if scale > 0 else 0.0,
        ascent_norm=ascent_norm,
        gradient_norm=gradient_norm,
        alignment_cos=-_dot(gradient, ascent) / norms if norms > 0 else 0.0,
    )


def _gradient(
    theta: Sequence[nn.Parameter], objective: Callable[[], Tensor], name: str, ranks: Ranks
) -> tuple[float, list[Tensor]]:
    """Value and gradient of ``objective``; leaves every ``.grad`` empty."""
    for parameter in theta:
        parameter.grad = None
    try:
        objective_value = objective()
        value = float(ranks.sum(objective_value.detach()))
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
        torch.autograd.backward(objective_value)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
    finally:
        for parameter in theta:
            parameter.grad = None
    norm = _norm(gradient)
    if not math.isfinite(norm):
        raise FloatingPointError(f"{name} is {value}, its gradient's norm is {norm}")
    return value, gradient


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product over all parameters, at least float32 inside, float64 across them, summed over ranks."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        wide = torch.promote_types(a.dtype, torch.float32)
        part = (a.to(wide) * b.to(wide)).sum(dtype=torch.float64)
        total += float(part.full_tensor() if isinstance(part, DTensor) else part)
    return total


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(tensors, tensors))
