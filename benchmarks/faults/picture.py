"""How long each loss lasted: noticed, started anew, given what it must hold. Drawn from the results, on white.

python -m benchmarks.faults.picture [--label NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.cells import CELLS
from benchmarks.faults.play import ROOT
from benchmarks.faults.record import HUNG, RESULTS, Record
from benchmarks.pictures import picture

PICTURE = ROOT / "docs" / "img" / "faults.svg"
PARTS = (("detected_s", "until it is noticed", "#b03a2e"), ("cold_start_s", "a process starts in its place", "#b8c4d6"),
         ("beyond_s", "given what it must hold", "#2e6fb0"))  # fmt: skip


def shown(cells: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each cell in which a process was lost and came back, in the order of the matrix; those that hang have a deadline."""
    back = {
        cell: row for cell, row in cells.items() if row["recovered_s"] is not None and "faults/start_seconds" in row["figures"]
    }
    return [back[cell] for cell in CELLS if cell in back and cell not in HUNG]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar for each loss.

    Args:
        rows: of cells.
        path: .svg or .png.
    """
    with picture(path, 8.5, 0.3 * len(rows) + 1.2) as figure:
        ax = figure.subplots()
        names = [f"{row['who']}: {row['fault']}  {row['cell']}" for row in rows]
        left = [0.0] * len(rows)
        for key, label, colour in PARTS:
            widths = [max(0.0, float(row[key])) for row in rows]
            ax.barh(names, widths, left=left, color=colour, label=label, height=0.66)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            ax.text(total, place, f" {total:.1f}", va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("seconds since the fault")
        ax.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)


def main() -> None:
    """Draw what was measured last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="chaos", help="of the measurements")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines to read")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where to draw (.svg or .png)")
    options = parser.parse_args()
    draw(shown(Record(options.results, options.label).cells()), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
