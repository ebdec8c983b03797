"""How far a long piece of work has come, in a directory of its own: tensors in safetensors, the rest in JSON, no pickle.

A state is two files, NUMBER.OWN.safetensors and NUMBER.OWN.json. The tensors are written first, then the JSON, which holds their
digest; each is written beside its place, synced and renamed. A kill at any moment leaves the state before, or the new one, never
half of one. OWN is another one with every write: a process that was given up, and is at it still, writes into no other's files.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tokens.durable import digest_of_file, whole_file, write_file


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
    name = f"{number:08d}.{uuid.uuid4().hex[:8]}"
    tensors, record = folder / f"{name}.safetensors", folder / f"{name}.json"
    with whole_file(tensors) as partial:
        save_file(dict(state.tensors), partial)
    write_file(record, json.dumps({"sha256": digest_of_file(tensors), "values": dict(state.values)}))
    for file in folder.iterdir():
        if not file.name.startswith(".") and file.name < f"{number:08d}":  # nothing newer, and nothing that another is writing
            file.unlink(missing_ok=True)


def latest_state(folder: Path) -> SavedState | None:
    """The newest state that is whole; None where there is none.

    Args:
        folder: of the work; may be missing.
    """
    for record in sorted(folder.glob("*.json"), reverse=True):
        tensors = record.with_suffix(".safetensors")
        try:
            stored = json.loads(record.read_text())
            if digest_of_file(tensors) == stored["sha256"]:
                return SavedState(load_file(tensors), stored["values"])
        except ValueError:
            continue
        except FileNotFoundError:
            if not record.exists():  # a process that was given up has saved a newer one meanwhile
                return latest_state(folder)
    return None
