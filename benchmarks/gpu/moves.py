"""G6 and G7 without an engine: weights on their way out of the learner, and a learner that leaves its GPU and comes back.

``store``: gathered, cast to bfloat16 and packed into host memory, the learner's part of ``rollout.sync: store``. ``ipc``:
packed on the GPU and copied by another process from there, which is what passes between learner and engine with ``ipc``.
The cycle moves policy, critic, reference and both optimizers' moments to pinned host memory and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.device import computing, measured, wait_for
from benchmarks.gpu.models import language_model
from benchmarks.gpu.ppo import learner
from benchmarks.gpu.rows import Row, Scene, floor_row
from tokens.offload import move_module
from tokens.ranks import ALONE
from tokens.weights import cast, in_chunks

CHUNK, PIECE = 256 << 20, 128 << 20
"""Bytes of a chunk that travels through the store; numbers of a piece that another process copies."""


def out(size: str, scene: Scene) -> Iterator[Row]:
    """Both ways out of the learner.

    Args:
        size: of the policy.
        scene: of the measurement.
    """
    kind, roofs = scene.device.kind, scene.device.roofs
    policy = language_model("tiny" if scene.settings.small else size, kind)
    num_bytes = 2 * sum(p.numel() for p in policy.parameters())

    def store() -> None:
        for _ in in_chunks(cast(ALONE.stream(policy), torch.bfloat16), CHUNK):
            pass

    with other_process(policy) as hand_over:
        ways: dict[str, Callable[[], object]] = {"store": store, "ipc": hand_over}
        found = measured(kind, ways, scene.settings.repetitions)
    floors = {"store": num_bytes / roofs.to_host, "ipc": 2 * num_bytes / roofs.bandwidth}
    for way, floor in floors.items():
        speed = num_bytes / 1e9 / found.turns.seconds(way)
        what = "packed for the store" if way == "store" else "copied by another process"
        yield floor_row(("G6", f"weights {what}, {size}"), found, way, floor, gb=num_bytes / 1e9, gb_per_second=speed)


@contextmanager
def other_process(policy: nn.Module) -> Iterator[Callable[[], None]]:
    """A process that copies what it is handed; gives what hands it all weights, and waits until it has them."""
    context = torch.multiprocessing.get_context("spawn")
    pieces, taken = context.Queue(), context.Queue()
    child = context.Process(target=_take, args=(pieces, taken), daemon=True)
    child.start()
    last = len(policy.state_dict())

    def hand_over() -> None:
        piece: list[torch.Tensor] = []
        for number, (_, tensor) in enumerate(ALONE.stream(policy), 1):
            piece.append(tensor.to(torch.bfloat16).flatten())
            if sum(x.numel() for x in piece) >= PIECE or number == last:
                packed = torch.cat(piece)
                wait_for("cuda" if packed.is_cuda else "cpu")
                pieces.put(packed)
                taken.get(timeout=120)
                piece.clear()

    try:
        yield hand_over
    finally:
        pieces.put(None)
        child.join(20)


def _take(pieces: Any, taken: Any) -> None:
    while (piece := pieces.get()) is not None:
        torch.empty_like(piece).copy_(piece)
        wait_for("cuda" if piece.is_cuda else "cpu")
        del piece
        taken.put(True)


def cycle(size: str, scene: Scene) -> Iterator[Row]:
    """A learner rests and wakes.

    Args:
        size: of each model.
        scene: of the measurement.
    """
    kind, roofs = scene.device.kind, scene.device.roofs
    kit = learner(size, kind, scene.settings.small)
    with computing(kind):
        kit.update()
    models: tuple[nn.Module, ...] = (kit.ppo.policy, kit.ppo.critic, kit.ppo.reference)
    held = sum(p.nbytes for model in models for p in model.parameters())
    held += sum(tensor.nbytes for tensor in kit.ppo.state().tensors.values())
    took: dict[str, list[float]] = {"cpu": [], kind: []}
    left: list[float] = []

    def move(device: str) -> None:
        began = time.perf_counter()
        move_module(kit.ppo.policy, device)
        kit.ppo.move_training_state(device)
        took[device].append(time.perf_counter() - began)
        left.append(torch.cuda.memory_allocated() / (1 << 30))

    def there_and_back() -> None:
        move("cpu")
        move(kind)

    found = measured(kind, {"cycle": there_and_back}, scene.settings.repetitions)
    figures = {"gb": held / 1e9, "gib_left": min(left), "first_rest_gb_per_second": held / 1e9 / took["cpu"][0]}
    for name, device in (("rest", "cpu"), ("wake", kind)):
        figures[f"{name}_gb_per_second"] = held / 1e9 / (sum(took[device][1:]) / len(took[device][1:]))
    floor = held / roofs.to_host + held / roofs.from_host
    yield floor_row(("G7", f"learner rests and wakes, {size}"), found, "cycle", floor, **figures)
