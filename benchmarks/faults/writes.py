"""SIGKILLs inside writes: a process writes checkpoints and reward models into a draft as a run does, until it is killed.

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
from cluster.draft import Draft

OUTSIDE, INSIDE = 0, 1
STATE_BYTES = 2
MOMENTS = (0.1, 2.6)
"""When a process is killed, in usual writes from its start: its first one takes longer, and some should come through."""
SHORTEST_S = 0.05
"""What a write is taken to need at least when a moment is drawn: a fork does not write at once."""
FRUITLESS = 10
"""After so many times the kills that are wanted it is an error that no write came through between them."""
FILES: Sequence[tuple[str, int]] = (
    ("policy/model.safetensors", 600_000), ("critic/model.safetensors", 600_000), ("learner.safetensors", 2_400_000),
)  # fmt: skip
"""Files as a learner of the bench's size saves them, in bytes; what stands in them tells one write from another."""


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


def killed(write: Callable[[int], None], first: int, delay_s: float, state: mmap.mmap) -> tuple[bool, int]:
    """Let a fork write again and again, and kill it.

    Args:
        write: writes number n.
        first: number of the first write.
        delay_s: until it is killed.
        state: shared with it: whether it is inside a write, and how many came through.

    Returns:
        Whether it was inside a write, and how many came through before.
    """
    state[:] = bytes((OUTSIDE, 0))
    child = os.fork()
    if child == 0:
        number = first
        while True:
            write(number)
            state[:] = bytes((OUTSIDE, min(255, number + 1 - first)))
            number += 1
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return state[0] == INSIDE, state[1]


class Kept:
    """What a draft keeps, written again and again with the run's own code.

    Args:
        folder: of the draft; made.
        state: two bytes that say whether a write is under way, and how many came through.
    """

    what = "checkpoint"

    def __init__(self, folder: Path, state: mmap.mmap) -> None:
        self.folder, self.state = folder, state
        folder.mkdir(parents=True)
        Draft(folder).begin(0, 0)

    def write(self, number: int) -> None:
        """Write number n: a checkpoint after n steps, of which two are kept."""
        Draft(self.folder).checkpoint(number, number, lambda place: self.save(place, number), 2, 0, {})

    def save(self, place: Path, number: int) -> None:
        """The files of number n; from here on a kill is inside a write, until the journal has its line."""
        self.state[0] = INSIDE
        write_state(place, number)

    def read(self) -> int:
        """As the next driver reads it: the number of the write that the journal vouches for.

        Raises:
            ValueError: if that is not what is there.
        """
        draft = Draft(self.folder)
        draft.check(lambda line: None)
        draft.tidy()
        return self.found(draft)

    def found(self, draft: Draft) -> int:
        """The same, of a draft that was looked through."""
        point = draft.point
        if point is None or point.place is None or readable(point.place) != point.steps:
            raise ValueError(f"the checkpoint is not that of {point}")
        return point.steps


class KeptModel(Kept):
    """The same of a reward model: a stage with a directory."""

    what = "reward model"

    def write(self, number: int) -> None:
        """Write number n."""
        draft = Draft(self.folder)
        place = draft.partial("reward")
        place.mkdir()
        self.save(place, number)
        draft.record("reward", ["reward"], {"number": number}, 0, {})

    def found(self, draft: Draft) -> int:
        """The number of the model; of the last that was whole, where a kill took the one after it."""
        entry = draft.done("reward")
        if entry is None:
            return -1
        if readable(draft / "reward") != entry.facts["number"]:
            raise ValueError(f"the reward model is not that of {entry.facts}")
        return int(entry.facts["number"])


def writes(record: Record, storage: Path, kills: int, seed: int = 0) -> None:
    """Kill writes and read what is left each time.

    Args:
        record: of what is found.
        storage: to write in.
        kills: inside a write; half of them of a checkpoint, half of a reward model.
        seed: of the moments.
    """
    import torch

    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    for kind in (Kept, KeptModel):
        place = storage / "writes" / kind.what.replace(" ", "_")
        shutil.rmtree(place, ignore_errors=True)
        with mmap.mmap(-1, STATE_BYTES) as state:
            counts = kill_writes(kind(place, state), kills // 2, random.Random(seed))
        record.write("writes", {"what": kind.what, **counts, "seed": seed})
        print(f"     {kind.what}: {counts['inside']} SIGKILLs inside writes, {counts['unreadable']} unreadable", flush=True)


def kill_writes(kept: Kept, kills: int, rng: random.Random) -> dict[str, float]:
    """Kill writes of one kind until enough were killed inside.

    Args:
        kept: what is written.
        kills: inside a write.
        rng: of the moments.

    Returns:
        How many were killed inside and outside of one, how many of them left something unreadable, how many writes came
        through, and how long one takes, s.
    """
    kept.write(1)  # with the imports that it needs
    began = time.perf_counter()
    kept.write(2)
    usual, latest = time.perf_counter() - began, 2
    counts = {"inside": 0, "outside": 0, "unreadable": 0, "came_through": 2}
    while counts["inside"] < kills or counts["came_through"] == 2:
        if counts["inside"] >= FRUITLESS * kills:
            raise RuntimeError("no write came through between the kills: they did not hit what they are meant for")
        inside, came_through = killed(kept.write, latest + 1, rng.uniform(*MOMENTS) * max(usual, SHORTEST_S), kept.state)
        counts["inside" if inside else "outside"] += 1
        counts["came_through"] += came_through
        try:
            found = kept.read()
            if came_through and found < latest + came_through:
                raise RuntimeError(f"write {latest + came_through} had come through, and {found} is what is there after the kill")
            latest = max(latest, found)
        except (ValueError, OSError) as error:
            counts["unreadable"] += 1
            print(f"     unreadable after a kill: {error}", flush=True)
    return {**counts, "one_write_s": usual}
