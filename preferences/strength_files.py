"""The files that strengths lie in: part files of ours, and whatever has the columns of the public strength data set.

Letters: n rows of a batch, M members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preferences.formats import BadRowError, detect_format, read_pair
from preferences.labels import LABEL, PUBLIC_LABEL, labels_of, write_table
from preferences.sources import SUFFIXES, TEXT_COLUMNS, Source, open_source, shorten, split_of
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from preferences.sets import Format

MEAN, STD = "mean preference difference", "std preference difference"
CHOSEN_SCORES, REJECTED_SCORES = "chosen score list", "rejected score list"
SCORES = (CHOSEN_SCORES, REJECTED_SCORES)
FINGERPRINT, SOURCE = b"rondo.fingerprint", b"rondo.source"
"""Keys of a Parquet file's own metadata."""
BATCH = 8192


@dataclass(frozen=True)
class Columns:
    """What is kept of strength files; see ``preferences.strength.Strengths``."""

    ids: tuple[str, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    splits: tuple[str, ...]
    texts: tuple[bytes, ...]
    fingerprint: str | None


def text_key(prompt: str, chosen: str, rejected: str) -> bytes:
    """16 bytes that two pairs share if their texts are the same."""
    parts = [part.encode("utf-8") for part in (prompt, chosen, rejected)]
    lengths = " ".join(str(len(part)) for part in parts).encode()
    return hashlib.blake2b(b"\0".join([lengths, *parts]), digest_size=16).digest()


def write_part(
    directory: Path,
    part: int,
    rows: pa.Table,
    chosen: np.ndarray,
    rejected: np.ndarray,
    split: str,
    source: str,
    fingerprint: str | None,
) -> Path:
    """Write a part file beside its place, sync it, rename it; see ``preferences.strength.write_strengths``."""
    import pyarrow as pa

    margin = chosen - rejected
    spread = pa.array(margin.std(1)) if margin.shape[1] > 1 else pa.nulls(rows.num_rows, pa.float64())
    made = {"split": pa.array([split] * rows.num_rows, pa.string()), MEAN: pa.array(margin.mean(1)), STD: spread}
    made |= {CHOSEN_SCORES: _lists(chosen), REJECTED_SCORES: _lists(rejected)}
    if LABEL in rows.column_names:
        labels_of(rows, source)  # a column of another meaning is no second labeller's
        made[PUBLIC_LABEL] = rows[LABEL]
    table = rows.drop_columns([name for name in rows.column_names if name in made])
    for name, column in made.items():
        table = table.append_column(name, column)
    metadata = {SOURCE: source.encode()} | ({} if fingerprint is None else {FINGERPRINT: fingerprint.encode()})
    final = directory / f"part-{part:05d}.parquet"
    write_table(table.replace_schema_metadata(metadata), final)
    return final


def _lists(scores: np.ndarray) -> pa.Array:
    import pyarrow as pa

    offsets = np.arange(scores.shape[0] + 1, dtype=np.int32) * scores.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(scores.ravel()))


def read_columns(name: str, allow_hub: bool) -> Columns:
    """Read strengths; see ``preferences.strength.read_strengths``."""
    parts: list[_Part] = []
    for split, fingerprint, batches in _opened(name, allow_hub):
        part = _Part(name, split, fingerprint)
        for batch in batches:
            part.add(batch, sum(map(len, parts)))
        parts.append(part)
    return _joined(name, parts)


def _opened(name: str, allow_hub: bool) -> Iterator[tuple[str, str | None, Iterator[pa.Table]]]:
    """Split, fingerprint and batches of every file of a source."""
    path = Path(name).expanduser()
    if (path / "strengths").is_dir():
        if not (path / "card.json").is_file():
            raise UserError(f"{name}: this strength run is not finished (it has no card.json): run `strength` again to go on")
        path = path / "strengths"
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        for split in sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file()):
            yield split, None, _in_memory(open_source(str(path), split, False))
    elif path.is_dir() and not (path / "state.json").is_file():
        files = [f for folder in (path, path / "data") for f in sorted(folder.glob("*")) if f.suffix in SUFFIXES and f.is_file()]
        if not files:
            raise UserError(f"{name}: the directory holds no strengths, that is no {', '.join(SUFFIXES)} file")
        for file in files:
            yield _opened_file(file)
    elif path.is_file() and path.suffix in SUFFIXES:
        yield _opened_file(path)
    else:
        try:
            opened = open_source(name, "train", allow_hub)
        except UserError as error:
            raise UserError(
                f"no strengths: {error}. Make them with `python -m cluster strength CONFIG`, or name others in "
                "data.denoise.strength"
            ) from error
        yield "train", None, _in_memory(opened)


