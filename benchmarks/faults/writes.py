"""SIGKILLs inside writes: a process writes checkpoints, reward models and rounds with the run's own code until it is killed.

Two hundred of them need no cluster: the process is a fork of this one, and says in shared memory when it is inside a write.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults.record import Record

OUTSIDE, INSIDE = 0, 1
FILES: Sequence[tuple[str, int]] = (
    ("policy/model.safetensors", 600_000), ("critic/model.safetensors", 600_000), ("learner.safetensors", 2_400_000),
)  # fmt: skip
"""What a learner of the bench's size writes, bytes."""


def write_state(place: Path, number: int) -> None:
    """Tensors that a reader can tell from those of any other write, and a JSON file.

    Args:
        place: directory to write into.
        number: of the write.
    """
    import torch
    from safetensors.torch import save_file

    for name, size in FILES:
        file = place / name
        file.parent.mkdir(exist_ok=True)
        save_file({f"tensor_{i}": torch.full((size // 40,), float(number)) for i in range(10)}, file)
    (place / "learner.json").write_text(json.dumps({"steps": number}))


def readable(place: Path) -> int:
    """The number of the write that a directory holds.

    Raises:
        ValueError: if it is not whole, or of two writes.
    """
    from safetensors.torch import load_file

    numbers = {json.loads((place / "learner.json").read_text())["steps"]}
    for name, _ in FILES:
        numbers |= {float(value) for tensor in load_file(place / name).values() for value in (tensor.min(), tensor.max())}
    if len(numbers) != 1:
        raise ValueError(f"{place} is of the writes {sorted(numbers)}")
    return int(numbers.pop())


def killed(write: Callable[[int], None], first: int, delay_s: float, state: mmap.mmap) -> bool:
    """Let a fork write again and again, and kill it.

    Args:
        write: writes number n.
        first: number of the first write.
        delay_s: until it is killed.
        state: shared with it.

    Returns:
        Whether it was inside a write.
    """
    state[0] = OUTSIDE
    child = os.fork()
    if child == 0:
        number = first
        while True:
            state[0] = INSIDE
            write(number)
            state[0] = OUTSIDE
            number += 1
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return state[0] == INSIDE


def writes(record: Record, storage: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill writes and read what is left each time.

    Args:
        record: of what is found.
        storage: to write in.
        kills: inside a write, of each kind.
        seed: of the moments.

    Returns:
        How many were killed inside a write, and how many of them left something unreadable.
    """
    from cluster.draft import Draft

    place, rng = storage / "writes", random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    draft_path = place / "draft"
    draft_path.mkdir(parents=True)
    Draft(draft_path).begin(0, 0)
    began = time.perf_counter()
    Draft(draft_path).checkpoint(1, 1, lambda there: write_state(there, 1), 2, 0, {})
    usual = time.perf_counter() - began
    counts = {"inside": 0, "outside": 0, "unreadable": 0}

    def write(number: int) -> None:
        Draft(draft_path).checkpoint(number, number, lambda there: write_state(there, number), 2, 0, {})

    with mmap.mmap(-1, 1) as state:
        latest = 1
        while counts["inside"] < kills:
            inside = killed(write, latest + 1, rng.uniform(0.2, 2.0) * usual, state)
            counts["inside" if inside else "outside"] += 1
            try:
                draft = Draft(draft_path)
                draft.check(lambda line: None)
                point = draft.point
                assert point is not None and point.place is not None
                found = readable(point.place)
                if found != point.steps or found < latest:
                    raise ValueError(f"write {found}, the journal says {point.steps}, {latest} was whole before")
                latest = found
            except (ValueError, OSError, AssertionError) as error:
                counts["unreadable"] += 1
                print(f"     unreadable after a kill: {error}", flush=True)
    record.write("writes", {"what": "checkpoint", **counts, "one_write_s": usual, "seed": seed})
    print(f"     checkpoints: {counts['inside']} SIGKILLs inside writes, {counts['unreadable']} unreadable", flush=True)
    return counts
