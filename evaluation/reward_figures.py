"""The figures of a reward run: Figures 8, 11, 16, 19 and 20 of Secrets of RLHF Part II, and a calibration curve.

Letters: N pairs, F features.
"""

from typing import TYPE_CHECKING

import numpy as np

from evaluation.curves import legend, running_mean, step_axis
from evaluation.differences import pair_differences, unseen
from evaluation.embedding import FEWEST_FEATURED, embed, first_pairs, same_side_neighbours
from evaluation.groups import FloatArray, calibration_bins, share
from evaluation.meta_figure import META_CAPTION, META_HEIGHT, META_NARROW_HEIGHT, META_SERIES, META_TITLE, draw_meta, has_meta
from evaluation.panels import common_legend, one_over_two, one_range, panels, percent
from evaluation.reward_run import RewardRun
from evaluation.svg import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, SERIES, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CALIBRATION_BINS, FEWEST_IN_BIN = 10, 10
"""The bins of the ECE in the card (``rm.validation``); those of fewer pairs count there and are not drawn."""
MAX_TSNE_PAIRS = 500


def reward_plots(run: RewardRun) -> tuple[Plot, ...]:
    """Every figure that the run has data for.

    Source: Secrets of RLHF Part II (2401.06080), sections 2.5, 3.1, 3.2 and appendix A.

    Args:
        run: as read.

    Returns:
        The plots, in the page's order.

    Padding contract: there is none.
    """
    made = (
        _validation(run),
        _calibration(run),
        _trajectories(run),
        _inflation(run),
        _tsne(run),
        _differences(run),
        _meta(run),
    )
    return tuple(plot for plot in made if plot is not None)


def _validation(run: RewardRun) -> Plot | None:
    """Accuracy, loss and calibration error of every validation set over training."""
    quantities = [
        (quantity, label)
        for quantity, label in (("accuracy", "accuracy"), ("loss", "loss (nats per pair)"), ("ece", "calibration error"))
        if any(len(run.over_training(f"validation/{name}/{quantity}")) > 1 for name in run.sets)
    ]
    if not quantities:
        return None
    kept = "" if run.best_step is None else f" Solid line: step {run.best_step:,}, whose weights early stopping kept."

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = one_over_two(figure, len(quantities), narrow)
        for ax, (quantity, label) in zip(axes, quantities, strict=True):
            for number, name in enumerate(run.sets):
                points = run.over_training(f"validation/{name}/{quantity}")
                _series(ax, points, SERIES[number % len(SERIES)], name.replace("_", " "))
            ax.set_title(label)
            if quantity != "loss":
                percent(ax)
            _epochs(ax, run)
            if run.best_step is not None:
                ax.axvline(run.best_step, color=MUTED, linewidth=0.9)
        one_range(axes, narrow)
        common_legend(figure, axes, 2 if narrow else 4)

    return Plot(
        "fig08-validation",
        "Figure 8",
        "On the validation sets over training",
        "Good: accuracy rises and stays on every set. A peak on the original set with a decline after it, or a loss that turns "
        f"up while accuracy stands still, is overfitting to wrong labels.{kept}",
        4.0,
        draw,
        5.2,
    )


def _calibration(run: RewardRun) -> Plot | None:
    """Accuracy against confidence, by validation set."""
    if not run.scores:
        return None
    bins = {name: calibration_bins(scores.difference, CALIBRATION_BINS) for name, scores in run.scores.items()}

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for number, (name, of_set) in enumerate(bins.items()):
            drawn = [b for b in of_set if b.count >= FEWEST_IN_BIN]
            values = [share(b.accuracy * b.count, b.count) for b in drawn]
            x, y = [b.confidence for b in drawn], [v.value for v in values]
            label = f"{name.replace('_', ' ')} (ECE {run.ece[name]:.1%})"
            colour = SERIES[number % len(SERIES)]
            ax.plot(
                x, y, "-o", color=colour, markersize=4.5 if number == 0 else 3, linewidth=1.8 if number == 0 else 1.2, label=label
            )
            if number == 0:
                spread = ([v.value - v.low for v in values], [v.high - v.value for v in values])
                ax.errorbar(x, y, spread, color=colour, linestyle="none", elinewidth=0.9, capsize=2)
        ax.set_xlim(0.49, 1.01)
        ax.set_xlabel("the model's probability for the response it prefers")
        if narrow:
            ax.set_xlabel("probability given by the model")
        ax.set_ylabel("share ranked as labelled")
        percent(ax)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        common_legend(figure, [ax], 1 if narrow else 2)

    return Plot(
        "calibration",
        "",
        "Can its probabilities be believed",
        f"Validation pairs by how sure the model is, with 95% intervals for {next(iter(bins))}; ECE is the mean distance from "
        "the dashed line. Good: on the line. Below it the model is surer than it should be, as after learning wrong labels; "
        "above it, shyer, as after learning from noisy ones.",
        4.0,
        draw,
        3.4,
    )


