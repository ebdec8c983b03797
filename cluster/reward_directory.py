"""The directory of a reward run: STORAGE/rewards/NAME, complete once it has a card, and then never written to again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.run_directory import commit_directory, config_text, is_there, locked, storage_root, versions, write_file
from tokens.errors import UserError

CARD = "card.json"
KIND = "reward"
LEARNT_FROM = ("seed", "world", "data", "sft", "reward", "meta")
"""Sections of the config that say what the reward model is; the others have no part in it."""
DRAFT = ".draft"


def reward_sha256(config: RunConfig) -> str:
    """Digest of all of the config that says what the reward model is."""
    tree = config.model_dump(mode="json")
    return hashlib.sha256(json.dumps({key: tree[key] for key in LEARNT_FROM}, sort_keys=True).encode()).hexdigest()


class RewardDirectory:
    """One reward run's directory, locked to one driver while it is open.

    Args:
        config: of the command.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = storage_root(config) / "rewards" / config.name
        self.card: dict[str, Any] | None = None

    @property
    def logs(self) -> Path:
        """Log files, one a process."""
        return self.path / "logs"

    def inspect(self) -> None:
        """Read the card if there is one; write nothing.

        Raises:
            UserError: if the directory belongs to another config or is not a reward run's.
        """
        if not is_there(self.path):
            return
        if (self.path / CARD).is_file():
            card = json.loads((self.path / CARD).read_text())
            if card["kind"] != KIND or card["config_sha256"] != reward_sha256(self.config):
                raise UserError(self._difference())
            self.card = card
        elif any(entry.name != ".lock" for entry in self.path.iterdir()) and not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path} is not empty and not a reward run's directory; choose another name or storage root")

    def _difference(self) -> str:
        there = yaml.safe_load((self.path / "config.yaml").read_text())
        here = self.config.model_dump(mode="json")
        changed = [
            f"{key}: {old!r} there, {new!r} here"
            for section in LEARNT_FROM
            for key, old, new in _changes(section, there[section] if section in there else None, here[section])
        ]
        return (
            f"the reward directory {self.path} belongs to another config ({'; '.join(changed)}). "
            "Choose another name, or remove the directory if it is no longer needed"
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[RewardDirectory]:
        """Make or find the directory; what an earlier driver left without a card is removed, its logs apart.

        Raises:
            UserError: as ``inspect``, or if another driver holds the directory.
        """
        with locked(self.path):
            self.inspect()
            if self.card is None:
                for entry in self.path.iterdir():
                    if entry.is_dir() and entry != self.logs:
                        shutil.rmtree(entry)
                    elif entry.is_file() and entry.name != ".lock":
                        entry.unlink()
                write_file(self.path / "config.yaml", config_text(self.config))
                write_file(self.path / "versions.json", json.dumps(versions(), indent=1))
            yield self

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A directory to write models and tables into; gone again if it is not committed."""
        draft = self.path / DRAFT
        draft.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def commit(self, draft: Path, card: dict[str, Any]) -> None:
        """Move everything in the draft to its place, and write the card last.

        Args:
            draft: as ``draft`` gave it.
            card: what there is to say of the model; kind and digest are added.
        """
        for entry in sorted(draft.iterdir()):
            commit_directory(entry, self.path / entry.name)  # a file was synced when it was written
        whole = {"kind": KIND, "config_sha256": reward_sha256(self.config), **card}
        write_file(self.path / CARD, json.dumps(whole, indent=1))
        self.card = whole


def _changes(key: str, there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = sorted(there.keys() | here.keys())
        return [
            change
            for name in names
            for change in _changes(f"{key}.{name}", there[name] if name in there else None, here[name] if name in here else None)
        ]
    return [] if there == here else [(key, there, here)]
