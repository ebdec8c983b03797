"""What differentiating through theta' adds: the product of J's Hessian with a vector."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokens.errors import UserError


def hessian_product(objective: Callable[[], Tensor], theta: Sequence[nn.Parameter], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v, by differentiating <grad f(theta), v> once more; no matrix is made.

    The forward pass runs with the mathematical form of attention, since no fused kernel can be differentiated twice; the choice
    holds within this call only. Leaves every ``.grad`` as it was.

    Source: Pearlmutter 1994; here with f = J and v = grad L(theta'), for d/dtheta L(theta + eta grad J(theta)).

    Args:
        objective: returns f, a scalar that depends on theta.
        theta: the parameters, plain tensors.
        vector: v, a tensor per parameter and of its shape.

    Returns:
        H v, a tensor per parameter.

    Raises:
        UserError: if an operation of the model has no second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            slope = torch.autograd.grad(objective(), theta, create_graph=True, materialize_grads=True)
            inner = sum((s * v.detach()).sum() for s, v in zip(slope, vector, strict=True))
            assert isinstance(inner, Tensor)
            if not inner.requires_grad:  # f is linear in theta
                return [torch.zeros_like(p) for p in theta]
            return list(torch.autograd.grad(inner, theta, materialize_grads=True))
    except RuntimeError as error:
        if "derivative" in str(error) and "not implemented" in str(error):
            raise UserError(
                f"meta.order is 2, but this model cannot be differentiated twice: {error}. Load it with eager or sdpa attention, "
                "or set meta.order to 1."
            ) from error
        raise
