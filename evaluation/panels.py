"""What the figures of strength and reward runs share: panels that stack on a phone, curves with intervals, histograms."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.curves import step_axis
from evaluation.groups import FEWEST_SEEDS, Estimate, FloatArray
from evaluation.studies import Curve
from evaluation.svg import BLUE, BROWN, GREEN, GREY, MUTED, ORANGE, PURPLE, RED, SERIES, SKY, YELLOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_COLOURS: Mapping[str, str] = {
    "none": GREY,
    "flip": BLUE,
    "soft": GREEN,
    "margin": ORANGE,
    "flip+margin": PURPLE,
    "soft+margin": RED,
    "drop": BROWN,
    "flip+soft": SKY,
    "flip+soft+margin": YELLOW,
}
"""A treatment has one colour in every figure."""
FEW = 4
"""More curves than this have paler bands."""
Y_MARGIN = 0.12
"""Room above and below the means, for their intervals."""


def panels(figure: "Figure", num: int, narrow: bool, sharex: bool = False, sharey: bool = False) -> "list[Axes]":
    """Axes beside each other, two in a row; one below the other in the narrow variant.

    Source: none needed.

    Args:
        figure: an empty one.
        num: of panels.
        narrow: the variant.
        sharex: one range of x for all.
        sharey: one range of y for all.

    Returns:
        ``num`` axes.

    Padding contract: there is none.
    """
    columns = 1 if narrow else min(2, num)
    lines = -(-num // columns)
    axes = figure.subplots(lines, columns, sharex=sharex, sharey=sharey, squeeze=False).flatten()
    for ax in axes[num:]:
        ax.axis("off")
    return list(axes[:num])


def one_over_two(figure: "Figure", num: int, narrow: bool) -> "list[Axes]":
    """Up to three axes of one range of x: the first across the whole width, two below it; all stacked in the narrow variant.

    Source: none needed.

    Args:
        figure: an empty one.
        num: of panels, at most 3.
        narrow: the variant.

    Returns:
        ``num`` axes. Call ``one_range`` when they are drawn.

    Padding contract: there is none.
    """
    letters = "abc"[:num]
    wide = [["a", "a"], list(letters[1:])] if num == 3 else [list(letters)]
    return list(figure.subplot_mosaic([[letter] for letter in letters] if narrow else wide).values())


def one_range(axes: "Sequence[Axes]", narrow: bool) -> None:
    """Give panels over training the widest range of x among them, and name it below the lowest ones.

    Source: none needed.

    Args:
        axes: of ``one_over_two``, drawn.
        narrow: the variant.

    Padding contract: there is none.
    """
    limits = [ax.get_xlim() for ax in axes]
    for number, ax in enumerate(axes):
        ax.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        step_axis(ax, "optimizer step" if number == len(axes) - 1 or (not narrow and number) or len(axes) == 2 else "")


def colour_of(line: str, number: int) -> str:
    """The colour of a treatment; of anything else, the one at its place in the legend.

    Source: none needed.

    Args:
        line: the arm's name in its panel.
        number: its place.

    Returns:
        A colour of ``evaluation.svg``.

    Padding contract: there is none.
    """
    return METHOD_COLOURS[line] if line in METHOD_COLOURS else SERIES[number % len(SERIES)]


def draw_curves(ax: "Axes", lines: Sequence[Curve], styles: Sequence[tuple[str, float]] | None = None) -> None:
    """Means over seeds against the step, with their 95% intervals as bands, which play no part in the range of y.

    Source: none needed.

    Args:
        ax: where.
        lines: the curves.
        styles: (colour, opacity) of each; None takes ``colour_of``.

    Padding contract: there is none.
    """
    from matplotlib.collections import PolyCollection

    chosen = [(colour_of(curve.line, i), 1.0) for i, curve in enumerate(lines)] if styles is None else styles
    for curve, (colour, opacity) in zip(lines, chosen, strict=True):
        lonely = len(curve.steps) == 1
        ax.plot(
            curve.steps,
            [point.value for point in curve.points],
            color=colour,
            alpha=opacity,
            marker="o" if lonely else None,
            linewidth=1.6,
            label=curve.line,
        )
        shade = 0.13 if len(lines) <= FEW else 0.06
        if curve.num_seeds >= FEWEST_SEEDS and not lonely:
            there = [(float(step), point.low) for step, point in zip(curve.steps, curve.points, strict=True)]
            back = [(float(step), point.high) for step, point in zip(curve.steps, curve.points, strict=True)]
            band = PolyCollection([[*there, *reversed(back)]], facecolor=colour, alpha=shade * opacity, linewidth=0)
            ax.add_collection(band, autolim=False)
    ax.margins(y=Y_MARGIN)
    step_axis(ax, "optimizer step")


def draw_estimate(ax: "Axes", x: float, estimate: Estimate, colour: str, label: str | None = None) -> None:
    """A point with its interval, which plays no part in the range of y.

    Source: none needed.

    Args:
        ax: where.
        x: its place.
        estimate: what it shows.
        colour: of ``evaluation.svg``.
        label: in the legend, or None.

    Padding contract: there is none.
    """
    from matplotlib.collections import LineCollection

    ax.plot([x], [estimate.value], "o", color=colour, label=label)
    ax.add_collection(LineCollection([[(x, estimate.low), (x, estimate.high)]], colors=colour, linewidths=1.2), autolim=False)
    ax.margins(y=Y_MARGIN)


def common_legend(figure: "Figure", axes: "Sequence[Axes]", columns: int) -> None:
    """One legend above all panels, each name once.

    Source: none needed.

    Args:
        figure: whose.
        axes: its panels.
        columns: entries in one line.

    Padding contract: there is none.
    """
    named: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True)) | named
    figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=columns)


def chance(ax: "Axes", label: str) -> None:
    """A dashed line at one half.

    Source: none needed.

    Args:
        ax: where.
        label: what one half stands for; "" writes nothing.

    Padding contract: there is none.
    """
    ax.axhline(0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if label:
        ax.annotate(
            label, (1, 0.5), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", color=MUTED, fontsize=7.5,
        )  # fmt: skip


def percent(ax: "Axes") -> None:
    """Write the y axis as percent.

    Source: none needed.

    Args:
        ax: whose.

    Padding contract: there is none.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = ax.get_ylim()
    digits = 1 if high - low < 0.04 else 0
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))  # no 72.5%, which would read 72%
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")


