"""Where else a run's commits go: nowhere, or into an object store (``cluster.store_mirror``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokens.errors import UserError

IDENTITY = ".working_directory"
"""File that tells one working directory from all others."""
Ledger = dict[str, Any]


@dataclass(frozen=True)
class Mirrored:
    """A run that is in a mirror.

    Args:
        place: its address, for people.
        ledger: what is committed there.
        config: that it was written with, as YAML.
    """

    place: str
    ledger: Ledger
    config: str


class Mirror(Protocol):
    """Where else a run's commits go."""

    def read(self) -> Mirrored | None:
        """What is there; None if there is no run."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep other drivers out of it meanwhile."""

    def saved_steps(self, name: str) -> int:
        """PPO steps of the last checkpoint in the draft of a round there; 0 where it is not there, whole."""

    def fetch(self, name: str, into: Path) -> None:
        """Bring a directory here."""

    def fetch_rest(self) -> None:
        """Bring all else that is there: numbers, logs, the report."""

    def send(self, names: list[str], ledger: Ledger) -> None:
        """Copy committed directories there, and the ledger after them."""

    def send_draft(self, name: str) -> None:
        """Copy the draft of a round under way."""

    def drop(self, name: str) -> None:
        """Remove a directory."""

    def send_rest(self) -> None:
        """Copy what changed of all that is not committed: numbers, logs, the report."""


class NoMirror:
    """The storage is the working directory itself."""

    def read(self) -> None:
        """There is none."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The directory's own lock is enough."""
        yield

    def saved_steps(self, name: str) -> int:
        """It is where it belongs."""
        return 0

    def fetch(self, name: str, into: Path) -> None:
        """Nothing can be missing."""
        raise AssertionError(f"{name} cannot be anywhere else")

    def fetch_rest(self) -> None:
        """Nothing can be missing."""

    def send(self, names: list[str], ledger: Ledger) -> None:
        """It is where it belongs."""

    def send_draft(self, name: str) -> None:
        """It is where it belongs."""

    def drop(self, name: str) -> None:
        """It was never there."""

    def send_rest(self) -> None:
        """It is where it belongs."""


def entries(ledger: Ledger) -> list[Any]:
    """What a ledger has committed, in order: its start, its rounds."""
    return [*([ledger["start"]] if ledger["start"] else []), *ledger["rounds"]]


def newer(here: Ledger, there: Ledger, path: Path, place: str) -> Ledger:
    """Of two ledgers of a run the one that goes on from the other.

    Args:
        here: of the working directory.
        there: of the store.
        path: of the working directory.
        place: of the run in the store.

    Returns:
        ``there`` if it has what ``here`` has, and more; ``here`` if it has what ``there`` has.

    Raises:
        UserError: if neither goes on from the other.
    """
    ours, theirs = entries(here), entries(there)
    shared = min(len(ours), len(theirs))
    if ours[:shared] != theirs[:shared]:
        differ = next(index for index in range(shared) if ours[index] != theirs[index])
        what = f"round {differ - 1}" if differ else "start"
        raise UserError(
            f"{path} ({len(here['rounds'])} rounds) and {place} ({len(there['rounds'])} rounds) are two histories of one run: "
            f"their {what} is not the same. Move one of them away, or choose another name"
        )
    return there if len(theirs) > len(ours) else here
