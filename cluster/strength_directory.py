"""The directory of a strength run: what is there stays, and belongs to one config and one data set.

STORAGE/strengths/NAME/
    begun.json         what the directory belongs to
    config.yaml        the resolved config
    versions.json      of what made it
    texts.parquet      the pairs in parts, a row group a part
    members/FOLD/...   each member whole, or not there (see rm.members)
    strengths/part-*.parquet   each part whole, or not there
    card.json          the sum of it all; there once the run is finished
    logs/              a file a process
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.hold import LOCK, Hold
from cluster.run_directory import config_text, is_there, made_and_locked, space_errors
from cluster.storage import storage_root
from cluster.versions import versions
from rm.member_settings import member_settings
from tokens.durable import write_file
from tokens.errors import UserError

LEFT_OUT = ("batch_size", "num_workers", "lora_rank", "lora_lr")
"""Keys of ``strength`` that change how long it takes, not what comes out, or that stand in the members' own settings."""


def settings(config: RunConfig) -> dict[str, Any]:
    """What of a config strengths depend on, flat; what is done with them afterwards (``data.denoise``) is left out.

    So is what changes speed only: how many sequences go through a member at once, and whether they are packed, unless dropout
    draws its random numbers for them together.

    Args:
        config: of a run.

    Returns:
        Values by key.
    """
    tree = config.model_dump(mode="json", include={"seed", "world", "data", "sft", "strength"})
    for key in ("denoise", "allow_hub"):
        del tree["data"][key]
    for key in LEFT_OUT:
        del tree["strength"][key]
    member = member_settings(config.reward, config.strength)
    adapted, dropped = member.lora.rank > 0, member.dropout > 0
    tree["reward"] = member.model_dump(mode="json", exclude={"start", "stop_on"})
    if not adapted:
        tree["reward"]["lora"] = {"rank": 0}
    if not (dropped or (adapted and member.lora.dropout > 0)):
        for key in ("microbatch_size", "backward_size", "packing"):
            del tree["reward"][key]
    shares = {"reward": config.resources.reward, "scorer": config.resources.scorer}
    tree["resources"] = {role: {"dtype": share.dtype} for role, share in shares.items()}
    return flat(tree)


def settings_sha256(config: RunConfig) -> str:
    """Digest of ``settings``."""
    return hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()


class StrengthDirectory:
    """One strength run's directory, locked to one driver while it is open.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = storage_root(config) / "strengths" / config.name
        self.begun: dict[str, Any] = {
            "config_sha256": settings_sha256(config),
            "settings": settings(config),
            "data_sha256": None,
        }
        self.hold = Hold(self.path, 0)  # nobody's: what is not open is not written to

    @property
    def card(self) -> Path:
        """The sum of it all; there once the run is finished."""
        return self.path / "card.json"

    @property
    def finished(self) -> bool:
        """True if there is nothing left to do."""
        return self.card.is_file()

    @property
    def logs(self) -> Path:
        """Log files, one a process."""
        return self.path / "logs"

    @property
    def texts(self) -> Path:
        """The pairs in parts."""
        return self.path / "texts.parquet"

    @property
    def strengths(self) -> Path:
        """Part files."""
        return self.path / "strengths"

    @property
    def attempts(self) -> Path:
        """What scoring processes are at, while they are; gone when the next call begins."""
        return self.path / ".attempts.partial"

    def members(self, fold: int) -> Path:
        """Members of a fold."""
        return self.path / "members" / str(fold)

    def inspect(self) -> None:
        """Read what the directory belongs to, if it is there; write nothing.

        Raises:
            UserError: if it belongs to another config or is no directory of ours.
        """
        if not is_there(self.path):
            return
        if (self.path / "begun.json").is_file():
            stored = json.loads((self.path / "begun.json").read_text())
            self._refuse_others(stored["settings"])
            self.begun = stored
        elif any(entry.name != LOCK for entry in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and no strength run; choose another name or storage root")

    def _refuse_others(self, there: dict[str, Any]) -> None:
        here = settings(self.config)
        hint = f"To go by these strengths nevertheless, or by any others, name their directory: data.denoise.strength {self.path}"
        refuse_differences(self.path, {key: value for key, value in there.items() if key in here}, here, hint)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make or continue the run; what an earlier driver left half-done is removed.

        Raises:
            UserError: as ``inspect``, or if another driver holds the directory, or the disk is full.
        """
        with made_and_locked(self.path) as self.hold:
            self.inspect()
            with space_errors(self.path):
                if not self.finished:
                    self._write_begun()
                    write_file(self.path / "config.yaml", config_text(self.config))
                    write_file(self.path / "versions.json", json.dumps(versions(), indent=1))
                self.strengths.mkdir(exist_ok=True)
                for fold in range(self.config.strength.folds):
                    self.members(fold).mkdir(parents=True, exist_ok=True)
                for folder in (self.path, self.strengths, *(self.members(fold) for fold in range(self.config.strength.folds))):
                    for left in folder.glob(".*.partial"):
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

    def refuse_other(self, data_sha256: str) -> None:
        """Stop if the directory belongs to other data.

        Args:
            data_sha256: fingerprint of the pairs, both splits.

        Raises:
            UserError: if it does.
        """
        if self.begun["data_sha256"] not in (None, data_sha256):
            raise UserError(
                f"the preference pairs are not those that {self.path} was begun with, although the config is the same: put the "
                "old files back, or choose another name"
            )

    def belong_to(self, data_sha256: str) -> None:
        """Note the data that the directory belongs to; as ``refuse_other`` where it belongs to some already."""
        self.refuse_other(data_sha256)
        self.begun["data_sha256"] = data_sha256
        self._write_begun()

    def _write_begun(self) -> None:
        self.hold.check()
        write_file(self.path / "begun.json", json.dumps(self.begun, indent=1))
