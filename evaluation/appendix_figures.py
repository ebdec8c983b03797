"""The figures of Secrets of RLHF Part II's appendix C: growing subsets (Figures 21, 22) and bands (Figures 23 to 25)."""

from typing import TYPE_CHECKING

import numpy as np

from evaluation.groups import how_many_seeds
from evaluation.panels import chance, common_legend, draw_curves, draw_estimate, panels, percent
from evaluation.studies import (
    AMBIGUOUS_BAND,
    FLIPPED_BAND,
    STRONGEST,
    TREATED_BAND,
    WEAKEST,
    Rows,
    curves,
    last_and_best,
    sets_of,
)
from evaluation.svg import BLUE, MUTED, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SHOWN = 5
"""Curves of growing subsets in one panel."""
NEAR_CHANCE = 0.56
"""A panel that reaches down to here shows where one half is."""


def growing_plots(rows: Rows) -> tuple[Plot, ...]:
    """Figures 21 and 22.

    Source: Secrets of RLHF Part II (2401.06080), appendix C.1.

    Args:
        rows: of the study ``growing``.

    Returns:
        The plots, those that have rows.

    Padding contract: there is none.
    """
    made = (_from_weakest(rows), _from_strongest(rows))
    return tuple(plot for plot in made if plot is not None)


def band_plots(rows: Rows) -> tuple[Plot, ...]:
    """Figures 23 to 25.

    Source: Secrets of RLHF Part II (2401.06080), appendix C.2.

    Args:
        rows: of the study ``bands``.

    Returns:
        The plots, those that have rows.

    Padding contract: there is none.
    """
    made = (_flipped_band(rows), _ambiguous_band(rows), _treated_band(rows))
    return tuple(plot for plot in made if plot is not None)


def _of_panel(rows: Rows, panel: str) -> Rows:
    return [row for row in rows if row.panel == panel]


def _from_weakest(rows: Rows) -> Plot | None:
    return _growing(
        _of_panel(rows, WEAKEST),
        "fig21-weakest",
        "Figure 21",
        "A growing part, from the weakest",
        "Good: below one half at first, then it climbs as right labels outweigh the wrong ones.",
    )


def _from_strongest(rows: Rows) -> Plot | None:
    return _growing(
        _of_panel(rows, STRONGEST),
        "fig22-strongest",
        "Figure 22",
        "A growing part, from the strongest",
        "Good: high at once, and last equals best: no late decline until wrong pairs come in at the right end.",
    )


def _growing(rows: Rows, name: str, paper: str, title: str, good: str) -> Plot | None:
    """Accuracy against the share of the pairs, at the end and at best; and some of the curves behind it."""
    if not rows:
        return None
    where = sets_of(rows)[0]
    ends = last_and_best(rows, where)
    over = curves(rows, "accuracy", where)
    few = sorted({round(i) for i in np.linspace(0, len(over) - 1, min(MAX_SHOWN, len(over)))})
    styles = [(BLUE, 0.25 + 0.75 * (i + 1) / len(few)) for i in range(len(few))]

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, 2, narrow)
        x = np.arange(len(ends))
        best = [estimate.value for _, _, estimate in ends]
        axes[0].plot(x, best, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="best on the way")
        for number, (_, last, _) in enumerate(ends):
            draw_estimate(axes[0], number, last, BLUE, "at the end" if number == 0 else None)
        axes[0].plot(x, [last.value for _, last, _ in ends], color=BLUE)
        shown = x if len(x) <= 4 else x[[0, len(x) // 3, 2 * len(x) // 3, -1]]
        axes[0].set_xticks(shown, [ends[i][0] for i in shown])
        axes[0].grid(axis="x", visible=False)
        axes[0].set_xlabel("share of the pairs")
        common_legend(figure, axes[:1], 2)
        draw_curves(axes[1], [over[i] for i in few], styles)
        axes[0].set_title("by share")
        axes[1].set_title("over training")
        for ax in axes:
            if ax.get_ylim()[0] < NEAR_CHANCE:
                chance(ax, "")
            percent(ax)

    return Plot(
        name,
        paper,
        title,
        f"Accuracy on the {where} validation set against the share of the pairs that are trained on, all for equally many steps; "
        f"over training {', '.join(over[i].line for i in few)}, the more the stronger the line. {how_many_seeds(rows)}. {good}",
        2.9,
        draw,
        4.4,
    )


def _flipped_band(rows: Rows) -> Plot | None:
    return _band(
        _of_panel(rows, FLIPPED_BAND),
        "fig23-flipped",
        "Figure 23",
        "The weakest tenth, flipped, alone",
        "Good: all lie above one half; in the paper soft label and margin together beat either alone.",
    )


def _ambiguous_band(rows: Rows) -> Plot | None:
    return _band(
        _of_panel(rows, AMBIGUOUS_BAND),
        "fig24-ambiguous",
        "Figure 24",
        "The ambiguous band from 30 to 40% alone",
        "Good: near one half whatever is done; in the paper the margin helps a little and the soft label hardly.",
    )


def _treated_band(rows: Rows) -> Plot | None:
    return _band(
        _of_panel(rows, TREATED_BAND),
        "fig25-treated",
        "Figure 25",
        "All pairs, with the weakest tenth treated",
        "Good: flip and soft label both end above none: either takes the harm out of the weakest tenth.",
    )


def _band(rows: Rows, name: str, paper: str, title: str, good: str) -> Plot | None:
    """Accuracy over training of the treatments of one band."""
    if not rows:
        return None
    where = sets_of(rows)[0]

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        draw_curves(ax, curves(rows, "accuracy", where))
        if ax.get_ylim()[0] < NEAR_CHANCE:
            chance(ax, "")
        percent(ax)
        common_legend(figure, [ax], 2 if narrow else 4)

    text = f"Accuracy on the {where} validation set over training. {how_many_seeds(rows)}. {good}"
    return Plot(name, paper, title, text, 2.7, draw, 2.9)
