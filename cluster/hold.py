"""One driver at a time on a directory: a lock keeps others out, and a mark says whose it is.

A lock is not all: a mount may have none that other machines see, and one that ends with a lease is gone when its holder was
frozen or cut off for longer. So each driver that comes leaves a mark with the next number, the directory's *epoch*, and looks for
it before whatever it writes down. One that finds another's mark is no longer the driver, and stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from tokens.errors import UserError

LOCK = ".lock"
"""File in the directory: locked by its driver, who writes its mark into it."""


class TakenOver(UserError):
    """Another driver has the directory."""


class Hold:
    """A driver's hold on a directory.

    Args:
        path: of the directory.
        epoch: how many drivers it has had, with this one.
    """

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch
        self.mark = json.dumps({"epoch": epoch, "host": socket.gethostname(), "pid": os.getpid(), "driver": uuid.uuid4().hex})

    @property
    def lasts(self) -> bool:
        """False once another driver has left its mark.

        Raises:
            OSError: if the directory cannot be read.
        """
        try:
            return (self.path / LOCK).read_bytes() == self.mark.encode()
        except FileNotFoundError:
            if not self.path.is_dir():
                raise
            return False

    def check(self) -> None:
        """Look whether the directory is still this driver's; to be asked before it is written to.

        Raises:
            TakenOver: if it is not.
            OSError: if it cannot be read.
        """
        if not self.lasts:
            raise TakenOver(
                f"{self.path}: another driver has taken over{holder(self.path)}; this one, of epoch {self.epoch}, writes nothing "
                "there any more. Let the other one finish. If this one was neither frozen nor cut off, the mount has no locks "
                "that both machines see: docs/storage.md"
            )


def holder(path: Path) -> str:
    """Who left the last mark in a directory, in words to put behind others; "" where there is none that can be read.

    Args:
        path: of the directory.
    """
    try:
        mark = json.loads((path / LOCK).read_text())
        return f" (process {mark['pid']} on {mark['host']}, epoch {mark['epoch']})"
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Hold]:
    """Keep other drivers out of a directory, and mark it as one's own.

    Args:
        path: of the directory.

    Raises:
        UserError: if another driver holds it.
    """
    with (path / LOCK).open("a+", errors="replace") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another driver is running in {path}{holder(path)}; wait for it, stop it, or choose another name"
            ) from None
        lock.seek(0)
        hold = Hold(path, _epoch(lock.read()) + 1)
        lock.truncate(0)
        lock.write(hold.mark)
        lock.flush()
        os.fsync(lock.fileno())
        yield hold


def _epoch(mark: str) -> int:
    """The number in a mark; 0 where no driver has left one, the machine went down while it was written, or it is no mark."""
    try:
        return int(json.loads(mark)["epoch"])
    except (ValueError, TypeError, KeyError):
        return 0
