"""What differs between a config and the one that a directory was made with, and the one sentence that refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from tokens.errors import UserError


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as values by dotted key.

    Args:
        tree: sections in sections.
        prefix: of the keys.
    """
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


@cache
def _defaults() -> dict[str, Any]:
    return flat(RunConfig(name="default").model_dump(mode="json"))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs, in words.

    A key that one side lacks has its default there: a directory that was made before the key existed is still the same.

    Args:
        there: values by dotted key, as they were written down.
        here: likewise, of the config.

    Returns:
        ``key: old there, new here`` for each that differs.
    """
    changed = []
    for key in sorted({*there, *here}):
        old, new = (side[key] if key in side else _default(key) for side in (there, here))
        if old != new:
            changed.append(f"{key}: {old!r} there, {new!r} here")
    return changed


def _default(key: str) -> Any:
    return _defaults()[key] if key in _defaults() else None


def refuse_differences(path: Path | str, there: Mapping[str, Any], here: Mapping[str, Any], hint: str = "") -> None:
    """Stop where a directory was made with another config.

    Args:
        path: of the directory, or where it is in a store.
        there: as in ``differences``.
        here: likewise.
        hint: a further sentence for the message.

    Raises:
        UserError: naming every key that differs.
    """
    changed = differences(there, here)
    if changed:
        raise UserError(
            f"{path} belongs to another config ({'; '.join(changed)}). Put the old values back, choose another name, or remove "
            f"the directory if it is no longer needed{'. ' + hint if hint else ''}"
        )