def _trajectories(run: RewardRun) -> Plot | None:
    """Loss and accuracy of the training batches, and the mean scores of chosen and rejected."""
    if not run.steps:
        return None
    chosen, rejected = run.over_training("scores/chosen_mean"), run.over_training("scores/rejected_mean")
    over_time = len(chosen) > 1

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, 3 if over_time else 2, True, sharex=True)
        _noisy(axes[0], [(s.step, s.loss) for s in run.steps], BLUE)
        axes[0].set_title("training loss (nats per pair)")
        _noisy(axes[1], [(s.step, s.accuracy) for s in run.steps if s.accuracy is not None], GREEN)
        axes[1].set_title("training accuracy")
        percent(axes[1])
        if over_time:
            _series(axes[2], chosen, BLUE, "chosen")
            _series(axes[2], rejected, ORANGE, "rejected")
            axes[2].legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2)
            axes[2].set_title("mean score")
        for ax in axes:
            _epochs(ax, run)
        step_axis(axes[-1], "optimizer step")

    return Plot(
        "fig19-training",
        "Figure 19",
        "The fit, and the scores of chosen and rejected" if over_time else "The fit",
        f"Batches pale, their running mean on top; {'mean scores are of validation pairs; ' if over_time else ''}dotted lines "
        f"part the epochs. Good: {'chosen and rejected part' if over_time else 'loss and accuracy level off'}. A training loss "
        "that drops at each dotted line is memory, not learning.",
        4.4 if over_time else 3.4,
        draw,
    )


def _inflation(run: RewardRun) -> Plot | None:
    """Mean score and spread against the difference that matters."""
    chosen, rejected = (dict(run.over_training(f"scores/{side}_mean")) for side in ("chosen", "rejected"))
    common = [step for step in chosen if step in rejected]
    if len(common) < 2:
        return None
    mean = [(step, (chosen[step] + rejected[step]) / 2) for step in common]
    difference = [(step, chosen[step] - rejected[step]) for step in common]
    spread = run.over_training("scores/std")

    def draw(figure: "Figure", narrow: bool) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _series(top, mean, ORANGE, "mean of all scores")
        legend(top, 1)
        _series(bottom, difference, BLUE, "chosen - rejected")
        if spread:
            _series(bottom, spread, PURPLE, "std of all scores")
        legend(bottom, 2)
        for ax in (top, bottom):
            ax.axhline(0, color=MUTED, linewidth=0.8)
            _epochs(ax, run)
        step_axis(bottom, "optimizer step")

    return Plot(
        "fig20-inflation",
        "Figure 20",
        "Reward inflation",
        "Good: the mean stays where it is while chosen - rejected grows with the std. Inflation: the mean climbs (in the paper "
        "at the end of each epoch) or the std grows, and the difference does not.",
        4.4,
        draw,
    )


