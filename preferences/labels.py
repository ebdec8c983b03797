"""What a second labeller says of the pairs, and the three validation sets that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preferences.sets import PreferenceSet
from preferences.swap import as_table, swap_sides
from tokens.durable import whole_file
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

LABEL, PUBLIC_LABEL = "label", "GPT4 label"
"""Our column and the public data set's. 1: the second labeller prefers chosen; 0: rejected; -1: no label."""
VALIDATION_SETS = ("original", "relabelled", "agreement")


def combine(forward: int, backward: int) -> int:
    """The label of two answers of one judge, who was shown the responses in both orders.

    Args:
        forward: shown chosen first; 1 = chosen, 0 = rejected, -1 = no answer.
        backward: shown rejected first; likewise, in terms of the pair and not of the order.

    Returns:
        What both say, -1 if they differ.
    """
    return forward if forward == backward else -1


def has_labels(pairs: PreferenceSet) -> bool:
    """Whether a second labeller has seen the pairs."""
    return LABEL in pairs.rows.column_names or PUBLIC_LABEL in pairs.rows.column_names


def labels_of(table: pa.Table, source: str) -> np.ndarray:
    """[N] int64: the column ``label``, or where it is missing ``GPT4 label``; a null is -1.

    Raises:
        UserError: if there is neither, or a value is not 1, 0 or -1.
    """
    name = next((column for column in (LABEL, PUBLIC_LABEL) if column in table.column_names), None)
    if name is None:
        raise UserError(
            f"{source}: nobody has labelled these pairs a second time: no column {LABEL!r} and no column {PUBLIC_LABEL!r}; "
            f"columns found: {', '.join(table.column_names)}. Make one with `python -m cluster relabel PAIRS --judge ...`"
        )
    return _numbers(table, name, source)


def refuse_other_labels(pairs: PreferenceSet) -> None:
    """Stop at a column that has the name of a second labeller's and means something else.

    Raises:
        UserError: if ``label`` or ``GPT4 label`` holds anything but 1, 0, -1 and null.
    """
    there = [column for column in (LABEL, PUBLIC_LABEL) if column in pairs.rows.column_names]
    if there:
        table = as_table(pairs.rows.select_columns(there))
        for name in there:
            _numbers(table, name, pairs.source)


def _numbers(table: pa.Table, name: str, source: str) -> np.ndarray:
    import pyarrow as pa
    from pyarrow import compute as pc

    rename = "If it means something else than a second labeller's answer, rename or remove the column"
    if not pa.types.is_integer(table[name].type) and not pa.types.is_null(table[name].type):
        raise UserError(f"{source}: column {name!r} must hold the numbers 1, 0 and -1, got {table[name].type}. {rename}")
    labels = np.asarray(pc.fill_null(table[name].cast(pa.int64()), -1))
    odd = np.flatnonzero(~np.isin(labels, (1, 0, -1)))
    if len(odd):
        raise UserError(
            f"{source}: column {name!r} must hold 1 (chosen), 0 (rejected) or -1 (no label); "
            f"row {odd[0] + 1} has {labels[odd[0]]}. {rename}"
        )
    return labels


def label_tables(table: pa.Table, source: str) -> dict[str, pa.Table]:
    """The three validation sets of Secrets of RLHF II, section 2.5, as tables.

    Args:
        table: pairs with a second labeller's column.
        source: named in errors.

    Returns:
        original: all pairs as they are; relabelled: the pairs with a label, sides exchanged where it is 0; agreement: the
        pairs where it is 1. Any but the first may be empty.

    Raises:
        UserError: as ``labels_of``.
    """
    import pyarrow as pa

    labels = labels_of(table, source)
    labelled = table.filter(pa.array(labels >= 0))
    return dict(
        zip(
            VALIDATION_SETS,
            (table, swap_sides(labelled, labels[labels >= 0] == 0), table.filter(pa.array(labels == 1))),
            strict=True,
        )
    )


def validation_sets(pairs: PreferenceSet) -> dict[str, PreferenceSet]:
    """The same for a preference set; ids stay, so that a pair can be followed through the three.

    Raises:
        UserError: as ``labels_of``.
    """
    return {name: pairs.with_table(table) for name, table in label_tables(as_table(pairs.rows), pairs.source).items()}


def write_table(table: pa.Table, path: Path) -> None:
    """Replace a Parquet file in one step: written beside, synced, renamed."""
    write_batches(iter([table]), path)


def write_batches(batches: Iterator[pa.Table], path: Path) -> None:
    """The same for a table that comes in parts: none but the one at hand is held.

    Args:
        batches: at least one; equal columns.
        path: of the file.
    """
    from pyarrow import parquet

    first = next(batches)
    with whole_file(path) as partial, parquet.ParquetWriter(partial, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_table(batch)
