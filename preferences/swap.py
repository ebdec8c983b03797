"""Exchanges the two sides of preference pairs, in every column that depends on which side is which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SIGNED = ("mean preference difference", "strength", "margin")
"""Numbers of chosen minus rejected: negated."""
LABELS = ("label", "GPT4 label", "label_forward", "label_backward")
"""Which side somebody prefers, 1 chosen and 0 rejected: exchanged; anything else stays."""
FLIPPED = "flipped"
"""Whether the label is known to be turned round: negated."""


def as_table(rows: Dataset) -> pa.Table:
    """The rows of a data set as an Arrow table."""
    return rows.with_format("arrow")[:].replace_schema_metadata(None)


def swap_sides(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """Exchange chosen and rejected.

    Columns that differ in name by these two words alone trade places (chosen and rejected, gold_chosen and gold_rejected,
    the score lists); ``SIGNED``, ``LABELS`` and ``FLIPPED`` follow; all others stay. Done twice, it changes nothing.

    Args:
        table: of pairs.
        mask: [N] bool, the rows to exchange.

    Returns:
        The same columns in the same order.

    Raises:
        UserError: if two columns that should trade places have different types.
    """
    import pyarrow as pa
    from pyarrow import compute as pc

    assert mask.shape == (table.num_rows,) and mask.dtype == np.bool_
    turned = pa.array(mask)
    result = table
    for index, field in enumerate(table.schema):
        column = table[field.name]
        other = _other_side(field.name)
        if other is not None and other in table.column_names:
            if table[other].type != field.type:
                raise UserError(
                    f"the columns {field.name!r} ({field.type}) and {other!r} ({table[other].type}) cannot trade places in a "
                    "flipped pair: give both the same type, or leave them out"
                )
            column = pc.if_else(turned, table[other], column)
        elif field.name in SIGNED and (pa.types.is_floating(field.type) or pa.types.is_signed_integer(field.type)):
            column = pc.if_else(turned, pc.negate(column), column)
        elif field.name in LABELS and pa.types.is_integer(field.type):
            zero_or_one = pc.fill_null(pc.or_(pc.equal(column, 0), pc.equal(column, 1)), False)
            column = pc.if_else(pc.and_(turned, zero_or_one), pc.subtract(1, column).cast(field.type), column)
        elif field.name == FLIPPED and pa.types.is_boolean(field.type):
            column = pc.xor(column, turned)
        else:
            continue
        result = result.set_column(index, field, column)
    return result


def _other_side(name: str) -> str | None:
    if "chosen" in name:
        return name.replace("chosen", "rejected")
    return name.replace("rejected", "chosen") if "rejected" in name else None
