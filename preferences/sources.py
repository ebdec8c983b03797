"""Opens what ``data.preferences`` or ``meta.prompts`` names: a file, a directory, or (when allowed) a hub data set.

Files are read by ``datasets``; before that the raw bytes are checked here line by line, so that an error names the line.
Nothing here unpickles or runs code that came with the data.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokens.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Part:
    """One file of a source.

    Args:
        name: how errors call it.
        num_rows: rows in it.
        lines: the line each row stands on (JSON Lines only).
    """

    name: str
    num_rows: int
    lines: array[int] | None = None


@dataclass(frozen=True)
class Source:
    """An opened data set and where its rows came from.

    Args:
        name: what the user called it.
        rows: its rows, in memory.
        parts: its files in order; none for a hub data set or one of ``save_to_disk``.
    """

    name: str
    rows: Dataset
    parts: tuple[Part, ...] = ()

    def where(self, row: int) -> str:
        """Words for a row (counted from 0): file and line where there is one, else its number counted from 1."""
        if not self.parts:
            return f"row {row + 1}"
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + part.num_rows)
        index = bisect_right(starts, row) - 1
        part, inside = self.parts[index], row - starts[index]
        place = f"row {inside + 1}" if part.lines is None else f"line {part.lines[inside]}"
        return place if len(self.parts) == 1 else f"{part.name} {place}"


def shorten(text: object, limit: int = 80) -> str:
    """``text`` quoted for an error message: control characters escaped, cut to about ``limit`` characters."""
    words = text if isinstance(text, str) else repr(text)
    return ascii(words[:limit]) + ("..." if len(words) > limit else "")


def open_source(source: str, split: str, allow_hub: bool) -> Source:
    """Open a .jsonl, .json or .parquet file, a directory of them or of ``save_to_disk``, or a hub data set.

    Args:
        source: path or hub name.
        split: split to read where the source has several.
        allow_hub: whether a name that is no local path may be fetched.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    if not source.strip() or "\0" in source:
        raise UserError(f"the name of a data set is empty or holds a NUL character: {shorten(source)}")
    path = Path(source).expanduser()
    if path.is_file():
        return _open_files(source, [path])
    if path.is_dir():
        return _open_directory(source, path, split)
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such file or directory (looked for {path.absolute()})")
    if not allow_hub:
        raise UserError(
            f"{source}: no such file or directory (looked for {path.absolute()}). If it is the name of a Hugging Face data set, "
            "set data.allow_hub to true to fetch it from the hub"
        )
    from datasets import load_dataset

    with _reading(source):
        return Source(source, load_dataset(source, split=split))


def _open_directory(source: str, path: Path, split: str) -> Source:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file():
        names = list(_read_object(path / "dataset_dict.json").get("splits") or [])
        if split not in names:
            raise UserError(f"{source}: has no split {split!r}; it has {', '.join(map(str, names)) or 'none'}. Set data.split")
        path = path / split
    if (path / "state.json").is_file():
        with _reading(source):
            return Source(source, load_from_disk(path, keep_in_memory=True))
    files = [f for folder in (path, path / "data") for f in sorted(folder.glob("*")) if f.suffix in SUFFIXES and f.is_file()]
    if not files:
        raise UserError(f"{source}: the directory holds no {', '.join(SUFFIXES)} file and is not one of datasets.save_to_disk")
    by_split = {f: split_of(f) for f in files}
    if any(by_split.values()):
        names = sorted({name for name in by_split.values() if name})
        files = [f for f in files if by_split[f] == split]
        if not files:
            raise UserError(f"{source}: no file of split {split!r}; its files are named for {', '.join(names)}. Set data.split")
    if len({f.suffix == ".parquet" for f in files}) > 1:
        raise UserError(f"{source}: holds both JSON and Parquet files ({', '.join(f.name for f in files[:4])}); name one of them")
    return _open_files(source, files)


def split_of(path: Path) -> str | None:
    """The split that a file such as train.jsonl or test-00000-of-00002.parquet is named for, if any."""
    stem = path.stem.lower()
    return next((name for name in SPLIT_NAMES if stem == name or stem.startswith((f"{name}-", f"{name}_", f"{name}."))), None)


