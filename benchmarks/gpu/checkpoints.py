"""G10: how long a checkpoint keeps the learner from its work, against a copy of its state into pinned host memory.

The state is written as a round does it: models and optimizers as safetensors, digests, sync, rename, a line in the journal;
all of it while the learner waits. A write in the background would let it wait for the copy alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.device import computing, host_buffer, measured
from benchmarks.gpu.ppo import Kit, learner
from benchmarks.gpu.rows import Row, Scene, floor_row, row
from cluster.draft import Draft
from tokens.ranks import ALONE


def state_of(kit: Kit) -> dict[str, Tensor]:
    """All tensors that a checkpoint holds, where they lie."""
    ppo = kit.ppo
    found = {f"policy/{name}": tensor for name, tensor in ppo.policy.state_dict().items()}
    found |= {f"critic/{name}": tensor for name, tensor in ppo.critic.model.state_dict().items()}
    return found | {f"learner/{name}": tensor for name, tensor in ppo.state().tensors.items()}


def save(kit: Kit, out_dir: Path) -> None:
    """As the learner's process saves (``actors.learner``, which cannot be imported where there is no Ray).

    Args:
        kit: the learner.
        out_dir: of the checkpoint.
    """
    for name, model in (("policy", kit.ppo.policy), ("critic", kit.ppo.critic.model)):
        model.save_pretrained(out_dir / name, state_dict=ALONE.full_state(model))
    save_file(kit.ppo.state().tensors, out_dir / "learner.safetensors")


def stall(size: str, scene: Scene) -> Iterator[Row]:
    """The checkpoint, and both copies.

    Args:
        size: of each model.
        scene: of the measurement.
    """
    kind = scene.device.kind
    kit = learner(size, kind, scene.settings.small)
    with computing(kind):
        kit.update()  # which makes the optimizers' moments
    state = state_of(kit)
    pinned = {name: host_buffer(tensor) for name, tensor in state.items()}
    num_bytes = sum(tensor.nbytes for tensor in state.values())

    def snapshot() -> None:
        for name, tensor in state.items():
            pinned[name].copy_(tensor.detach(), non_blocking=True)

    with tempfile.TemporaryDirectory() as folder:
        draft, numbers = Draft(Path(folder)), count(1)
        draft.begin(0, 0)

        def checkpoint() -> None:
            number = next(numbers)
            draft.checkpoint(number, number, partial(save, kit), 1, 0, {})

        ways: dict[str, Callable[[], object]] = {
            "checkpoint": checkpoint,
            "snapshot": snapshot,
            "pageable": lambda: {name: tensor.detach().cpu() for name, tensor in state.items()},
        }
        found = measured(kind, ways, scene.settings.repetitions)
        figures = {"gb": num_bytes / 1e9, "gb_per_second": num_bytes / 1e9 / found.turns.seconds("checkpoint")}
        kept = same(draft, kit)
    yield row(("G10", f"checkpoint, {size}"), found, "checkpoint", "snapshot", 1.0, same_bits=kept, **figures)
    figures = {"gb": num_bytes / 1e9, "gb_per_second": num_bytes / 1e9 / found.turns.seconds("snapshot")}
    figures["pageable_seconds"] = found.turns.seconds("pageable")
    floor = num_bytes / scene.device.roofs.to_host
    yield floor_row(("G10", f"copy into pinned host memory, {size}"), found, "snapshot", floor, **figures)


def same(draft: Draft, kit: Kit) -> bool:
    """Whether the last checkpoint holds the optimizers' moments, bit for bit."""
    point = draft.point
    assert point is not None and point.place is not None
    stored = load_file(point.place / "learner.safetensors")
    own = kit.ppo.state().tensors
    return stored.keys() == own.keys() and all(bool((stored[name] == own[name].cpu()).all()) for name in own)
