"""Layers that keep only their inputs for the backward pass."""

from __future__ import annotations

from torch import nn
from torch.distributed._composable import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tokens.errors import UserError


def recompute_layers(model: nn.Module) -> None:
    """Make every transformer layer keep only its input, and compute what lies between again in the backward pass.

    Args:
        model: of transformers, before it is sharded.

    Raises:
        UserError: if the architecture has no layers that can do so.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers that can recompute; set recompute_activations to false")
    for layer in layers:
        checkpoint(layer)
