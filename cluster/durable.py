"""Files and directories that are there or not: written beside their place, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step: written beside, synced, renamed.

    Args:
        path: to replace.
        text: its new content.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make durable what a directory lists, or what a file holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make all that was written into a directory durable."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync_directory(Path(folder) / name)
        sync_directory(Path(folder))


def commit_directory(partial: Path, final: Path) -> None:
    """Make a written directory durable and move it to its place in one step.

    Args:
        partial: the directory, on the same file system.
        final: its place; must not exist.
    """
    sync_tree(partial)
    os.replace(partial, final)
    sync_directory(final.parent)
