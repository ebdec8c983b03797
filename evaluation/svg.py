"""Drawings as SVG that stands inside a page: text stays text, ids never collide, colours follow the page's theme.

Matplotlib draws with the light theme's colours below; in the SVG each becomes a CSS variable of the page, so that one drawing
serves the light and the dark theme. In a PNG file they stay what they are.
"""

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#1a1f2b", "#5c6575", "#e3e6ec", "#ffffff"
SERIES = ("#0b69b5", "#c9660a", "#0d8a66", "#9b51a8", "#53aede", "#d4ac0d", "#c2413b", "#8a6d4f", "#7c8696")
"""Nine hues that colour-blind people can tell apart; the page's --s1 to --s9."""
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED, BROWN, GREY = SERIES
LIGHT = {"ink": INK, "muted": MUTED, "grid": GRID, "card": CARD} | {f"s{i}": c for i, c in enumerate(SERIES, start=1)}
"""The page's variables that drawings use, in the light theme."""
DARK = dict(
    zip(
        LIGHT,
        (
            "#e8ebf1", "#9aa5b6", "#2b3240", "#181d26",
            "#5aa9ec", "#f29b4b", "#3fc29a", "#c98ad6", "#8fd0f3", "#e8cb4a", "#ee7d76", "#c3a27f", "#77829a",
        ),
        strict=True,
    )
)  # fmt: skip
"""The same in the dark theme."""

WIDE, NARROW = 5.2, 3.3
"""Inches. Text has one size in both; the page shows one or the other."""
PNG_DPI, PNG_MARGIN = 240, 24

_VARIABLES = {colour: name for name, colour in LIGHT.items()}
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


@dataclass(frozen=True)
class Plot:
    """A figure that is still to be drawn: inline as SVG, or as a PNG file.

    Args:
        name: unique in the page; letters, digits and hyphens, for it becomes a file's name.
        paper: the figure that it repeats, as "Figure 4 of Secrets of RLHF II".
        title: shown above; letters, digits, blanks and plain punctuation.
        caption: shown below, says what a good one looks like.
        height: inches, of both variants.
        draw: fills an empty figure; is told whether it is the narrow variant.
        narrow_height: inches, of the narrow variant where it stacks its panels; None = ``height``.
    """

    name: str
    paper: str
    title: str
    caption: str
    height: float
    draw: "Callable[[Figure, bool], None]"
    narrow_height: float | None = None

    def render(self) -> tuple[Drawing, bytes]:
        """Both variants as SVG elements, and the wide one as a PNG file on white.

        Source: matplotlib's SVG and Agg backends.

        Returns:
            The drawing and the file; the same input gives the same bytes.

        Padding contract: there is none.
        """
        wide, narrow = f"{self.name}-w", f"{self.name}-n"
        with _style(wide):
            figure = _figure(WIDE, self.height, lambda figure: self.draw(figure, False))
            inline = _svg(figure, wide, self.title)
            png = _png(figure)
        with _style(narrow):
            figure = _figure(NARROW, self.narrow_height or self.height, lambda figure: self.draw(figure, True))
            return Drawing(self.name, self.title, self.caption, inline, _svg(figure, narrow, self.title)), png


def drawing(
    name: str,
    title: str,
    caption: str,
    height: float,
    draw: "Callable[[Figure, bool], None]",
    narrow_height: float | None = None,
) -> Drawing:
    """Draw a figure in both variants.

    Source: matplotlib's SVG backend.

    Args:
        name: unique in the page; prefix of every id.
        title: shown above.
        caption: shown below, says what a good curve looks like.
        height: inches, of both variants.
        draw: fills an empty figure; is told whether it is the narrow variant.
        narrow_height: inches, of the narrow variant where it stacks its panels; None = ``height``.

    Returns:
        The drawing; the same input gives the same text.

    Padding contract: there is none.
    """
    return Drawing(
        name,
        title,
        caption,
        wide=_render(f"{name}-w", title, WIDE, height, lambda figure: draw(figure, False)),
        narrow=_render(f"{name}-n", title, NARROW, narrow_height or height, lambda figure: draw(figure, True)),
    )


def _render(prefix: str, title: str, width: float, height: float, draw: "Callable[[Figure], None]") -> str:
    with _style(prefix):
        return _svg(_figure(width, height, draw), prefix, title)


def _style(salt: str) -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt})


def _figure(width: float, height: float, draw: "Callable[[Figure], None]") -> "Figure":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: "Figure", prefix: str, title: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return themed(out.getvalue(), prefix, title)


def _png(figure: "Figure") -> bytes:
    """A figure that was laid out for its SVG, with a white margin around it."""
    from PIL import Image, ImageOps

    out, framed = io.BytesIO(), io.BytesIO()
    figure.set_layout_engine("none")  # everything stays where it is
    figure.savefig(out, format="png", dpi=PNG_DPI, facecolor=CARD, metadata={"Software": None})
    ImageOps.expand(Image.open(out).convert("RGB"), PNG_MARGIN, CARD).save(framed, "PNG")
    return framed.getvalue()


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
