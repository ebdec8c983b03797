"""The figures of a strength run that need no further training: Figures 1 to 3 of Secrets of RLHF Part II.

Letters: N pairs, G groups.
"""

from typing import TYPE_CHECKING

import numpy as np

from evaluation.groups import Estimate, equal_groups, share
from evaluation.panels import bin_edges, chance, common_legend, histogram, panels, percent
from evaluation.strength_run import StrengthRun
from evaluation.svg import BLUE, GREEN, MUTED, ORANGE, PURPLE, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_GROUPS = 20
FEWEST_PER_GROUP, MOST_GROUPS = 50, 20
"""Of the groups whose labels are compared with a second labeller's: smaller ones would say nothing."""


def strength_plots(run: StrengthRun) -> tuple[Plot, ...]:
    """Figures 1 to 3, those that the run has data for.

    Source: Secrets of RLHF Part II (2401.06080), section 2.2.

    Args:
        run: as read.

    Returns:
        The plots.

    Padding contract: there is none.
    """
    return tuple(plot for plot in (_histograms(run), _groups(run), _agreement(run)) if plot is not None)


def agreement_by_group(says: "np.ndarray[tuple[int], np.dtype[np.int8]]", run: StrengthRun) -> list[tuple[float, Estimate]]:
    """How often somebody agrees with the label, by groups of equal size and rising strength.

    Source: Secrets of RLHF Part II, section 2.2 and Figure 3 (there groups of 500 validation pairs).

    Args:
        says: [N] int8, 1 = agrees with the label, 0 = contradicts it, -1 = left out.
        run: whose strengths sort the pairs.

    Returns:
        (mean strength, share with Wilson's interval) per group; min(20, N / 50) groups, at least two.

    Padding contract: there is none.
    """
    asked = np.flatnonzero(says >= 0)
    strength = run.mean[asked]
    num = max(2, min(MOST_GROUPS, len(asked) // FEWEST_PER_GROUP))
    return [
        (float(strength[group].mean()), share(float(says[asked[group]].sum()), len(group)))
        for group in equal_groups(strength, num)
    ]


def _histograms(run: StrengthRun) -> Plot:
    """Strength, and its standard deviation over the members."""
    rows = run.of_training
    mean = run.mean[rows]
    wrong = None if run.wrong is None else run.wrong[rows]
    if wrong is None:
        parts = [("below 0", mean[mean < 0], ORANGE), ("0 or more", mean[mean >= 0], BLUE)]
        colours = "Orange: below 0."
    else:
        parts = [("label wrong", mean[wrong], ORANGE), ("label right", mean[~wrong], BLUE)]
        colours = "Orange: pairs whose label the truth contradicts; good: they lie to the left of 0."

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, 1 if run.std is None else 2, narrow)
        histogram(axes[0], parts, bin_edges(mean, 40))
        axes[0].axvline(0, color=MUTED, linewidth=1.0)
        axes[0].set_title(f"mean: {float((mean < 0).mean()):.0%} below 0")
        axes[0].set_xlabel("strength μ (score)")
        axes[0].set_ylabel("share of pairs")
        if run.std is not None:
            std = run.std[rows]
            histogram(axes[1], [("", std, PURPLE)], bin_edges(std, 40))
            axes[1].set_xlim(left=0)
            axes[1].set_title(f"std: median {float(np.median(std)):.2f}")
            axes[1].set_xlabel("σ over the members (score)")
        common_legend(figure, axes[:1], 2)

    return Plot(
        "fig01-strength",
        "Figure 1",
        "Strength of the training pairs",
        f"Mean and standard deviation over the members of score(chosen) - score(rejected). {colours} Strong sets lie far to the "
        "right of 0; in the paper a quarter of HH-RLHF lies below it. The long tail of the std is where the members disagree.",
        3.2,
        draw,
        None if run.std is None else 4.4,
    )


def _groups(run: StrengthRun) -> Plot:
    """Mean strength and mean standard deviation of 20 groups by strength."""
    rows = run.of_training
    groups = equal_groups(run.mean[rows], NUM_GROUPS)
    means = [float(run.mean[rows][group].mean()) for group in groups]
    stds = None if run.std is None else [float(run.std[rows][group].mean()) for group in groups]
    x = (np.arange(len(groups)) + 0.5) * 100 / len(groups)

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = list(figure.subplots(1 if stds is None else 2, 1, sharex=True, squeeze=False)[:, 0])
        colours = [ORANGE if value < 0 else BLUE for value in means]
        axes[0].bar(x, means, width=92 / len(groups), color=colours)
        axes[0].axhline(0, color=MUTED, linewidth=0.8)
        axes[0].set_title("mean strength μ")
        if stds is not None:
            axes[1].plot(x, stds, "-o", color=PURPLE)
            axes[1].set_title("mean std σ")
            axes[1].set_ylim(0, 1.12 * max(stds) or 1.0)
        _share_axis(axes[-1])

    return Plot(
        "fig02-groups",
        "Figure 2",
        f"{len(groups)} groups by strength",
        "Training pairs sorted by strength and cut into groups of equal size. Good: the std is a U: low in the middle, higher "
        "at both ends, at clear errors and clear preferences. A std that only rises says that the members differ in scale.",
        3.2,
        draw,
    )


def _agreement(run: StrengthRun) -> Plot | None:
    """Agreement with the second labeller and with the truth, by group."""
    sources: list[tuple[str, str, list[tuple[float, Estimate]]]] = []
    if run.label is not None:
        sources.append(("second labeller", GREEN, agreement_by_group(run.label, run)))
    if run.truth is not None:
        only_training = np.where(run.train | ~run.train.any(), run.truth, -1).astype(np.int8)
        if (only_training >= 0).any():
            sources.append(("truth (training pairs)", BLUE, agreement_by_group(only_training, run)))
    if not sources:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for name, colour, groups in sources:
            x = (np.arange(len(groups)) + 0.5) * 100 / len(groups)
            value = np.array([estimate.value for _, estimate in groups])
            low = np.array([estimate.low for _, estimate in groups])
            high = np.array([estimate.high for _, estimate in groups])
            ax.errorbar(x, value, (value - low, high - value), color=colour, marker="o", elinewidth=1.0, capsize=2, label=name)
        ax.set_ylim(0, 1.02)
        percent(ax)
        chance(ax, "a coin")
        _share_axis(ax)
        ax.set_ylabel("label agreed with")
        common_legend(figure, [ax], 2)

    ends = ", ".join(f"{name}: {groups[0][1].value:.0%} to {groups[-1][1].value:.0%}" for name, _, groups in sources)
    return Plot(
        "fig03-agreement",
        "Figure 3",
        "Who agrees with the labels",
        f"Share of labels that somebody else agrees with, by groups of equal size, with 95% intervals ({ends}). Good: it climbs "
        "from well below one half to near 1; then low strength finds wrong labels. In the paper 16% to 96% for GPT-4.",
        3.8,
        draw,
        3.0,
    )


def _share_axis(ax: "Axes") -> None:
    ax.set_xlabel("pairs by strength, weakest on the left")
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    ax.grid(axis="x", visible=False)
