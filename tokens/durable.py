"""Files and directories that are there or not: written beside their place, synced, renamed."""

from __future__ import annotations

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
