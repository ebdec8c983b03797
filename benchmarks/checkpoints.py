"""What a checkpoint costs the learner, and what a kill inside one leaves: ``python -m benchmarks.checkpoints``. No Ray.

The same state is written in four ways, in turns, so that whatever else the machine does falls on all of them: as a round does it
(safetensors beside the place, digests, sync, rename, a line in the journal), by ``torch.save`` in place, by that and a sync, and
into memory alone, which is the least that a write in the background would let the learner wait. The shortest time of each counts.
Then processes that write in the first two ways are killed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.faults.writes import FILES, INSIDE, Kept, kill_writes
from cluster.draft import Draft
from tokens.durable import sync

RESULTS = Path(__file__).resolve().with_name("results") / "checkpoints.jsonl"
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


def ways(folder: Path, state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Callable[[int], object]]:
    """How the state can be written, by name; each is told the number of the write."""
    draft = folder / "draft"
    draft.mkdir()
    Draft(draft).begin(0, 0)
    plain = folder / "state.pt"

    def save(place: Path) -> None:
        for file, tensors in state.items():
            path = place / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(dict(tensors), path)

    def in_place(synced: bool) -> None:
        torch.save(state, plain)
        if synced:
            sync(plain)

    return {
        "checkpoint": lambda number: Draft(draft).checkpoint(number, number, save, 1, 0, {}),
        "torch_save": lambda number: in_place(False),
        "torch_save_synced": lambda number: in_place(True),
        "copy": lambda number: {file: {name: x.clone() for name, x in part.items()} for file, part in state.items()},
    }


def shortest(named: Mapping[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Seconds of each way's fastest write; the first of each is left out."""
    found: dict[str, list[float]] = {name: [] for name in named}
    for number in range(1, repeats + 2):
        for name, write in named.items():
            began = time.perf_counter()
            write(number)
            found[name].append(time.perf_counter() - began)
    return {name: min(seconds[1:]) for name, seconds in found.items()}


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


def unreadable(folder: Path, kills: int) -> dict[str, float]:
    """How many of so many SIGKILLs inside a write left nothing that can be read, by the way of writing."""
    found: dict[str, float] = {}
    for name, kind in (("checkpoint", Kept), ("torch_save", InPlace)):
        with mmap.mmap(-1, 1) as state:
            found[name] = kill_writes(kind(folder / name, state), kills, random.Random(0))["unreadable"]
    return found


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, print, write down.

    Args:
        arguments: of the command line; None = the process's own.
        results: file to write the row into.

    Returns:
        The row.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=240.0, help="of the learner's state (default 240)")
    parser.add_argument("--repeats", type=int, default=7, help="writes of each way (default 7)")
    parser.add_argument("--kills", type=int, default=50, help="inside a write, of each way (default 50)")
    parser.add_argument("--folder", type=Path, default=None, help="to write in (default: a temporary one)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        state = learner_state(chosen.megabytes)
        seconds = shortest(ways(folder, state), chosen.repeats)
        left = unreadable(folder / "kills", chosen.kills)
    finally:
        shutil.rmtree(folder)
    ratios = {f"{name}_ratio": took / seconds["torch_save"] for name, took in seconds.items() if name != "torch_save"}
    row = {"megabytes": chosen.megabytes, "repeats": chosen.repeats, "seconds": seconds, **ratios}
    row |= {"kills": chosen.kills, "unreadable": left}
    results.write_text(json.dumps(row) + "\n")
    for name, took in seconds.items():
        print(f"{name:18} {took:7.3f} s  {took / seconds['torch_save']:6.2f} of torch.save in place")
    words = ", ".join(f"{name} {number}" for name, number in left.items())
    print(f"unreadable after {chosen.kills} SIGKILLs inside a write: {words}")
    return row


if __name__ == "__main__":
    main()
