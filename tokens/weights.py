"""Weights on their way from one process to another: in chunks of bounded size, each one piece of memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokens.errors import UserError

ALIGNMENT = 64
"""Bytes; where a tensor begins in its chunk."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some named tensors, one after the other in one buffer.

    Args:
        names: of the tensors.
        dtypes: their torch types by name, as ``bfloat16``.
        shapes: of the tensors.
        buffer: [n] uint8; each tensor begins at a multiple of 64 bytes.

    Raises:
        ValueError: if the lists differ in length, or the buffer is shorter than they need.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    buffer: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError(f"{len(self.names)} names, {len(self.dtypes)} dtypes, {len(self.shapes)} shapes")
        needed = self._offsets()[-1]
        if self.buffer.nbytes < needed:
            raise ValueError(f"a buffer of {needed} bytes is expected for {self.names}, got {self.buffer.nbytes}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, without the gaps between them."""
        return sum(math.prod(shape) * _dtype(name).itemsize for name, shape in zip(self.dtypes, self.shapes, strict=True))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors under their names, on the CPU; they read the buffer, which must not be written to.

        Source: none needed.

        Returns:
            (name, tensor) in order.

        Padding contract: there is none.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a buffer in shared memory is read-only; nobody writes here
            flat = torch.from_numpy(self.buffer)
        found = []
        for name, kind, shape, start in zip(self.names, self.dtypes, self.shapes, self._offsets()[:-1], strict=True):
            dtype = _dtype(kind)
            size = math.prod(shape) * dtype.itemsize
            tensor = flat[start : start + size].view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
            found.append((name, tensor))
        return found

    def _offsets(self) -> list[int]:
        """Where each tensor begins, and the end."""
        starts, at = [], 0
        for name, shape in zip(self.dtypes, self.shapes, strict=True):
            starts.append(at)
            at += -(-math.prod(shape) * _dtype(name).itemsize // ALIGNMENT) * ALIGNMENT
        return [*starts, at]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def cast(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights in the type that their receiver computes in; tensors of whole numbers stay as they are.

    Source: none needed.

    Args:
        weights: (name, tensor).
        dtype: of the receiver.

    Returns:
        (name, tensor), one at a time.

    Padding contract: there is none.
    """
    for name, tensor in weights:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def in_chunks(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Chunk]:
    """Pack weights into chunks as they come; no more than one chunk is held here.

    Source: none needed.

    Args:
        weights: (name, tensor), on any device.
        max_bytes: a chunk is closed before it would grow beyond; a tensor that is larger makes one of its own.

    Returns:
        The chunks, one at a time.

    Raises:
        ValueError: if ``max_bytes`` is not positive.

    Padding contract: there is none.
    """
    if max_bytes <= 0:
        raise ValueError(f"a chunk has at least one byte, got max_bytes {max_bytes}")
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if held and size + tensor.nbytes > max_bytes:
            yield pack(held)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield pack(held)


def pack(weights: Sequence[tuple[str, Tensor]]) -> Chunk:
    """Copy tensors into one buffer.

    Source: none needed.

    Args:
        weights: (name, tensor), on any device.

    Returns:
        The chunk.

    Padding contract: there is none.
    """
    names = tuple(name for name, _ in weights)
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in weights)
    shapes = tuple(tuple(tensor.shape) for _, tensor in weights)
    total = sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in weights)
    buffer = torch.empty(total, dtype=torch.uint8)
    at = 0
    for _, tensor in weights:
        buffer[at : at + tensor.nbytes].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Chunk(names, dtypes, shapes, buffer.numpy())


def check_finite(model: nn.Module, path: object) -> None:
    """Refuse a loaded model with NaN or infinity among its weights, which would spread to everything that it touches.

    Args:
        model: as loaded.
        path: where from, for the message.

    Raises:
        UserError: naming the first such weight.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"the model in {path} has NaN or infinity in {name}: a run that diverged saved it. Use another")
