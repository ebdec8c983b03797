"""The directory of a reward run: STORAGE/rewards/NAME, complete once it has a card, and then never written to again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.hold import LOCK, Hold
from cluster.run_directory import config_text, is_there, made_and_locked
from cluster.storage import storage_root
from cluster.versions import versions
from tokens.durable import commit_directory, write_file
from tokens.errors import UserError

CARD, CONFIG = "card.json", "config.yaml"
KIND = "reward"
LEARNT_FROM = ("seed", "world", "data", "sft", "reward", "meta")
"""Sections of the config that say what the reward model is; of the others ``strength`` alone can have a part in it."""
SPEED = ("batch_size", "num_workers", "rows_per_block")
"""Keys of ``strength`` that change how long it takes, not what comes out."""
ADAPTERS = ("lora_rank", "lora_lr")
"""Keys of ``strength`` that members of kind "lora" alone have a use for."""
DRAFT, FITS, FITS_OF = ".draft", ".fits", "of"


def learnt_from(config: RunConfig) -> dict[str, Any]:
    """What of a config the reward model depends on, flat.

    Where ``data.denoise`` goes by the strengths of the config's own name, what they are is part of it.

    Args:
        config: of the command.

    Returns:
        Values by key.
    """
    tree = config.model_dump(mode="json")
    kept = {section: tree[section] for section in LEARNT_FROM}
    if config.data.denoise.method != "none" and config.data.denoise.strength is None:
        unused = SPEED if config.strength.members == "lora" else (*SPEED, *ADAPTERS)
        kept["strength"] = {key: value for key, value in tree["strength"].items() if key not in unused}
    return flat(kept)


class RewardDirectory:
    """One reward run's directory, locked to one driver while it is open.

    Args:
        config: of the command.
    """

    kind, folder, sections = KIND, "rewards", LEARNT_FROM

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = storage_root(config) / self.folder / config.name
        self.card: dict[str, Any] | None = None
        self.hold = Hold(self.path, 0)  # nobody's: what is not open is not written to

    @property
    def logs(self) -> Path:
        """Log files, one a process."""
        return self.path / "logs"

    @property
    def fits(self) -> Path:
        """How far fits have come that are not done; gone when the model is."""
        return self.path / FITS

    def inspect(self) -> None:
        """Read the card if there is one; write nothing.

        Raises:
            UserError: if the directory belongs to another config or is not a reward run's.
        """
        if not is_there(self.path):
            return
        card = json.loads((self.path / CARD).read_text()) if (self.path / CARD).is_file() else None
        ours = (self.path / CONFIG).is_file() and (card is None or card["kind"] == self.kind)
        if not ours and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise UserError(
                f"{self.path} is not empty and not a {self.kind} run's directory; choose another name or storage root"
            )
        if card is not None:
            self._refuse_others()
            self.card = card

    def _refuse_others(self) -> None:
        there, here = flat(yaml.safe_load((self.path / CONFIG).read_text())), self.learnt_from()
        kept = {key: value for key, value in there.items() if key in here or key.split(".")[0] in self.sections}
        refuse_differences(self.path, kept, here)

    def learnt_from(self) -> dict[str, Any]:
        """What of the config the model depends on, flat."""
        return learnt_from(self.config)

    def learnt_sha256(self) -> str:
        """Digest of it."""
        return hashlib.sha256(json.dumps(self.learnt_from(), sort_keys=True).encode()).hexdigest()

    def refuse_other(self, pairs_sha256: str) -> None:
        """Stop if the model that is there was made of other pairs.

        Args:
            pairs_sha256: digest of the pairs, see ``cluster.reward_inputs.pairs_sha256``.

        Raises:
            UserError: if it was.
        """
        if self.card is not None and "pairs_sha256" in self.card and self.card["pairs_sha256"] != pairs_sha256:
            raise UserError(
                f"the preference pairs are not those that the model in {self.path} was made of, although the config is the same: "
                "put the old files back, choose another name, or remove the directory to train it again"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[RewardDirectory]:
        """Make or find the directory; what an earlier driver left without a card is removed, its logs apart, and how far it had
        come with the same model.

        Raises:
            UserError: as ``inspect``, or if another driver holds the directory.
        """
        with made_and_locked(self.path) as self.hold:
            self.inspect()
            if self.card is None:
                write_file(self.path / CONFIG, config_text(self.config))  # from now on the directory is known
                self._keep_fits()
                for entry in self.path.iterdir():
                    if entry.is_dir() and entry not in (self.logs, self.fits):
                        shutil.rmtree(entry)
                    elif entry.is_file() and entry.name not in (LOCK, CONFIG):
                        entry.unlink()
                write_file(self.path / "versions.json", json.dumps(versions(), indent=1))
            yield self

    def _keep_fits(self) -> None:
        """Keep how far fits have come if they are of this config's model, computed in the same numbers."""
        of, mine = self.fits / FITS_OF, f"{self.learnt_sha256()} {self.config.resources.reward.dtype}"
        if not of.is_file() or of.read_text() != mine:
            shutil.rmtree(self.fits, ignore_errors=True)
            self.fits.mkdir()
            write_file(of, mine)

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A directory of this driver's own to write models and tables into; gone again if it is not committed."""
        draft = self.path / f"{DRAFT}.{uuid.uuid4().hex[:8]}"
        draft.mkdir()
        try:
            yield draft
        except FileNotFoundError:
            self.hold.check()  # one that took over has cleared away what was begun here
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def commit(self, draft: Path, card: dict[str, Any]) -> None:
        """Move everything in the draft to its place, and write the card last.

        Args:
            draft: as ``draft`` gave it.
            card: what there is to say of the model; kind and digest are added.

        Raises:
            TakenOver: if another driver has the directory by now.
        """
        self.hold.check()  # it has cleared the draft away, too
        for entry in sorted(draft.iterdir()):
            commit_directory(entry, self.path / entry.name, self.hold.check)  # a file was synced when it was written
        whole = {"kind": self.kind, "config_sha256": self.learnt_sha256(), **card}
        self.hold.check()
        write_file(self.path / CARD, json.dumps(whole, indent=1))
        self.hold.check()
        shutil.rmtree(self.fits)
        self.card = whole
