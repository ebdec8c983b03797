"""The tables: from the rows alone, and what has no row reads "not run"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.catalogue import PARTS, Part
from benchmarks.gpu.rows import Place, Stored
from benchmarks.markdown import markdown
from benchmarks.ratios.table import NOT_RUN, amount

HEADS = ("", "what", "time", "MFU", "of the product", "peak, GiB", "ratio", "to", "limit", "besides", "on")
EARLIER = ("case", "time", "MFU", "of the product", "peak, GiB", "on")
OUT_OF_MEMORY = "out of memory"


def share(value: float | None) -> str:
    """In percent."""
    return "-" if value is None else f"{value:.1%}"


def number(value: Any) -> str:
    """With three digits; words as they are."""
    return str(value) if isinstance(value, (bool, str)) else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def cells(place: Place, against: str, row: Stored | None) -> tuple[str, ...]:
    """One line.

    Args:
        place: id and case.
        against: what a ratio is to.
        row: as stored; None = there is none.
    """
    if row is None:
        return (*place, NOT_RUN, *[""] * (len(HEADS) - 3))
    if row["outcome"] == OUT_OF_MEMORY:
        return (*place, OUT_OF_MEMORY, *[""] * (len(HEADS) - 4), on(row))
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}"
    if row["ratio_min"] is not None:
        ratio += f" ({row['ratio_min']:.3g} to {row['ratio_max']:.3g})"
    besides = ", ".join(f"{name} {number(value)}" for name, value in row["figures"].items()) or "-"
    return (
        *place,
        amount(row["seconds"], "s"),
        share(row["mfu"]),
        share(row["mfu_of_gemm"]),
        "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
        ratio,
        against if row["ratio"] is not None else "-",
        "-" if row["limit"] is None else f"{row['limit']:.3g}",
        besides,
        on(row),
    )


def device(row: Stored) -> str:
    """Name and day."""
    return f"{row['device'].removeprefix('NVIDIA ')}, {row['when'][:10]}"


def on(row: Stored) -> str:
    """The same of a row of today's form, and whether it was too small to mean anything."""
    return device(row) + (", small" if row["small"] else "")


def lines(rows: Mapping[Place, Stored], parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """All cases in the order of their ids."""
    found = [(place, part.against, rows[place] if place in rows else None) for part in parts for place in part.places]
    return [cells(*each) for each in sorted(found, key=lambda each: int(each[0][0][1:]))]


def table(rows: Mapping[Place, Stored], parts: Sequence[Part] = PARTS) -> str:
    """As Markdown.

    Args:
        rows: by id and case.
        parts: whose cases are shown.
    """
    return markdown(HEADS, lines(rows, parts))


def shown(rows: Mapping[Place, Stored], parts: Sequence[Part] = PARTS) -> str:
    """In columns, for a terminal; without what stands besides."""
    left = HEADS.index("besides")
    narrow = [tuple(cell for i, cell in enumerate(line) if i != left) for line in [HEADS, *lines(rows, parts)]]
    widths = [max(len(line[i]) for line in narrow) for i in range(len(narrow[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in narrow)


def earlier(rows: Sequence[Stored]) -> str:
    """Rows of the form before the cases had numbers, each as it was measured."""
    found = [
        (
            row["case"],
            amount(row["seconds"], "s"),
            share(row["mfu"] if "mfu" in row else None),
            share(row["mfu_of_gemm"] if "mfu_of_gemm" in row else None),
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-",
            device(row),
        )
        for row in rows
    ]
    return markdown(EARLIER, found)
