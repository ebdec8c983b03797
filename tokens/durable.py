"""Files and directories that are there or not: written beside their place, synced, renamed."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Replace a file in one step: written beside, synced, renamed. After an error the old one is as it was.

    Args:
        path: to replace.

    Yields:
        Where the new content is to be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step.

    Args:
        path: to replace.
        text: its new content.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Args:
        path: of the file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make durable what a file holds, or what a directory lists.

    Args:
        path: of the file or the directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make all that was written into a directory durable.

    Args:
        directory: with all that lies below it.
    """
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def draft_directory(final: Path) -> Path:
    """A new directory beside ``final``, of this process's own: to be written and given to ``commit_directory``.

    Those of other processes are removed: they died, or were given up, and may write into nobody else's.

    Args:
        final: the place that it is for.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.????????.partial"):
        shutil.rmtree(left, ignore_errors=True)
    draft = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    draft.mkdir()
    return draft


def commit_directory(partial: Path, final: Path, may_move: Callable[[], None] = lambda: None) -> None:
    """Make a written directory durable and move it to its place in one step.

    Args:
        partial: the directory, on the same file system.
        final: its place; must not exist.
        may_move: called once all is durable, which can take long, just before the move; raises where that is no longer allowed.
    """
    sync_tree(partial)
    may_move()
    os.replace(partial, final)
    sync(final.parent)


def replace_directory(partial: Path, final: Path, may_move: Callable[[], None] = lambda: None) -> None:
    """Make a written directory durable and put it in the place of another one in one step; that one is removed then.

    Where the file system cannot exchange two names (NFS), the old one is moved away first: for a moment there is none.

    Args:
        partial: the directory, on the same file system, under a name of ``draft_directory``.
        final: its place; a directory, or nothing.
        may_move: as in ``commit_directory``.
    """
    sync_tree(partial)
    may_move()
    if not final.exists():
        os.replace(partial, final)
        sync(final.parent)
        return
    old = partial
    if not exchange(partial, final):
        old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
        os.replace(final, old)
        os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(old)


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2: paths are as the process sees them; the two names change places."""


def exchange(one: Path, other: Path) -> bool:
    """Let two files or directories change places in one step, as Linux can on most local file systems.

    Args:
        one: of them.
        other: the other, on the same file system.

    Returns:
        Whether it could be done; if not, nothing has changed.

    Raises:
        OSError: if the disk refuses.
    """
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library["renameat2"]
    except AttributeError:  # another C library, or another system
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
