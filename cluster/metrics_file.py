"""The record of a run's numbers, taken back to where a round goes on: no row is there twice, and none is missing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from tokens.durable import write_file

EVENTS = ("pool", "faults")
"""Phases whose rows tell what happened: that is not undone when a round goes back."""


NONE = -1
"""Rounds that are there before ``start/`` is."""


def forget_rows(path: Path, mark: int, rounds: int = NONE) -> None:
    """Keep the rows up to a place; of the later ones those of events, and those of rounds that stay.

    Args:
        path: metrics.jsonl; may be missing.
        mark: bytes that stay whatever they hold.
        rounds: rounds that stay, ``start/`` with them; ``NONE`` = not even that.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content[:mark].decode()
    for line in content[mark:].decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line, if a kill cut it
            row = json.loads(line)
            if row["round"] < rounds or row["phase"] in EVENTS:
                kept += line + "\n"
    if kept.encode() != content:
        write_file(path, kept)
