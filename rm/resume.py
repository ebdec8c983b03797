"""How far a fit has come, as a state that another process goes on from to the same bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm.records import MetaStep, RewardStep
from rm.spread import Separation
from tokens.ranks import full, shard_like
from tokens.saved_state import SavedState

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Saves:
    """Saving how far a fit has come while it runs.

    Args:
        every: steps between two saves, >= 1.
        write: called with the number of steps behind the fit and its state; on every rank, where rank 0 alone has the tensors.
        begin: the state to go on from; None = from the beginning.

    Raises:
        ValueError: if ``every`` is below 1.
    """

    every: int
    write: Callable[[int, SavedState], None]
    begin: SavedState | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"saving needs every >= 1, got {self.every}")


def weights_and_moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on rank 0 of those that share the model; communicates.

    Args:
        parameters: that are trained, by name.
        optimizer: AdamW over them.

    Returns:
        Keyed ``weights/NAME`` and ``MOMENT/NAME``.
    """
    kept: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parts = {"weights": parameter.detach()} | {
            moment: optimizer.state[parameter][moment] for moment in MOMENTS if parameter in optimizer.state
        }
        for part, tensor in parts.items():
            whole = full(tensor.detach())
            if holds(parameter):
                kept[f"{part}/{name}"] = whole.to("cpu", copy=True).contiguous()
    return kept


def holds(parameter: nn.Parameter) -> bool:
    """True on the rank that writes: the only one, or rank 0."""
    return not isinstance(parameter, DTensor) or parameter.device_mesh.get_local_rank() == 0


def put_back(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take weights and moments over.

    Args:
        parameters: as in ``weights_and_moments``.
        optimizer: as there.
        tensors: what it gave.

    Raises:
        KeyError: if a parameter is missing.
    """
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(order):
        name = names[id(parameter)]
        with torch.no_grad():
            parameter.copy_(shard_like(tensors[f"weights/{name}"].to(parameter.device), parameter))
        if f"step/{name}" in tensors:
            moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS[1:]}
            state[index] = {"step": tensors[f"step/{name}"].clone()} | {
                moment: shard_like(tensor.clone(), parameter) for moment, tensor in moments.items()
            }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def best_weights(parameters: Mapping[str, nn.Parameter], copies: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights of the best measurement, whole; communicates.

    Args:
        parameters: of the model that are trained, by name.
        copies: this rank's part of each, in the same order; none where there is no best measurement yet.

    Returns:
        On the CPU, keyed ``best/NAME``, on rank 0 of those that share the model.
    """
    kept: dict[str, Tensor] = {}
    for (name, parameter), own in zip(parameters.items() if copies else (), copies, strict=True):
        whole: Tensor = own
        if isinstance(parameter, DTensor):
            parts = (parameter.device_mesh, parameter.placements)
            whole = full(DTensor.from_local(own.to(parameter.device), *parts, shape=parameter.shape, stride=parameter.stride()))
        if holds(parameter):
            kept[f"best/{name}"] = whole.to("cpu", copy=True).contiguous()
    return kept


def own_parts(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's part of the best weights.

    Args:
        parameters: of the model that are trained, by name.
        tensors: what ``best_weights`` gave, among others.

    Returns:
        On the CPU, in the order of ``parameters``; none where there was no best measurement yet.
    """
    found: list[Tensor] = []
    for name, parameter in parameters.items():
        if f"best/{name}" not in tensors:
            return []
        part = shard_like(tensors[f"best/{name}"].to(parameter.device), parameter)
        found.append((part.to_local() if isinstance(part, DTensor) else part).to("cpu", copy=True))
    return found


def step_from(stored: Mapping[str, Any]) -> RewardStep:
    """A step from what ``dataclasses.asdict`` made of it, and JSON left of that."""
    meta = stored["meta"]
    if meta is None:
        return RewardStep(**stored)
    looks = {name: None if meta[name] is None else Separation(**meta[name]) for name in ("heldout", "heldout_ascended")}
    return RewardStep(**{**stored, "meta": MetaStep(**{**meta, **looks})})


def numbers_of(steps: Sequence[RewardStep], best_value: float) -> dict[str, Any]:
    """The steps so far and the best measurement, fit for JSON."""
    return {"steps": [dataclasses.asdict(step) for step in steps], "best_value": None if best_value == -math.inf else best_value}
