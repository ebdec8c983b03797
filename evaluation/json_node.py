"""JSON objects read with care: a missing or wrong key is named in full, never guessed. And rows, written as lines of them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tokens.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class JsonNode:
    """A JSON object that knows where it stands, so that a wrong key is named in full."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise UserError(f"{where} must be a JSON object, got {type(raw).__name__}")
        self._raw, self._where = raw, where

    def value(self, key: str) -> object:
        """The value of a key that must be there."""
        if key not in self._raw:
            raise UserError(f"{self._where} has no key {key!r}; it has {', '.join(map(repr, self._raw)) or 'none'}")
        return self._raw[key]

    def has(self, key: str) -> bool:
        """Whether a key is there, which older files need not have."""
        return key in self._raw

    def optional(self, key: str) -> float | None:
        """A finite number, or null."""
        value = self.value(key)
        return None if value is None else self.number(key)

    def number(self, key: str) -> float:
        """A finite number; true and false are none."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self._where}: {key!r} must be a finite number, got {value!r}")
        return value

    def string(self, key: str) -> str:
        """A string."""
        value = self.value(key)
        if not isinstance(value, str):
            raise UserError(f"{self._where}: {key!r} must be a string, got {value!r}")
        return value

    def one_of(self, key: str, known: Sequence[str]) -> str:
        """A string out of a few."""
        value = self.string(key)
        if value not in known:
            raise UserError(f"{self._where}: {key!r} must be one of {', '.join(known)}, got {value!r}")
        return value

    def child(self, key: str) -> "JsonNode":
        """An object."""
        return JsonNode(self.value(key), f"{self._where}: {key}")

    def length(self, key: str) -> int:
        """How many entries a list has."""
        value = self.value(key)
        if not isinstance(value, list):
            raise UserError(f"{self._where}: {key!r} must be a list, got {type(value).__name__}")
        return len(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{self._where}: {key!r} must be a list of strings, got {value!r}")
        return tuple(value)

    def child_of_list(self, key: str, index: int) -> "JsonNode":
        """An object in a list."""
        value = self.value(key)
        assert isinstance(value, list)
        return JsonNode(value[index], f"{self._where}: {key}[{index}]")

    def numbers(self) -> dict[str, float]:
        """The whole object, all of it finite numbers."""
        return {key: self.number(key) for key in self._raw}

    def finite(self) -> dict[str, float]:
        """The entries that are finite numbers; a diverged metric is left out of a curve, not drawn."""
        return {
            key: float(value)
            for key, value in self._raw.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }

    def strings(self) -> dict[str, str]:
        """The whole object, each value as text: strings as they are, others as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self._raw.items()}


def read_json(text: str, where: str) -> object:
    """Parse JSON.

    Source: none needed.

    Args:
        text: JSON.
        where: its name in messages.

    Returns:
        Whatever it says.

    Raises:
        UserError: if the text is not JSON.

    Padding contract: there is none.
    """
    try:
        parsed: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    return parsed


def read_text(path: Path) -> str:
    """The text of a file of a run directory.

    Source: none needed.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        UserError: if it is missing or not UTF-8.

    Padding contract: there is none.
    """
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. A run writes it when it starts: has the run directory been copied whole?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def json_file(path: Path) -> JsonNode:
    """The JSON object that a file of a run directory holds.

    Source: none needed.

    Args:
        path: the file, called by its name in messages.

    Returns:
        The object.

    Raises:
        UserError: if it is missing, not UTF-8, or no JSON object.

    Padding contract: there is none.
    """
    return JsonNode(read_json(read_text(path), path.name), path.name)


def json_lines(path: Path) -> Iterator[JsonNode]:
    """The objects of a file of JSON lines, in order.

    Source: the run directory's layout.

    Args:
        path: the file. A last line without a line break that is no JSON is left out: the run was stopped while it wrote.

    Returns:
        One node a line; blank lines are left out.

    Raises:
        UserError: if the file is missing, or a line is not a JSON object.

    Padding contract: there is none.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            raw: object = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"{where} is not JSON: {error}") from error
        yield JsonNode(raw, where)


def lines_of(rows: "Iterable[DataclassInstance]") -> str:
    """Rows as JSON lines.

    Source: the run directory's layout.

    Args:
        rows: dataclasses.

    Returns:
        One line a row, which ``json_lines`` reads.

    Padding contract: there is none.
    """
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
