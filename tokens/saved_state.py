"""How far a long piece of work has come, in a directory of its own: tensors in safetensors, the rest in JSON, no pickle.

A state is two files. The tensors are written first, then the JSON, which holds their digest; each is written beside its place,
synced and renamed. A kill at any moment leaves the state before, or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SavedState:
    """A state.

    Args:
        tensors: by name, contiguous, on the CPU.
        values: fit for JSON.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_state(folder: Path, number: int, state: SavedState) -> None:
    """Write a state; the earlier ones go after that.

    Args:
        folder: of the work; made if it is missing.
        number: of the state, larger than all before.
        state: to write.

    Raises:
        OSError: if the disk refuses. The earlier states are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, record = folder / f"{number:08d}.safetensors", folder / f"{number:08d}.json"
    partial = folder / f".{tensors.name}.partial"
    save_file(dict(state.tensors), partial)
    digest = _sync_and_digest(partial)
    os.replace(partial, tensors)
    partial = folder / f".{record.name}.partial"
    partial.write_text(json.dumps({"sha256": digest, "values": dict(state.values)}))
    _sync_and_digest(partial)
    os.replace(partial, record)
    _sync(folder)
    for file in folder.iterdir():
        if file not in (tensors, record):
            file.unlink()


def latest_state(folder: Path) -> SavedState | None:
    """The newest state that is whole; None where there is none.

    Args:
        folder: of the work; may be missing.
    """
    for record in sorted(folder.glob("*.json"), reverse=True):
        tensors = record.with_suffix(".safetensors")
        try:
            stored = json.loads(record.read_text())
        except ValueError:
            continue
        if tensors.is_file() and _sync_and_digest(tensors) == stored["sha256"]:
            return SavedState(load_file(tensors), stored["values"])
    return None


def _sync_and_digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
