"""Drawings as SVG that stands inside a page: text stays text, ids never collide, colours follow the page's theme.

Matplotlib draws with the stand-in colours below; in the SVG each becomes a CSS variable of the page, so that one drawing
serves the light and the dark theme.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
SERIES = tuple(f"#0b000{i}" for i in range(1, 10))
"""Nine hues that colour-blind people can tell apart; the page's --s1 to --s9."""
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED, BROWN, GREY = SERIES

WIDE, NARROW = 5.2, 3.3
"""Inches. Text has one size in both; the page shows one or the other."""

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card"} | {c: f"s{i}" for i, c in enumerate(SERIES, start=1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.3,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "patch.linewidth": 0.0,
}


@dataclass(frozen=True)
class Drawing:
    """One figure of the page, in a wide and a narrow variant, as SVG elements."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


def drawing(name: str, title: str, caption: str, height: float, draw: "Callable[[Figure, bool], None]") -> Drawing:
    """Draw a figure in both variants.

    Source: matplotlib's SVG backend.

    Args:
        name: unique in the page; prefix of every id.
        title: shown above.
        caption: shown below, says what a good curve looks like.
        height: inches, of both variants.
        draw: fills an empty figure; is told whether it is the narrow variant.

    Returns:
        The drawing; the same input gives the same text.

    Padding contract: there is none.
    """
    return Drawing(
        name,
        title,
        caption,
        wide=_render(f"{name}-w", title, WIDE, height, lambda figure: draw(figure, False)),
        narrow=_render(f"{name}-n", title, NARROW, height, lambda figure: draw(figure, True)),
    )


def _render(prefix: str, title: str, width: float, height: float, draw: "Callable[[Figure], None]") -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return themed(out.getvalue(), prefix, title)


def themed(svg: str, prefix: str, title: str) -> str:
    """Make a matplotlib SVG file part of a page.

    Source: matplotlib's SVG backend (what it writes), HTML's rules for inline SVG.

    Args:
        svg: the file's text.
        prefix: put before every id and every reference to one.
        title: read aloud by screen readers; letters, digits, blanks and plain punctuation.

    Returns:
        The <svg> element alone: no XML prolog, no metadata, no fixed size, no namespace that HTML does not need.

    Raises:
        ValueError: if there is no <svg> element.

    Padding contract: there is none.
    """
    start = svg.find("<svg")
    if start < 0:
        raise ValueError("not an SVG file: it has no <svg> element")
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[start:], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None
    body = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{title}">', body, count=1)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'\b(?:xlink:)?href="#', f'href="#{prefix}-', body)
    body = re.sub(r"(?:'DejaVu Sans'(?:, )?)+[^;\"]*", "var(--font)", body)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match[0]]})", body).strip()
