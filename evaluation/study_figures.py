"""The figures of a strength run's studies: Figures 4 to 8 of Secrets of RLHF Part II, and with them those of its appendix.

Letters: G groups.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from evaluation.appendix_figures import band_plots, growing_plots
from evaluation.groups import how_many_seeds
from evaluation.panels import chance, common_legend, draw_curves, draw_estimate, one_over_two, one_range, panels, percent
from evaluation.studies import TRAINING, Rows, curves, last_and_best, sets_of
from evaluation.svg import BLUE, ORANGE, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_plots(studies: Mapping[str, Rows]) -> tuple[Plot, ...]:
    """Every figure that the studies have data for, in the order of the paper's.

    Source: Secrets of RLHF Part II (2401.06080), sections 2.3 to 2.5 and appendix C.

    Args:
        studies: rows by study.

    Returns:
        The plots; studies of other names have none.

    Padding contract: there is none.
    """
    makers: list[tuple[str, Callable[[Rows], tuple[Plot, ...]]]] = [
        ("deciles", lambda rows: (_deciles(rows),)),
        ("lowest", lambda rows: (_lowest(rows),)),
        ("top", lambda rows: (_top(rows),)),
        ("margin", lambda rows: (_margin(rows),)),
        ("methods", lambda rows: (_methods(rows),)),
        ("growing", growing_plots),
        ("bands", band_plots),
    ]
    found = [(studies[name], maker) for name, maker in makers if name in studies and sets_of(studies[name])]
    return tuple(plot for rows, maker in found for plot in maker(rows))


def _deciles(rows: Rows) -> Plot:
    """Accuracy of models trained on one group alone: at the end, and over training."""
    where = sets_of(rows)[0]
    ends = last_and_best(rows, where)
    over = curves(rows, "accuracy", where)
    styles = [_diverging(i, len(over)) for i in range(len(over))]

    def draw(figure: "Figure", narrow: bool) -> None:
        top, bottom = figure.subplots(2, 1)
        x = np.arange(len(ends))
        for number, (_, last, _) in enumerate(ends):
            draw_estimate(top, number, last, styles[number][0])
        shown = x if len(x) <= 5 or not narrow else x[::3]
        top.set_xticks(shown, [ends[i][0] for i in shown])
        top.tick_params(axis="x", labelsize=7 if len(x) > 8 and not narrow else 8.5)
        top.grid(axis="x", visible=False)
        top.set_title("at the end of training")
        chance(top, "a coin")
        percent(top)
        draw_curves(bottom, over, styles)
        bottom.set_title("over training (orange: the weakest; blue: the strongest)")
        if narrow:
            bottom.set_title("over training (orange: weakest)")
        chance(bottom, "")
        percent(bottom)

    return Plot(
        "fig04-deciles",
        "Figure 4",
        "Trained on one group alone",
        f"Accuracy on the {where} validation set of models that saw one group of pairs by strength, all for equally many steps. "
        f"{how_many_seeds(rows)}. Good: the weakest groups end below one half, the middle ones near it, the strong ones far "
        "above. In the paper the strongest tenth alone is not the best.",
        3.8,
        draw,
        4.2,
    )


def _lowest(rows: Rows) -> Plot:
    """The two lowest groups alone, as labelled and flipped."""
    where = sets_of(rows)[0]
    names = list(dict.fromkeys(row.panel for row in rows))

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, len(names), narrow, sharex=True, sharey=True)
        for ax, name in zip(axes, names, strict=True):
            draw_curves(ax, curves([row for row in rows if row.panel == name], "accuracy", where))
            ax.set_title(name)
        for ax in axes:
            chance(ax, "")
            percent(ax)
            if narrow and ax is not axes[-1]:
                ax.set_xlabel("")
        common_legend(figure, axes, 2)

    return Plot(
        "fig05-flip",
        "Figure 5",
        "The weakest groups, as labelled and flipped",
        f"Accuracy on the {where} validation set when trained on one of the two weakest groups alone, as labelled (none) and "
        f"flipped. {how_many_seeds(rows)}. Good: flip ends above one half and above none: even wrong pairs hold information.",
        3.8,
        draw,
        4.2,
    )


def _top(rows: Rows) -> Plot:
    return _accuracy_and_losses(
        rows,
        "fig06-top",
        "Figure 6",
        "The strongest group alone",
        "Good: with soft labels the training loss stays off 0 and the validation loss does not climb; soft label and margin "
        "together are the most accurate in the paper.",
    )


def _margin(rows: Rows) -> Plot:
    return _accuracy_and_losses(
        rows,
        "fig07-margin",
        "Figure 7",
        "A margin on all pairs",
        "Good: with the margin the accuracy is higher at every step; the losses themselves are not alike, for the training loss "
        "contains the margin.",
    )


def _accuracy_and_losses(rows: Rows, name: str, paper: str, title: str, good: str) -> Plot:
    """Validation accuracy above, validation loss and training loss below."""
    where = sets_of(rows)[0]
    wanted = (("accuracy", where, "validation accuracy"), ("loss", where, "validation loss"), ("loss", TRAINING, "training loss"))
    quantities = [(quantity, of, label) for quantity, of, label in wanted if curves(rows, quantity, of)]

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = one_over_two(figure, len(quantities), narrow)
        for ax, (quantity, of, label) in zip(axes, quantities, strict=True):
            draw_curves(ax, curves(rows, quantity, of))
            ax.set_title(label)
            if quantity == "accuracy":
                percent(ax)
            else:
                ax.set_ylim(bottom=0)
        one_range(axes, narrow)
        common_legend(figure, axes, 4)

    return Plot(
        name,
        paper,
        title,
        f"Measured on the {where} validation set; losses in nats per pair. {how_many_seeds(rows)}. {good}",
        3.8,
        draw,
        5.2,
    )


def _methods(rows: Rows) -> Plot:
    """Every treatment on every validation set over training."""
    sets = sets_of(rows)

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, len(sets), narrow, sharex=True)
        for ax, where in zip(axes, sets, strict=True):
            draw_curves(ax, curves(rows, "accuracy", where))
            ax.set_title(where.replace("_", " "))
            percent(ax)
        for ax in axes if narrow else axes[: max(0, len(axes) - 2)]:
            if ax is not axes[-1]:
                ax.set_xlabel("")
        common_legend(figure, axes, 3 if narrow else 4)

    lines = -(-len(sets) // 2)
    return Plot(
        "fig08-methods",
        "Figure 8",
        "What to do with wrong pairs",
        f"Accuracy on each validation set over training on all pairs. {how_many_seeds(rows)}. Good: the treated models end above "
        "none on every set and stay flat, where none and margin may peak and then decline as they learn wrong labels by heart.",
        3.8 if lines == 1 else 4.8,
        draw,
        1.4 + 1.8 * len(sets),
    )


def _diverging(number: int, total: int) -> tuple[str, float]:
    """Orange for the weak half, blue for the strong one; the paler, the nearer to the middle."""
    place = (number + 0.5) / total * 2 - 1  # -1 .. 1
    return (ORANGE if place < 0 else BLUE), 0.25 + 0.75 * abs(place)
