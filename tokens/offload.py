"""Models and optimizers that rest in host memory while another computes on their device, and come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

KEPT = "step"
"""State of torch's optimizers that stays where they made it: AdamW counts its steps on the CPU."""


def move_module(module: nn.Module, device: torch.device | str) -> None:
    """Move parameters, their gradients and buffers, in place: parameters stay the objects that an optimizer holds.

    What goes from a GPU to the host lies in pinned memory there, so that both ways run at the link's full speed; shards (FSDP2)
    go to memory that is not pinned. Each rank moves its own part; nothing is communicated.

    Source: none needed.

    Args:
        module: plain, or sharded by FSDP2; tied weights stay tied.
        device: to move to.

    Raises:
        RuntimeError: if the host or the device has no room.

    Padding contract: there is none.
    """
    target = torch.device(device)
    with torch.no_grad():
        module._apply(lambda tensor: _moved(tensor, target))  # sees a tied weight twice, and finds it moved the second time
    _settle(target)


def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Move the moments of every parameter, tensor by tensor, in place. Counts of steps stay where the optimizer keeps them.

    Source: none needed.

    Args:
        optimizer: of torch; its state may be empty, or shards.
        device: to move to.

    Raises:
        RuntimeError: if the host or the device has no room.

    Padding contract: there is none.
    """
    target = torch.device(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != KEPT:
                state[name] = _moved(value, target)
    _settle(target)


@contextmanager
def present(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """On the device for as long as the context lasts, then in host memory again.

    Source: none needed.

    Args:
        module: frozen, or nothing that trains it is called meanwhile.
        device: where it computes.

    Returns:
        The context.

    Padding contract: there is none.
    """
    move_module(module, device)
    try:
        yield
    finally:
        move_module(module, "cpu")


def _moved(tensor: Tensor, target: torch.device) -> Tensor:
    if tensor.device.type == target.type:
        return tensor
    if target.type == "cpu" and not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(target, non_blocking=True)


def _settle(target: torch.device) -> None:
    """Wait for the copies, and give what they left on the GPU back to the processes that share it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if target.type == "cpu":
            torch.cuda.empty_cache()
