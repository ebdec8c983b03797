"""AdamW whose state is a flat dict of tensors keyed by parameter name, so that safetensors can hold it."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokens.guards import FINITE, BadNumber
from tokens.offload import move_optimizer
from tokens.ranks import clip_gradients, full, shard_like

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class NamedAdamW:
    """AdamW (betas .9, .95, no weight decay) over one module's parameters, with gradient clipping by global norm.

    Where several ranks share the model (``Ranks.shard``), all of them must call ``clip``, ``state`` and ``load``. The state is
    whole, on rank 0, so that any number of ranks can continue from it.

    Args:
        module: the model; already sharded where it will be.
        lr: learning rate.
        max_grad_norm: gradients with a larger norm are scaled down to it.
    """

    def __init__(self, module: nn.Module, lr: float, max_grad_norm: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._max_grad_norm = max_grad_norm
        self._adamw = torch.optim.AdamW(self._parameters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def clip(self, what: str, where: str) -> float:
        """Scale the gradients down to ``max_grad_norm`` where they are larger.

        Args:
            what: whose gradient it is, for the error.
            where: round, update and minibatch, likewise.

        Returns:
            The gradient norm before clipping.

        Raises:
            BadNumber: if the norm is not finite; the weights are as they were.
        """
        norm = clip_gradients(self._parameters.values(), self._max_grad_norm)
        if not math.isfinite(norm):
            raise BadNumber(f"the {what}'s gradient norm", norm, FINITE, where)
        return norm

    def step(self) -> None:
        """Step, and clear the gradients."""
        self._adamw.step()
        self._adamw.zero_grad()

    def clear(self) -> None:
        """Drop gradients that were accumulated and will not be used."""
        self._adamw.zero_grad()

    def move(self, device: torch.device | str) -> None:
        """Move the moments.

        Source: none needed.

        Args:
            device: to move to; they must be back with the parameters before ``step``.

        Padding contract: there is none.
        """
        move_optimizer(self._adamw, device)

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of every moment and step count, keyed ``parameter/moment``; empty before the first step.

        Where several ranks share the model, rank 0 has them and the others nothing: eight bytes a parameter are more than a
        machine can hold once for each of its GPUs.
        """
        kept: dict[str, Tensor] = {}
        for name, p in self._parameters.items():
            for moment in MOMENTS if p in self._adamw.state else ():
                whole = full(self._adamw.state[p][moment].detach())
                if not isinstance(p, DTensor) or p.device_mesh.get_local_rank() == 0:
                    kept[f"{name}/{moment}"] = whole.to("cpu", copy=True).contiguous()
        return kept

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state.

        Args:
            tensors: what ``state`` gave.

        Raises:
            ValueError: if a name or a shape is not this module's, or a moment is missing.
        """
        names = {key.rpartition("/")[0] for key in tensors}
        expected = {f"{name}/{moment}" for name in names for moment in MOMENTS}
        unknown, missing = sorted(names - set(self._parameters)), sorted(expected - set(tensors))
        if unknown or missing:
            raise ValueError(f"optimizer state does not fit the model: unknown parameters {unknown}, missing tensors {missing}")
        for name in names:
            if tensors[f"{name}/exp_avg"].shape != self._parameters[name].shape:
                raise ValueError(
                    f"optimizer state of {name} has shape {tuple(tensors[f'{name}/exp_avg'].shape)}, "
                    f"the parameter {tuple(self._parameters[name].shape)}"
                )
        moments = {
            index: {
                "step": tensors[f"{name}/step"].clone(),
                **{moment: shard_like(tensors[f"{name}/{moment}"].clone(), p) for moment in MOMENTS[1:]},
            }
            for index, (name, p) in enumerate(self._parameters.items())
            if name in names
        }
        self._adamw.load_state_dict({"state": moments, "param_groups": self._adamw.state_dict()["param_groups"]})