def _open_files(source: str, files: Sequence[Path]) -> Source:
    from datasets import Dataset

    odd = [f for f in files if f.suffix not in SUFFIXES]
    if odd:
        raise UserError(
            f"{odd[0]}: files must end in {', '.join(SUFFIXES)} (not compressed), got {odd[0].suffix or 'no ending'!r}"
        )
    parquet = files[0].suffix == ".parquet"
    parts = tuple(_check_parquet(f) if parquet else _check_json(f) for f in files)
    if sum(part.num_rows for part in parts) == 0:
        raise UserError(f"{source}: is empty (no rows)")
    paths = [str(f) for f in files]
    # The library first writes an Arrow copy; it goes to a folder that is gone afterwards.
    with tempfile.TemporaryDirectory(prefix="rondo-data-") as scratch, _reading(source):
        if parquet:
            rows = Dataset.from_parquet(paths, cache_dir=scratch, keep_in_memory=True)
        else:
            rows = Dataset.from_json(paths, cache_dir=scratch, keep_in_memory=True, parse_agent_traces=False)
    assert len(rows) == sum(part.num_rows for part in parts), "rows counted and rows read differ"
    return Source(source, rows, parts)


def _check_parquet(path: Path) -> Part:
    import pyarrow as pa
    from pyarrow import parquet

    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes)")
    try:
        return Part(path.name, parquet.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or cut off ({error})") from error


def _check_json(path: Path) -> Part:
    """Parse every line once: UTF-8, JSON, an object, texts of one type a column."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes)")
    lines = array("Q")
    kinds: dict[str, str] = {}
    with path.open("rb") as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            for number, row in enumerate(_json_array(path, file.read()), start=1):
                _check_object(row, kinds, f"{path}, element {number}")
                lines.append(number)
            return Part(path.name, len(lines))
        offset = 0
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                _check_object(_parse_line(path, number, offset, raw), kinds, f"{path}, line {number}")
                lines.append(number)
            offset += len(raw)
    return Part(path.name, len(lines), lines)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _decode(raw: bytes, path: Path, line: int, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {line + raw[: error.start].count(10)}: not UTF-8 text (byte 0x{raw[error.start]:02x} at offset "
            f"{offset + error.start} of the file). Save the file as UTF-8, uncompressed"
        ) from error
    if text.startswith("\ufeff"):
        raise UserError(f"{path}: starts with a byte order mark. Save the file as UTF-8 without one")
    return text


def _parse_line(path: Path, number: int, offset: int, raw: bytes) -> Any:
    text = _decode(raw, path, number, offset)
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        hint = "" if raw.endswith(b"\n") else ". It is the last line and has no line end: the file may be cut off"
        raise UserError(
            f"{path}, line {number}: not valid JSON ({error}), got {shorten(text.strip())}. Expected one JSON object a line{hint}"
        ) from error


def _json_array(path: Path, raw: bytes) -> list[Any]:
    try:
        rows = json.loads(_decode(raw, path, 1, 0), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON ({error}). Expected an array of objects, or one object a line") from error
    assert isinstance(rows, list)
    return rows


def _check_object(row: Any, kinds: dict[str, str], where: str) -> None:
    """Refuse what has no place in a column of text, messages or turns, and half characters."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with columns such as prompt, chosen, rejected; got {shorten(row)}")
    for column in (name for name in TEXT_COLUMNS if name in row):
        value = row[column]
        if value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
            kind = "turns"
        elif isinstance(value, list) and all(_is_message(message) for message in value):
            kind = "turns" if not value and column in kinds and kinds[column] == "turns" else "messages"
        elif isinstance(value, str):
            kind = "text"
        else:
            raise UserError(
                f"{where}: column {column!r} must be text, a list of {{role, content}} messages or a list of turns, "
                f"got {shorten(value)}"
            )
        if kinds.setdefault(column, kind) != kind:
            raise UserError(f"{where}: column {column!r} holds {kind} here and {kinds[column]} above; it must be one of them")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, {error.object[error.start]!a}: no character") from error


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and {"role", "content"} <= message.keys()
        and isinstance(message["role"], str)
        and isinstance(message["content"], str)
    )


def _read_object(path: Path) -> dict[str, Any]:
    value = _parse_line(path, 1, 0, path.read_bytes() + b"\n")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {shorten(value)}")
    return value


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Keeps ``datasets`` from drawing bars and logging, and turns whatever it raises into the user's error."""
    import datasets
    from datasets.utils import logging

    bars: Callable[[], None] | None = datasets.enable_progress_bars if datasets.is_progress_bar_enabled() else None
    datasets.disable_progress_bars()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # the library raises many kinds for unreadable input; the innermost one says what is wrong
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UserError(f"{source}: cannot be read as a data set ({type(root).__name__}: {shorten(str(root), 300)})") from error
    finally:
        logging.set_verbosity(level)
        if bars is not None:
            bars()
