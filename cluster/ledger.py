"""ledger.json as it is read back: written by this format, whole, and about rounds that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokens.errors import UserError

FORMAT = 1
"""Of ledger.json; a change that an older reader would misread raises it."""
REMEDY = "put back a copy of the directory, or choose another name"


def read_ledger(run: Path) -> dict[str, Any]:
    """Read a run's ledger.

    Args:
        run: the run's directory.

    Returns:
        It, with ``format``, ``config_sha256``, ``start`` and ``rounds``.

    Raises:
        UserError: if it is damaged, has another format, or names what is not there.
    """
    path = run / "ledger.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error
    stored = parse_ledger(text, path)
    gone = [name for name in _named(stored) if not (run / name).exists()]
    if gone:
        raise UserError(f"{path} is damaged ({gone[0]} is not there): {REMEDY}")
    return stored


def parse_ledger(text: str, path: Path | str) -> dict[str, Any]:
    """A ledger from its text, wherever its rounds are.

    Args:
        text: of the file.
        path: of it, for messages.

    Returns:
        As ``read_ledger``.

    Raises:
        UserError: if it is damaged or has another format.
    """
    remedy = REMEDY
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(stored, dict) or "format" not in stored or stored["format"] != FORMAT:
        has = stored["format"] if isinstance(stored, dict) and "format" in stored else None
        if isinstance(has, int) and has > FORMAT:
            remedy = "it was written by a newer Rondo; continue it with that, or choose another name"
        raise UserError(f"{path} has format {has!r}, this version reads {FORMAT}: {remedy}")
    problem = _problem(stored)
    if problem:
        raise UserError(f"{path} is damaged ({problem}): {remedy}")
    return stored


def _problem(stored: dict[str, Any]) -> str | None:
    kinds = {"config_sha256": str, "start": dict | None, "rounds": list}
    for key, kind in kinds.items():
        if key not in stored or not isinstance(stored[key], kind):
            return f"{key} is {'missing' if key not in stored else 'of the wrong kind'}"
    rounds = stored["rounds"]
    for index, entry in enumerate(rounds):
        if not isinstance(entry, dict) or "round" not in entry or entry["round"] != index:
            return f"entry {index} of rounds is not that of round {index}"
    return "it holds rounds and no start" if rounds and stored["start"] is None else None


def _named(stored: dict[str, Any]) -> list[str]:
    """Files and directories that must be there."""
    rounds = [f"rounds/round_{index:03d}" for index in range(len(stored["rounds"]))]
    return ["config.yaml", "start", *rounds] if stored["start"] is not None else []
