"""Processes that share one model: who does which rows, and how what they found becomes one again.

Letters: b rows of this rank, B rows of all ranks, s = ceil(B / number of ranks).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

STACKS = ("layers", "h")
"""What transformers calls a model's list of layers."""


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that share a model by FSDP2. Alone (the default), everything here is the identity.

    Every rank is handed the same data, takes its share of the rows, and divides by the *global* count; gradients and
    sums are added up over the ranks, never averaged. A method that communicates says so: all ranks must call it, in one order.

    Args:
        rank: of this process.
        size: processes that share the model.
        mesh: of these processes; None when alone.

    Raises:
        ValueError: if ``rank`` is not one of ``size``, or there are several ranks and no mesh of that size.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size}")
        if self.size > 1 and (self.mesh is None or self.mesh.size() != self.size):
            raise ValueError(f"{self.size} ranks need a mesh of {self.size} processes, got {self.mesh}")

    def share(self, index: Tensor) -> Tensor:
        """This rank's rows: every ``size``-th one. Where they do not divide evenly, the last row stands in.

        So every rank has equally many rows and makes equally many forward passes, which FSDP2 needs. ``num_own`` says how many
        of them count.

        Args:
            index: [B] int64, B >= 1.

        Returns:
            [s] int64, on the same device; ``index`` itself when alone.
        """
        if self.size == 1:
            return index
        positions = torch.arange(self.rank, -(-len(index) // self.size) * self.size, self.size, device=index.device)
        return index[positions.clamp(max=len(index) - 1)]

    def num_own(self, num_rows: int) -> int:
        """How many rows of ``share`` count; those after them stand in. 0 on some ranks where there are fewer rows than ranks."""
        return max(0, -(-(num_rows - self.rank) // self.size))

    def gather(self, x: Tensor, num_rows: int) -> Tensor:
        """All rows, in the order that ``share`` was given them; communicates.

        Args:
            x: [s, ...], a row for each of this rank's ``share``; the shape is equal on all ranks.
            num_rows: B.

        Returns:
            [B, ...], equal on all ranks, without gradient; ``x`` itself when alone.
        """
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, x.detach().contiguous(), group=self._group())
        return torch.stack(parts, 1).flatten(0, 1)[:num_rows]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, elementwise; communicates. NaN on one rank is NaN on all, so all of them notice.

        Args:
            x: any shape, equal on all ranks.

        Returns:
            The same shape, equal on all ranks, without gradient; ``x`` itself when alone.
        """
        return x if self.size == 1 else self._reduced(x, distributed.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Largest over the ranks, elementwise; communicates.

        Args:
            x: any shape, equal on all ranks.

        Returns:
            The same shape, equal on all ranks, without gradient; ``x`` itself when alone.
        """
        return x if self.size == 1 else self._reduced(x, distributed.ReduceOp.MAX)

    def shard(self, module: nn.Module, param_dtype: torch.dtype | None = None) -> None:
        """Keep only this rank's part of every parameter of ``module``, in place: each layer is a unit, the rest another.

        A unit's full weights exist only while it computes. Gradients arrive summed over the ranks. Call ``module`` itself:
        the units' weights are gathered by it. Every rank must hold equal weights when this is called. Nothing when alone.

        Args:
            module: the model, on the CPU or the mesh's device (it moves there unit by unit).
            param_dtype: that gathered weights are computed in; None = the weights' own. Gradients are reduced in float32.
        """
        if self.size == 1:
            return
        assert self.mesh is not None
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        stacks = [m for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] in STACKS]
        for unit in (*(layer for stack in stacks for layer in stack), module):
            # The root too: left gathered after a pass without gradient, it would hide the weights that the optimizer moves.
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=precision)
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole state dict of a module that may be sharded, or be part of one; communicates.

        Args:
            module: the model.

        Returns:
            On rank 0 the full tensors, on the CPU where they were sharded, tied weights still tied; on the others nothing.
        """
        if self.size == 1:
            return dict(module.state_dict())
        gathered: dict[int, Tensor] = {}
        names: dict[str, int] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            names[name] = id(tensor)
            if id(tensor) not in gathered:
                whole = full(tensor.detach())
                gathered[id(tensor)] = whole.to("cpu") if self.rank == 0 else whole.new_empty(0)
        return {name: gathered[key] for name, key in names.items()} if self.rank == 0 else {}

    def stream(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The state dict of a module that may be sharded, one whole tensor at a time; communicates with every tensor.

        All ranks must go through all of it. Nobody holds more of the model than its shards and what the caller keeps.

        Args:
            module: the model.

        Returns:
            (name, whole tensor), on every rank, without gradient, on the device that the module is on. A tied weight comes
            under each of its names: vLLM's reload leaves a tied output head as it was where the weight comes once only.
        """
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield name, full(tensor.detach())

    def _reduced(self, x: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        total = x.detach().clone()
        distributed.all_reduce(total, operation, group=self._group())
        return total

    def _group(self) -> distributed.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group()


ALONE = Ranks()


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that may be a shard; communicates if it is one.

    Args:
        x: a shard (DTensor) or a plain tensor.

    Returns:
        A plain tensor; ``x`` itself if it was one.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, pattern: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole.

    Args:
        x: any shape, equal on all ranks.
        pattern: the same shape; where it is a shard (DTensor), x is cut as it is.

    Returns:
        A DTensor as ``pattern`` is one; ``x`` itself if ``pattern`` is plain.
    """
    if not isinstance(pattern, DTensor):
        return x
    return distribute_tensor(x.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a global norm, as ``torch.nn.utils.clip_grad_norm_``, on shards as on plain tensors.

        g <- g * min(1, max_norm / (||g|| + 1e-6))

    Args:
        parameters: those without a gradient are left out.
        max_norm: the largest norm allowed.

    Returns:
        ||g|| before clipping, over all ranks; equal on all ranks.
    """
    clipped: Sequence[nn.Parameter] = [p for p in parameters if p.grad is not None]
    norm = full(nn.utils.get_total_norm([p.grad for p in clipped if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(clipped, max_norm, norm)
    return float(norm)


def weights_norm(parameters: Iterable[Tensor]) -> float:
    """Norm of weights, by which one that is NaN or infinite shows itself; communicates where they are shards.

    Args:
        parameters: of one model or of several on one device; at least one.

    Returns:
        One number for all of them, equal on all ranks; not finite if one of them is not.
    """
    return float(full(nn.utils.get_total_norm([p.detach() for p in parameters])))
