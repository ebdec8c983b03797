"""The pairs of a strength run in parts: what is scored, written and committed together, and by whose members.

Pairs of equal text lie in one part and are scored once. The texts lie in one Parquet file, a row group a part: a scoring process
holds one part of them, and so does the driver while it writes scores. What the driver holds of all N pairs is less: which part a
row belongs to (this module), its token ids (``tokens.pair_store``), and at the end two numbers a member.

Letters: N pairs of a set, n rows of a part, U distinct pairs of a part, K folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokens.durable import whole_file
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from preferences.sets import PreferenceSet

NUMBER = "rondo_number"
"""Column of the texts' file: which of the part's U distinct pairs a row is."""
BATCH = 8192


@dataclass(frozen=True)
class Part:
    """Rows that are scored together.

    Args:
        index: of the part, and of its row group.
        fold: whose members score it.
        split: "train" or "validation".
        rows: [n] indices into the set of that split.
        numbers: [n] which of the U distinct pairs each row is, in the order of their first rows.
    """

    index: int
    fold: int
    split: str
    rows: np.ndarray
    numbers: np.ndarray

    @property
    def num_distinct(self) -> int:
        """U."""
        return int(self.numbers.max()) + 1


def fold_of(prompt: str, folds: int, seed: int) -> int:
    """The part of the prompts that a prompt belongs to, by a hash, so that the order of rows plays no part.

    Args:
        prompt: its text.
        folds: K; 1 puts all into part 0.
        seed: another seed makes other parts.

    Returns:
        0 to K - 1.
    """
    digest = hashlib.blake2b(f"{seed}:fold:{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % folds


def folds_of(pairs: PreferenceSet, folds: int, seed: int) -> np.ndarray:
    """The fold of every pair.

    Args:
        pairs: N training pairs.
        folds: K.
        seed: of the folds.

    Returns:
        [N] int64.

    Raises:
        UserError: if a fold holds no pair, so that there are fewer than K.
    """
    found = np.array([fold_of(prompt, folds, seed) for prompt in pairs.rows["prompt"]], dtype=np.int64)
    counts = np.bincount(found, minlength=folds)
    if not counts.all():
        raise UserError(
            f"strength.folds is {folds}, but the {len(set(pairs.rows['prompt']))} distinct prompts of {pairs.source} leave "
            f"{int((counts == 0).sum())} of the folds empty: lower strength.folds, or add prompts"
        )
    return found


def plan_parts(sets: Sequence[tuple[str, PreferenceSet, np.ndarray, np.ndarray]], size: int) -> list[Part]:
    """Divide pairs into parts of ``size`` distinct ones, and of everything that repeats them.

    Args:
        sets: for each split its name, its N pairs, whose members score each ([N] int64), and which are scored ([N] bool).
        size: distinct pairs a part; the last of a fold may have fewer.

    Returns:
        The parts, fold by fold.
    """
    parts: list[Part] = []
    keyed = [(split, _keys(pairs), folds, kept) for split, pairs, folds, kept in sets]
    for fold in sorted({int(fold) for _, _, folds, kept in keyed for fold in np.unique(folds[kept])}):
        for split, keys, folds, kept in keyed:
            rows = np.flatnonzero(kept & (folds == fold))
            for chosen, numbers in _divide(rows, keys[rows], size):
                parts.append(Part(len(parts), fold, split, chosen, numbers))
    return parts


def _keys(pairs: PreferenceSet) -> np.ndarray:
    """[N] of 16 bytes, equal where prompt, chosen and rejected are."""
    from preferences.strength_files import text_key

    keys = np.empty(len(pairs), dtype="V16")
    columns = pairs.rows.select_columns(["prompt", "chosen", "rejected"])
    for start in range(0, len(pairs), BATCH):
        batch = columns[start : start + BATCH]
        texts = zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
        keys[start : start + len(batch["prompt"])] = [np.void(text_key(*text)) for text in texts]
    return keys


def _divide(rows: np.ndarray, keys: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not len(rows):
        return
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    number = rank[inverse]  # [N] distinct pairs in the order in which they first come up
    order = np.argsort(number, kind="stable")
    edges = np.searchsorted(number[order], np.arange(0, len(first) + size, size))
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        taken = order[start:end]
        yield rows[taken], number[taken] - number[taken[0]]


def write_texts(path: Path, parts: Sequence[Part], sets: dict[str, PreferenceSet]) -> None:
    """Write the parts' rows with all their columns, a row group a part: beside its place, synced, renamed.

    Args:
        path: of the file.
        parts: as planned.
        sets: the pairs of each split; equal columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    arrow = {split: pairs.rows.with_format("arrow") for split, pairs in sets.items()}
    writer: parquet.ParquetWriter | None = None
    with whole_file(path) as partial:
        for part in parts:
            table: pa.Table = arrow[part.split][part.rows.tolist()].replace_schema_metadata(None)
            table = table.append_column(NUMBER, pa.array(part.numbers, pa.int64()))
            if writer is None:
                writer = parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table.cast(writer.schema), row_group_size=table.num_rows)
        assert writer is not None
        writer.close()