def _opened_file(path: Path) -> tuple[str, str | None, Iterator[pa.Table]]:
    split = split_of(path) or "train"
    if path.suffix != ".parquet":
        return split, None, _in_memory(open_source(str(path), "train", False))
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or cut off ({error})") from error
    metadata = file.schema_arrow.metadata or {}
    wanted = [column for column in ("id", "split", *TEXT_COLUMNS, *SCORES) if column in file.schema_arrow.names]
    _refuse_missing(str(path), file.schema_arrow.names)
    batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(BATCH, columns=wanted))
    return split, metadata[FINGERPRINT].decode() if FINGERPRINT in metadata else None, batches


def _in_memory(source: Source) -> Iterator[pa.Table]:
    _refuse_missing(source.name, source.rows.column_names)
    rows = source.rows.with_format("arrow")
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _refuse_missing(name: str, columns: Sequence[str]) -> None:
    missing = [column for column in ("chosen", "rejected", *SCORES) if column not in columns]
    if missing:
        raise UserError(
            f"{name}: these are no preference strengths: no column {', no column '.join(map(repr, missing))}; columns found: "
            f"{', '.join(columns)}. Make strengths with `python -m cluster strength CONFIG`"
        )


class _Part:
    """Rows of one file, collected batch by batch."""

    def __init__(self, name: str, split: str = "", fingerprint: str | None = None) -> None:
        self.name, self.split, self.fingerprint = name, "train" if split == "train" else "validation", fingerprint
        self.format: Format | None = None
        self.ids: list[str] = []
        self.splits: list[str] = []
        self.texts: list[bytes] = []
        self.scores: dict[str, list[np.ndarray]] = {side: [] for side in SCORES}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, table: pa.Table, before: int) -> None:
        """Take one batch; ``before`` rows were read from other files."""
        from datasets import Dataset

        if not table.num_rows:
            return
        start = before + len(self)
        numbers = [str(start + row + 1) for row in range(table.num_rows)]
        ids = [str(value) for value in table["id"].to_pylist()] if "id" in table.column_names else numbers
        for side in SCORES:
            self.scores[side].append(_matrix(self.name, table[side], ids, side))
        if self.format is None:
            self.format = detect_format(Source(self.name, Dataset(table.replace_schema_metadata(None))))
            if self.format == "conversational":
                raise UserError(
                    f"{self.name}: chosen and rejected are lists of messages; strengths are matched by text, so give them as "
                    "text or as lists of turns"
                )
        kept = [column for column in TEXT_COLUMNS if column in table.column_names]
        self.texts += [_key(row, self.format) for row in table.select(kept).to_pylist()]
        self.ids += ids
        self.splits += table["split"].to_pylist() if "split" in table.column_names else [self.split] * len(ids)


def _key(row: dict[str, Any], format_: Format) -> bytes:
    try:
        texts = read_pair(row, format_, None)
    except BadRowError:
        return b""  # such a pair is no pair of any data set here
    return text_key(texts.prompt, texts.chosen, texts.rejected)


def _matrix(name: str, column: pa.ChunkedArray, ids: Sequence[str], side: str) -> np.ndarray:
    """[n, M] float64 of a column of lists; a null inside a list is NaN."""
    import pyarrow as pa
    from pyarrow import compute

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise UserError(f"{name}: column {side!r} must be a list of numbers, one a member; got {column.type}")
    lengths = np.asarray(compute.fill_null(compute.list_value_length(column), 0))
    odd = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
    if len(odd):
        raise UserError(
            f"{name}: column {side!r} must have a score of every member in every row; pair {ids[odd[0]]!r} has "
            f"{lengths[odd[0]]}" + (f", pair {ids[0]!r} has {lengths[0]}" if lengths[0] else "")
        )
    try:
        flat = compute.list_flatten(column).cast(pa.float64())
    except pa.ArrowException as error:
        raise UserError(f"{name}: column {side!r} must be a list of numbers, one a member; got {column.type}") from error
    return np.array(flat.to_numpy(), dtype=np.float64).reshape(len(ids), int(lengths[0]))


def _joined(name: str, parts: Sequence[_Part]) -> Columns:
    sides = {side: [block for part in parts for block in part.scores[side]] for side in SCORES}
    widths = sorted({block.shape[1] for blocks in sides.values() for block in blocks})
    if not widths:
        raise UserError(f"{name}: holds no pair")
    if len(widths) > 1:
        raise UserError(f"{name}: every row must have the scores of the same members, got lists of {widths} scores")
    fingerprints = sorted({str(part.fingerprint) for part in parts})
    if len(fingerprints) > 1:
        raise UserError(
            f"{name}: the files are strengths of different data sets (fingerprints "
            f"{', '.join(shorten(f, 16) for f in fingerprints)}); name those of one"
        )
    return Columns(
        tuple(id_ for part in parts for id_ in part.ids),
        np.concatenate(sides[CHOSEN_SCORES]),
        np.concatenate(sides[REJECTED_SCORES]),
        tuple(split for part in parts for split in part.splits),
        tuple(text for part in parts for text in part.texts),
        parts[0].fingerprint,
    )
