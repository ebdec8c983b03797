"""Pictures of the documentation: one style, on white so that they read on light and dark pages, the same rows the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokens.durable import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "rondo", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
"""matplotlib's settings; text stays text."""


@contextmanager
def picture(path: Path, width: float, height: float, **style: Any) -> Iterator[Figure]:
    """An empty figure, written when the block has filled it; nothing is written where the block raises.

    Args:
        path: its ending says in which format (.svg or .png).
        width: inches.
        height: inches.
        style: settings on top of ``STYLE``, "_" for ".".
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, **{name.replace("_", "."): value for name, value in style.items()}}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix[1:]
        with whole_file(path) as partial:
            figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None, dpi=110, facecolor="white")
