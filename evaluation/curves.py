"""The shapes that several figures share: a curve over steps, a dot per round, ticks, legends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from evaluation.run import Run
from evaluation.svg import CARD, GRID, MUTED, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, int, float]]
"""(x, round, value), in the order of x."""
MAX_POINTS, MAX_TICKS = 400, 8

Item = TypeVar("Item")


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` items, evenly spaced, the first and the last among them.

    Source: none; so that a run of a hundred rounds still has a page of figures.

    Args:
        items: in order.
        most: at least 2.

    Returns:
        All of them where they are few enough, else ``most``.

    Padding contract: there is none.
    """
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window, cut off at both ends.

    y_i = mean of x_j with |i - j| <= width // 2

    Source: none needed.

    Args:
        values: [N] float.
        width: of the window, >= 1.

    Returns:
        [N] float.

    Padding contract: there is none; beyond the ends nothing is invented.
    """
    x = np.asarray(values, dtype=np.float64)
    half = width // 2
    return [float(x[max(0, i - half) : i + half + 1].mean()) for i in range(len(x))]


def curve(ax: "Axes", points: Points, colour: str, label: str | None) -> None:
    """Draw a noisy series: each point pale, the running mean on top, per round; dotted lines part the rounds.

    Source: none needed.

    Args:
        ax: where.
        points: the series.
        colour: stand-in colour of ``evaluation.svg``.
        label: in the legend, or None.

    Padding contract: there is none.
    """
    rounds = sorted({r for _, r, _ in points})
    width = max(1, len(points) // len(rounds) // 6)
    for number, index in enumerate(rounds):
        xs = [x for x, r, _ in points if r == index]
        ys = [y for _, r, y in points if r == index]
        every = max(1, len(points) // MAX_POINTS)
        if width > 1:
            ax.plot(xs[::every], ys[::every], color=colour, alpha=0.28, linewidth=1.0)
        ax.plot(
            xs[::every],
            running_mean(ys, width)[::every],
            color=colour,
            marker="o" if len(xs) == 1 else None,
            label=label if number == 0 else None,
        )
        if number:
            ax.axvline(xs[0] - 0.5, color=MUTED, linewidth=0.9, linestyle=":")


def step_and_round(
    run: Run, name: str, title: str, caption: str, unit: str, points: Points, by_round: Sequence[float], colour: str
) -> Drawing:
    """A figure of one quantity: a curve by step where there is one, and a dot per evaluation (SFT first).

    Source: none needed.

    Args:
        run: the run.
        name: of the figure, unique in the page.
        title: shown above.
        caption: shown below.
        unit: label of the axis.
        points: by step, may be empty.
        by_round: [1 + R] float, SFT first.
        colour: stand-in colour of ``evaluation.svg``.

    Returns:
        The drawing.

    Padding contract: there is none.
    """
    ends = [max((x for x, r, _ in points if r == round_.index), default=None) for round_ in run.ledger.rounds]
    by_step = all(end is not None for end in ends)
    xs = [-0.5, *(end + 0.5 for end in ends if end is not None)] if by_step else [float(i) for i in range(len(by_round))]

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        if by_step:
            curve(ax, points, colour, None)
            step_axis(ax, "PPO step, all rounds")
            ax.plot(
                xs, by_round, "o", color=colour, markersize=7, markeredgecolor=CARD, markeredgewidth=1.5, clip_on=False, zorder=5
            )
        else:
            ax.plot(xs, by_round, "-o", color=colour)
            round_ticks(ax, run)
            ax.axhline(by_round[0], color=MUTED, linewidth=0.8, linestyle="--")
        ax.set_ylabel(unit)
        ax.set_ylim(min(0.0, *by_round), 1.08 * max(ax.get_ylim()[1], *by_round))

    return drawing(name, title, caption, 2.7, draw)


def step_axis(ax: "Axes", label: str) -> None:
    """Give an axis of steps its label, and ticks at whole numbers only.

    Source: none needed.

    Args:
        ax: where.
        label: below the axis.

    Padding contract: there is none.
    """
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def even_places(first: int, last: int, most: int) -> list[int]:
    """Whole numbers at one distance from each other, for ticks: at most ``most`` and the first one.

    Source: none needed.

    Args:
        first: the first place, which is always among them.
        last: none lies beyond it.
        most: at least 1.

    Returns:
        Ascending.

    Padding contract: there is none.
    """
    return list(range(first, last + 1, max(1, -(-(last - first) // most))))


def round_ticks(ax: "Axes", run: Run) -> None:
    """Ticks that name SFT and the rounds, evenly spaced.

    Source: none needed.

    Args:
        ax: where; x = 0 is SFT, x = 1 the first round.
        run: the run.

    Padding contract: there is none.
    """
    rounds = run.ledger.rounds
    shown = even_places(0, len(rounds), MAX_TICKS)
    ax.set_xticks(shown, ["SFT" if x == 0 else str(rounds[x - 1].index) for x in shown])
    ax.set_xlabel("round")
    ax.grid(axis="x", visible=False)
    ax.tick_params(axis="x", color=GRID)


def legend(ax: "Axes", columns: int) -> None:
    """A legend above the axes, where it covers no data.

    Source: none needed.

    Args:
        ax: whose.
        columns: entries in one line.

    Padding contract: there is none.
    """
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)