def _tsne(run: RewardRun) -> Plot | None:
    """Features of chosen and rejected responses in two dimensions."""
    features = run.features
    if features is None or len(features.vectors) < FEWEST_FEATURED:
        return None
    features = first_pairs(features, MAX_TSNE_PAIRS)
    points, chosen = embed(features.vectors), features.chosen
    same = same_side_neighbours(features)

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for name, side, colour in (("rejected", ~chosen, ORANGE), ("chosen", chosen, BLUE)):
            x, y = points[side].T
            ax.plot(x, y, "o", color=colour, alpha=0.6, markersize=3.4, markeredgewidth=0, label=name)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.grid(visible=False)
        legend(ax, 2)

    return Plot(
        "fig11-features",
        "Figure 11",
        "Features of chosen and rejected",
        f"t-SNE of the features under the head for {len(points) // 2} validation pairs. {same:.0%} of the responses have one of "
        "their own side as nearest neighbour (50% = the two overlap). Good: the colours part; in the paper they do with SimCSE.",
        3.4,
        draw,
    )


def _differences(run: RewardRun) -> Plot | None:
    """Score differences on shifted samples without and with MetaRM: as they are, and in units of each model's own spread."""
    if not run.shifted:
        return None
    rows, back = unseen(run.shifted)
    raw = [pair_differences(rows, score) for score in (lambda row: row.score_vanilla, lambda row: row.score_metarm)]
    if not len(raw[0]):
        return None
    spreads = [
        float(np.std([row.score_vanilla for row in rows])) or 1.0,
        float(np.std([row.score_metarm for row in rows])) or 1.0,
    ]
    where = (
        f"on the prompts that the ascent never saw ({len(raw[0]):,} differences)"
        if back
        else "on all prompts: which ones the ascent never saw was not recorded"
    )
    scaled = [values / unit for values, unit in zip(raw, spreads, strict=True)]

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, 2, narrow)
        for ax, both, title in ((axes[0], raw, "score, scaled to 0-1"), (axes[1], scaled, "in std of its own scores")):
            top = float(np.quantile(np.concatenate(both), 0.998)) or 1.0
            unit = top if both is raw else 1.0
            edges = np.linspace(0, top / unit, 25)
            for name, values, colour in (("before (vanilla)", both[0], GREY), ("after MetaRM", both[1], BLUE)):
                _outline(ax, np.minimum(values / unit, top / unit), edges, colour, name)
            ax.set_title(title)
            ax.set_xlabel("|r_i − r_j|")
            percent(ax)
        common_legend(figure, axes[:1], 2)

    return Plot(
        "fig16-differences",
        "Figure 16",
        "Shifted samples told apart",
        f"Score differences between the responses to one prompt, before and after MetaRM, {where}; dashed: mean. First as in the "
        "paper, then in units of each model's own spread. Good: the mass moves right in both; in the first alone, scores only "
        "grew.",
        3.4,
        draw,
        4.4,
    )


def _meta(run: RewardRun) -> Plot | None:
    """MetaRM's diagnostics by step."""
    points = {name: [(step, 0, value) for step, value in run.over_steps(name)] for name in META_SERIES}
    if not has_meta(points):
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        draw_meta(figure, narrow, points, "optimizer step")

    return Plot("meta", "", META_TITLE, META_CAPTION, META_HEIGHT, draw, META_NARROW_HEIGHT)


def _outline(ax: "Axes", values: FloatArray, edges: FloatArray, colour: str, name: str) -> None:
    weights = np.full(len(values), 1 / len(values))
    ax.hist(values, edges.tolist(), weights=weights, histtype="stepfilled", color=colour, alpha=0.28)
    ax.hist(values, edges.tolist(), weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
    ax.axvline(float(values.mean()), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))


def _series(ax: "Axes", points: list[tuple[int, float]], colour: str, label: str) -> None:
    marker = "o" if len(points) <= 12 else None
    ax.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=3.5, label=label)


def _noisy(ax: "Axes", points: list[tuple[int, float]], colour: str) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    width = max(1, len(points) // 20)
    if width > 1:
        ax.plot(xs, ys, color=colour, alpha=0.28, linewidth=0.9)
    ax.plot(xs, running_mean(ys, width), color=colour)


def _epochs(ax: "Axes", run: RewardRun) -> None:
    for step in run.epoch_ends:
        ax.axvline(step, color=MUTED, linewidth=0.9, linestyle=":")
