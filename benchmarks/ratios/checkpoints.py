"""C9: what a checkpoint costs the learner, and what a kill inside one leaves, against ``torch.save`` in place. No Ray.

The same state is written as a round does it (safetensors beside the place, digests, sync, rename, a line in the journal), by
``torch.save`` over the file before, by that and a sync, and into memory alone: the least that a write in the background would let
the learner wait, and the limit. Then processes that write in the first two ways are killed.
"""

from __future__ import annotations

import mmap
import random
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.faults.writes import FILES, INSIDE, STATE_BYTES, Kept, kill_writes
from benchmarks.ratios.frame import take_turns
from benchmarks.ratios.rows import Row, Settings, row
from cluster.draft import Draft
from tokens.durable import sync

SIZES = {False: (240.0, 50), True: (0.5, 2)}
"""Megabytes of the state, and kills of each way; by whether it is to be small."""
SHARES = {"policy/model": 1, "critic/model": 1, "learner": 4}
"""Files of a learner's state, and how many numbers they have for each weight of a model: AdamW has two moments of each weight."""
TENSORS = 12
"""Tensors in each model."""


def learner_state(megabytes: float) -> dict[str, dict[str, Tensor]]:
    """Random numbers of about so many MB, by file and name."""
    generator = torch.Generator().manual_seed(0)
    length = int(megabytes * 1e6 / 4 / sum(SHARES.values()) / TENSORS)
    return {
        file: {f"tensor_{i}": torch.randn(length, generator=generator) for i in range(TENSORS * share)}
        for file, share in SHARES.items()
    }


def ways(folder: Path, state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Callable[[], object]]:
    """How the state can be written, by name."""
    draft = folder / "draft"
    draft.mkdir()
    Draft(draft).begin(0, 0)
    plain, numbers = folder / "state.pt", count(1)

    def save(place: Path) -> None:
        for file, tensors in state.items():
            path = place / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(dict(tensors), path)

    def checkpoint() -> None:
        number = next(numbers)
        Draft(draft).checkpoint(number, number, save, 1, 0, {})

    def in_place(synced: bool) -> None:
        torch.save(state, plain)
        if synced:
            sync(plain)

    return {
        "checkpoint": checkpoint,
        "torch.save": partial(in_place, False),
        "torch.save, synced": partial(in_place, True),
        "copy": lambda: {file: {name: x.clone() for name, x in part.items()} for file, part in state.items()},
    }


class InPlace(Kept):
    """A state of the bench's size that ``torch.save`` writes over the one before."""

    what = "torch.save in place"

    def write(self, number: int) -> None:
        """Write number n."""
        tensors = {name: torch.full((size // 4,), float(number)) for name, size in FILES}
        self.state[0] = INSIDE
        torch.save(tensors, self.folder / "state.pt")

    def read(self) -> int:
        """The number of the write that is there; the file is looked at as the archive of plain numbers that it is, not loaded.

        Raises:
            ValueError: if it is not whole; it is written anew then, so that the next kill finds a whole one.
        """
        try:
            return self._read()
        except ValueError:
            self.write(0)
            raise

    def _read(self) -> int:
        try:
            with zipfile.ZipFile(self.folder / "state.pt") as archive:
                damaged = archive.testzip()
                first = next(name for name in archive.namelist() if name.endswith("/data/0"))
                (number,) = struct.unpack("<f", archive.read(first)[:4])
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from error
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        return int(number)


def unreadable(folder: Path, kills: int) -> dict[str, int]:
    """How many of so many SIGKILLs inside a write left nothing that can be read, by the way of writing."""
    found: dict[str, int] = {}
    for name, kind in (("checkpoint", Kept), ("torch.save", InPlace)):
        with mmap.mmap(-1, STATE_BYTES) as state:
            found[name] = int(kill_writes(kind(folder / name, state), kills, random.Random(0))["unreadable"])
    return found


def same(folder: Path, state: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the last checkpoint of a draft holds the state, bit for bit."""
    point = Draft(folder).point
    assert point is not None and point.place is not None
    for file, tensors in state.items():
        found = load_file(point.place / f"{file}.safetensors")
        if found.keys() != tensors.keys() or not all(torch.equal(found[name], tensors[name]) for name in tensors):
            return False
    return True


def measure(settings: Settings) -> Iterator[Row]:
    """In the temporary directory, which should lie on the disk that runs lie on; on one thread, for the processes are forks."""
    megabytes, kills = SIZES[settings.small]
    settings = replace(settings, threads=1)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        state = learner_state(megabytes)
        turns = take_turns(ways(folder, state), settings.repetitions)
        kept = "the same" if same(folder / "draft", state) else "other"
        left = unreadable(folder / "kills", kills)
    finally:
        shutil.rmtree(folder)
    equality = (
        f"{kept} bits come back; unreadable after {kills} kills: {left['checkpoint']}, and {left['torch.save']} of torch.save"
    )
    figures = {"megabytes": megabytes, "kills": kills, "unreadable": left}
    for case, other in (("checkpoint", "torch.save"), ("checkpoint, against one that is synced", "torch.save, synced")):
        limit = turns.ratio("copy", other).middle
        yield row(("C9", case), turns, ("checkpoint", other), settings, limit, equality, **figures)
