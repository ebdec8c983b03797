"""The journal of a draft: which of its stages are done. Only ever appended to; what it says is durable before it is relied on.

Each line carries the digest of itself and of the line before, so a line that was changed, lost or exchanged is noticed. A kill
in the middle of a write can only cut the last line, which is then left out: the stage that it was about is done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokens.durable import sync
from tokens.errors import UserError

NAME = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """A stage that is done, or stages that no longer are.

    Args:
        key: of the stage, such as ``reward`` or ``rollouts 3``.
        facts: what the stage came to.
        outputs: SHA-256 of each file that it left, by its path in the draft.
        metrics_bytes: length of metrics.jsonl when it was done.
        seconds: of each phase of the round so far.
        undone: stages that do not count from here on.
    """

    key: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    metrics_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    undone: tuple[str, ...] = ()


def digest_of(entry: Entry, before: str) -> str:
    """SHA-256 of an entry and of what came before it.

    Args:
        entry: to be written.
        before: digest of the line before; "" for the first.
    """
    return hashlib.sha256((before + json.dumps(dataclasses.asdict(entry), sort_keys=True)).encode()).hexdigest()


class Journal:
    """The journal in a draft, read when it is made.

    Args:
        folder: the draft.
        may_write: called before each line is written; raises where that is no longer allowed.

    Raises:
        UserError: if a line that is not the last one is damaged.
    """

    def __init__(self, folder: Path, may_write: Callable[[], None] = lambda: None) -> None:
        self.path, self.may_write = folder / NAME, may_write
        self.entries: list[Entry] = []
        """All of them, oldest first; what no longer counts too."""
        self.alive: dict[str, Entry] = {}
        """What counts, oldest first."""
        self.cut: str | None = None
        """The end of a line that a kill cut short; None where there is none."""
        self._digest, self._size = "", 0
        if self.path.exists():
            self._read(self.path.read_bytes())

    def _read(self, content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines):
            parsed = self._parsed(line)
            if parsed is not None:
                self._take(*parsed, line)
            elif number < len(lines) - 1:
                raise UserError(
                    f"{self.path} is damaged: line {number + 1} of {len(lines)} is not the one that was written, so it cannot be "
                    f"known what of the round is done. Put the right file back, or delete {self.path.parent} to play the round "
                    "from its beginning"
                )
            else:
                self.cut = line.decode(errors="replace")

    def _parsed(self, line: bytes) -> tuple[Entry, str] | None:
        """The entry and its digest; None if the line is not what was written."""
        try:
            stored = json.loads(line)
            entry = Entry(**(stored["entry"] | {"undone": tuple(stored["entry"]["undone"])}))
            digest = digest_of(entry, self._digest)
            return (entry, digest) if line.endswith(b"\n") and stored["sha256"] == digest else None
        except (ValueError, TypeError, KeyError):
            return None

    def _take(self, entry: Entry, digest: str, line: bytes) -> None:
        self._digest, self._size = digest, self._size + len(line)
        self.entries.append(entry)
        for key in entry.undone:
            self.alive.pop(key, None)
        if entry.key != UNDONE:
            self.alive.pop(entry.key, None)
            self.alive[entry.key] = entry

    def append(self, entry: Entry) -> None:
        """Write an entry, and wait until it is durable.

        Args:
            entry: to be written; its outputs are durable already.

        Raises:
            TakenOver: if the draft belongs to another driver by now.
            UserError: if somebody else wrote into it.
            OSError: if the disk refuses. The journal is then as it was before.
        """
        self.may_write()
        digest = digest_of(entry, self._digest)
        line = (json.dumps({"entry": dataclasses.asdict(entry), "sha256": digest}) + "\n").encode()
        new = not self.path.exists()
        with self.path.open("ab") as file:
            there = os.fstat(file.fileno()).st_size
            if there != self._size:
                if self.cut is None:
                    raise UserError(
                        f"{self.path} has {there} bytes, expected {self._size} as this driver left it: another process wrote "
                        "there. Nothing of it was changed; stop the other one, and give the same command again"
                    )
                file.truncate(self._size)  # of what a kill or a full disk cut short
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                self.cut = line.decode()
                os.truncate(self.path, self._size)
                raise
        if new:
            sync(self.path.parent)
        self.cut = None
        self._take(entry, digest, line)

    def undo(self, keys: tuple[str, ...], why: str) -> None:
        """Let stages no longer count.

        Args:
            keys: of these.
            why: in words.
        """
        self.append(Entry(UNDONE, {"why": why}, undone=keys))


UNDONE = "undone"
"""Key of entries that are no stage themselves."""
