"""Where `sft` writes: STORAGE/sft/NAME, a plain Hugging Face directory that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.hold import Hold, TakenOver
from cluster.run_directory import config_text, is_there, made_and_locked
from cluster.storage import storage_root
from cluster.versions import versions
from tokens.durable import commit_directory, write_file
from tokens.errors import UserError

CARD = "card.json"
KIND = "sft"
LEARNT_FROM = ("seed", "world", "data", "sft")
"""Sections of the config that say what the model is."""


def learnt_from(config: RunConfig) -> dict[str, Any]:
    """What of a config the model depends on, flat; ``data.denoise`` has no say in it."""
    tree = config.model_dump(mode="json")
    return {
        key: value
        for key, value in flat({section: tree[section] for section in LEARNT_FROM}).items()
        if not key.startswith("data.denoise.")
    }


class SFTDirectory:
    """One model's directory. Until it is done, a hidden one beside it holds the lock, the logs and the draft.

    Args:
        config: of the command.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = storage_root(config) / "sft" / config.name
        self.working = self.path.with_name(f".{config.name}")
        self.card: dict[str, Any] | None = None
        self.hold = Hold(self.working, 0)  # nobody's: what is not open is not written to

    @property
    def logs(self) -> Path:
        """Log files, one a process; they move into the finished directory."""
        return self.working / "logs"

    def inspect(self) -> None:
        """Read the card if there is one; write nothing.

        Raises:
            UserError: if the directory belongs to another config or is not one of `sft`.
        """
        if not is_there(self.path):
            return
        card = json.loads((self.path / CARD).read_text()) if (self.path / CARD).is_file() else {"kind": None}
        if card["kind"] != KIND:
            raise UserError(f"{self.path} is not a directory that `sft` wrote; choose another name or storage root")
        there, here = flat(yaml.safe_load((self.path / "config.yaml").read_text())), learnt_from(self.config)
        refuse_differences(self.path, {key: value for key, value in there.items() if key in here}, here)
        self.card = card

    def refuse_other(self, data_sha256: str) -> None:
        """Stop if the model that is there was trained on other texts.

        Args:
            data_sha256: digest of the texts, see ``preferences.texts.fingerprint``.

        Raises:
            UserError: if it was.
        """
        if self.card is not None and self.card["data_sha256"] != data_sha256:
            raise UserError(
                f"the texts are not those that the model in {self.path} was trained on, although the config is the same: put the "
                "old files back, choose another name, or remove the directory to train it again"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[Path]:
        """Keep other drivers out, and give a draft to write the model into; what an earlier driver left is removed.

        Raises:
            UserError: as ``inspect``, or if another driver is at work.
        """
        with made_and_locked(self.working) as self.hold:
            self.inspect()
            for left in self.working.glob("draft*"):
                shutil.rmtree(left, ignore_errors=True)
            draft = self.working / f"draft.{uuid.uuid4().hex[:8]}"
            try:
                if self.card is None:
                    draft.mkdir()
                yield draft
            except FileNotFoundError:  # another driver clears away what was begun here, and in the end its own traces as well
                if not self.working.is_dir() and self.path.is_dir():
                    raise TakenOver(f"{self.path}: another driver has taken over and is done") from None
                self.hold.check()
                raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                if self.path.is_dir() and self.working.is_dir() and self.hold.lasts:
                    shutil.rmtree(self.working)

    def commit(self, draft: Path, card: dict[str, Any]) -> None:
        """Complete the draft and give it its name, in one step.

        Args:
            draft: with model and tokenizer.
            card: what there is to say of the model; the kind is added.

        Raises:
            TakenOver: if another driver is at work by now.
        """
        self.hold.check()  # it has cleared the draft away, too
        write_file(draft / "config.yaml", config_text(self.config))
        write_file(draft / "versions.json", json.dumps(versions(), indent=1))
        if self.logs.is_dir():
            shutil.copytree(self.logs, draft / "logs")
        whole = {"kind": KIND, **card}
        write_file(draft / CARD, json.dumps(whole, indent=1))
        commit_directory(draft, self.path, self.hold.check)
        self.card = whole
