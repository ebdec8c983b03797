"""The device that is measured: what its datasheet says, what it does in this process, and clocks that wait for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.ratios.frame import Turns, take_turns

Kind = Literal["cpu", "cuda"]
PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b|\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bGH200\b|\bH200\b|\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b", 165e12),
)
"""Dense bfloat16 FLOP/s by what the name holds, as NVIDIA's datasheets say; the first that fits counts."""
PRODUCT, COPY = {"cuda": 8192, "cpu": 256}, {"cuda": 2 << 30, "cpu": 1 << 20}
"""Side of the square matrices and bytes of the buffer that the roofs are measured with."""
GIB = 1 << 30


def datasheet_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU; None for one that is not in the list.

    Args:
        name: as CUDA has it, e.g. ``NVIDIA H100 80GB HBM3``.
    """
    return next((flops for pattern, flops in PEAKS if re.search(pattern, name)), None)


@dataclass(frozen=True)
class Roofs:
    """What the device did in this process: the limits that the cases are held against.

    Args:
        flops: FLOP/s of a square bfloat16 product of random numbers (float32 on the CPU).
        bandwidth: bytes/s of a copy within its memory, read and written.
        to_host: bytes/s into pinned host memory.
        from_host: bytes/s out of it.
    """

    flops: float
    bandwidth: float
    to_host: float
    from_host: float


@dataclass(frozen=True)
class Device:
    """Where a case runs.

    Args:
        kind: of torch.
        name: of the GPU.
        peak_flops: its datasheet's; None where that is not known.
        roofs: measured.
    """

    kind: Kind
    name: str
    peak_flops: float | None
    roofs: Roofs


def find_device(kind: Kind) -> Device:
    """Look at the device, and measure its roofs.

    Args:
        kind: of torch.
    """
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    return Device(kind, name, datasheet_flops(name), measure_roofs(kind))


def measure_roofs(kind: Kind) -> Roofs:
    """The best of three of each, after a warm-up.

    Args:
        kind: of torch.
    """
    side, size = PRODUCT[kind], COPY[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=kind, dtype=dtype) for _ in range(2))
    flops = 10 * 2 * side**3 / _best(kind, lambda: [a @ b for _ in range(10)])
    there, other = (torch.empty(size, dtype=torch.uint8, device=kind) for _ in range(2))
    host = host_buffer(there)
    copies: tuple[Callable[[], Any], ...] = (
        lambda: other.copy_(there), lambda: host.copy_(there, non_blocking=True), lambda: there.copy_(host, non_blocking=True),
    )  # fmt: skip
    within, out, back = (_best(kind, copy) for copy in copies)
    return Roofs(flops, 2 * size / within, size / out, size / back)


def host_buffer(like: torch.Tensor) -> torch.Tensor:
    """Host memory of a tensor's size and type, pinned where there is a GPU to copy it.

    Args:
        like: any shape, dtype and device.

    Returns:
        The same shape and dtype, uninitialised.
    """
    return torch.empty_like(like, device="cpu", pin_memory=like.device.type == "cuda")


def wait_for(kind: Kind) -> None:
    """Until the device has done what it was given."""
    if kind == "cuda":
        torch.cuda.synchronize()


def _best(kind: Kind, work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(4):
        wait_for(kind)
        began = time.perf_counter()
        work()
        wait_for(kind)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


@dataclass(frozen=True)
class Measured:
    """Turns of several ways, and what each held at most.

    Args:
        turns: seconds, which end when the device has done the work.
        peaks: GiB of the device's memory that were allocated at most within a turn, all that lay there before included; by the
            name of the way, None on the CPU.
    """

    turns: Turns
    peaks: Mapping[str, float | None]


def measured(
    kind: Kind, ways: Mapping[str, Callable[[], object]], repetitions: int, prepare: Callable[[str], None] = lambda name: None
) -> Measured:
    """Let the ways take turns on the device; see ``take_turns``.

    Args:
        kind: of torch.
        ways: by name.
        repetitions: turns that count.
        prepare: called with the name of the way before each of its turns; not timed.
    """
    peaks: dict[str, float] = dict.fromkeys(ways, 0.0)

    def ready(name: str) -> None:
        prepare(name)
        wait_for(kind)
        if kind == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def whole(name: str) -> None:
        ways[name]()
        wait_for(kind)
        if kind == "cuda":
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / GIB)

    turns = take_turns({name: (lambda name=name: whole(name)) for name in ways}, repetitions, prepare=ready)  # type: ignore[misc]
    return Measured(turns, {name: peak if kind == "cuda" else None for name, peak in peaks.items()})


@contextmanager
def computing(kind: Kind) -> Iterator[None]:
    """What the actors compute in with ``dtype: bfloat16`` on a GPU: trained weights stay float32. On the CPU, float32."""
    if kind == "cpu":
        yield
        return
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        yield