def bin_edges(values: FloatArray, num: int) -> FloatArray:
    """Edges of about ``num`` bins of equal width that hold all but 2 in 1,000 values; 0 is one of them where it lies inside.

    Source: none needed.

    Args:
        values: [N] float64, at least one.
        num: of bins.

    Returns:
        [about num + 1] float64, rising. What lies outside belongs in the outermost bins.

    Padding contract: there is none.
    """
    low, high = (float(np.quantile(values, q)) for q in (0.001, 0.999))
    if high <= low:
        return np.array([low - 0.5, low + 0.5])
    width = (high - low) / num
    first, last = int(np.floor(low / width)), int(np.ceil(high / width))
    return np.arange(first, last + 1, dtype=np.float64) * width


def histogram(ax: "Axes", parts: Sequence[tuple[str, FloatArray, str]], edges: FloatArray) -> None:
    """Shares of all values, the parts stacked on each other.

    Source: none needed.

    Args:
        ax: where.
        parts: (name, values, colour), drawn from the bottom up.
        edges: of the bins; values outside are counted in the outermost.

    Padding contract: there is none.
    """
    total = sum(len(values) for _, values, _ in parts)
    clipped = [np.clip(values, edges[0], edges[-1]) for _, values, _ in parts]
    ax.hist(
        clipped,
        edges.tolist(),
        weights=[np.full(len(values), 1 / total) for values in clipped],
        stacked=True,
        color=[colour for *_, colour in parts],
        label=[name for name, *_ in parts],
        rwidth=0.92,
    )
    percent(ax)
    ax.grid(axis="x", visible=False)
