"""The papers' tables as one picture: gold against the distance from SFT, round by round, and the ablations beside the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.pictures import picture
from benchmarks.reproduce.arms import ITEMS, Item
from benchmarks.reproduce.rows import Row, gold, last_gold, of_arm, paired, stations, told_in
from evaluation.compare import mean_interval
from evaluation.svg import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (GREY, BLUE, PURPLE, ORANGE, GREEN, SKY, RED)
"""The arm that the others are compared with, then those."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every item on a panel; arms without a run are left out.

    Args:
        rows: of the results.
        path: .svg or .png.
    """
    heights = (2.9, 2.9, 2.9, 4.4)
    with picture(path, 11, sum(heights)) as figure:
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        lines = [figure.add_subfigure(grid[place]) for place in range(len(heights))]
        for line, numbers in zip(lines, ((1, 2), (3, 4), (5, 6)), strict=False):
            items = [item for item in ITEMS if item.number in numbers]
            for axis, item in zip(line.subplots(1, len(items)), items, strict=True):
                (_outcomes if item.base is None else _curves)(axis, told_in(rows, item), item)
                _title(axis, f"{item.number} · {item.title}")
        (item,) = (item for item in ITEMS if item.number == 7)
        axes = lines[-1].subplots(1, 2, sharey=True)
        _forest(axes[0], rows, item, gold)
        _title(axes[0], f"7 · {item.title}: best round")
        _forest(axes[1], rows, item, last_gold)
        _title(axes[1], "last round")


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def _outcomes(axis: Axes, rows: Sequence[Row], item: Item) -> None:
    """Shares of win, tie and lose against SFT, means over seeds."""
    seeds = list(of_arm(rows, item.arms[0]).values())
    for number, each in enumerate(zip(*(row["rounds"][1:] for row in seeds), strict=False), start=1):
        left = 0.0
        for name, colour in (("win", BLUE), ("tie", GREY), ("lose", ORANGE)):
            share = fmean(one[name] for one in each)
            axis.barh(f"round {number}", share, left=left, color=colour, height=0.66, label=name if number == 1 else None)
            axis.text(left + share / 2, number - 1, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white")
            left += share
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("share of test prompts, against SFT")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(axis, "upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _curves(axis: Axes, rows: Sequence[Row], item: Item) -> None:
    """Means over seeds of each round, from SFT; bars are 95% intervals of gold."""
    arms = sorted(item.arms, key=lambda arm: arm != item.base)
    furthest = 0.0
    for arm, colour in zip(arms, COLOURS[: len(arms)], strict=True):
        each = list(zip(*stations(rows, arm).values(), strict=False))  # of a round what every seed has
        if each:
            far = [fmean(sqrt(max(one.get("kl", 0.0), 0.0)) for one in ones) for ones in each]
            golds = [[float(one["gold"]) for one in ones] for ones in each]
            means, bars = [fmean(values) for values in golds], [_half(values) for values in golds]
            axis.errorbar(far, means, bars, color=colour, marker="o", markersize=4, elinewidth=0.9, capsize=2, label=arm)
            furthest = max(furthest, 0.0 if arm == "DPO" else max(far))
    if "DPO" in arms and furthest:
        axis.set_xlim(right=1.1 * furthest)  # the largest learning rate is far out, and of no use
    axis.set_xlabel("√KL from SFT, a dot a round" + (", of DPO a learning rate" if "DPO" in arms else ""))
    axis.set_ylabel("gold reward")
    _legend(axis, "lower right")


def _legend(axis: Axes, place: str, **options: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, loc=place, fontsize=8, **options)


def _forest(axis: Axes, rows: Sequence[Row], item: Item, value: Callable[[Row], float]) -> None:
    """Differences to the base, paired by seed, with their 95% intervals; filled where these leave zero out."""
    assert item.base is not None
    arms = [arm for arm in item.arms if arm != item.base]
    for place, arm in enumerate(arms):
        found = paired(rows, arm, item.base, value)
        if len(found) > 1:
            mean, low, high = mean_interval(found)
            told = low > 0 or high < 0
            axis.plot([low, high], [place, place], color=BLUE if told else GREY, linewidth=1.3)
            axis.plot(mean, place, "o", color=BLUE if told else GREY, markerfacecolor=BLUE if told else "white", markersize=5)
    axis.axvline(0, color=MUTED, linewidth=0.8)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"gold above {item.base}'s")


def _half(values: Sequence[float]) -> float:
    """Of the 95% t-interval over seeds; 0 of one seed."""
    if len(values) < 2:
        return 0.0
    mean, _, high = mean_interval(values)
    return high - mean
