"""report.html of reward features: each rater's accuracy, and new raters' against their answers. Reads the directory alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.feature_run import FeatureRow, FeatureRun, after_answers, read_feature_run
from evaluation.groups import over_seeds
from evaluation.json_node import json_file, read_text
from evaluation.page import Tiles, render_page, write_page
from evaluation.panels import chance, common_legend, draw_estimate, percent
from evaluation.preference_report import draw_figures
from evaluation.summary import Headline
from evaluation.svg import BLUE, GREEN, MUTED, ORANGE, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_feature_report(directory: Path) -> Path:
    """Write report.html and figures/*.png of reward features, each whole or not at all.

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338).

    Args:
        directory: STORAGE/features/NAME.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    run = read_feature_run(directory)
    plots = (*([_trained(run.trained)] if run.trained else []), *([_new(run)] if run.new else []))
    page = render_page(
        "features.html.j2",
        name=directory.resolve().name,
        headline=_headline(run),
        tiles=_tiles(run),
        figures=draw_figures(directory, plots),
        lines=sorted(run.trained, key=lambda row: row.accuracy),
        config=read_text(directory / "config.yaml"),
        versions=json_file(directory / "versions.json").strings(),
    )
    return write_page(directory / "report.html", page)


def _headline(run: FeatureRun) -> Headline:
    if not run.trained:
        return Headline("warn", "Not measured", "No rater has a pair of a held-out prompt.", "Hold out some: see docs/people.md.")
    gains = over_seeds([row.accuracy - row.mean_accuracy for row in run.trained])
    own = fmean(row.accuracy for row in run.trained)
    text = (
        f"Each rater's own weights rank {own:.1%} of their held-out pairs as they did, the mean rater's {own - gains.value:.1%}."
    )
    detail = (
        f"{gains.value:+.1%} [{gains.low:+.1%}, {gains.high:+.1%}], a 95% interval over {len(run.trained)} raters; "
        f"{sum(row.accuracy < row.mean_accuracy for row in run.trained)} of them are served better by the mean rater's weights."
    )
    if run.card.shared:
        return Headline("warn", "One reward for all", f"It ranks {own:.1%} of held-out pairs as their raters did.", "")
    better = gains.low > 0
    return Headline("good" if better else "warn", "People differ" if better else "No clear gain", text, detail)


def _tiles(run: FeatureRun) -> Tiles:
    card = run.card
    tiles = [
        ("features d", str(card.d), "one reward for all" if card.shared else "and as many weights for each person"),
        ("raters", f"{card.num_raters:,}", "trained on"),
        ("labels", f"{card.num_labels:,}", f"{card.num_labels / card.num_raters:.0f} a rater"),
        ("loss", f"{card.loss:.3f}", "nats per label, last quarter"),
        ("model", card.fingerprint[:12], "fingerprint: answers and profiles belong to it"),
    ]
    if run.trained:
        worst = min(run.trained, key=lambda row: row.accuracy)
        tiles.append(("least served", f"{worst.accuracy:.1%}", worst.rater))
    return tiles


def _trained(rows: Sequence[FeatureRow]) -> Plot:
    ranked = sorted(rows, key=lambda row: row.accuracy)

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        places = range(len(ranked))
        ax.vlines(places, [r.mean_accuracy for r in ranked], [r.accuracy for r in ranked], color=MUTED, linewidth=0.7, alpha=0.6)
        ax.plot(places, [r.mean_accuracy for r in ranked], "x", color=ORANGE, label="the mean rater's weights")
        ax.plot(places, [r.accuracy for r in ranked], "o", color=BLUE, label="their own weights")
        _finish(ax, "raters, the least served first")
        ax.set_xticks([])
        common_legend(figure, [ax], 1 if narrow else 2)

    return Plot(
        "raters",
        "",
        "Each rater",
        "Accuracy on held-out pairs of the raters that were trained on. Dashed: chance. Good: dots above crosses, and the left "
        "end not far below the right.",
        3.2,
        draw,
        3.8,
    )


def _new(run: FeatureRun) -> Plot:
    found = after_answers(run)

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        for number, (count, estimate) in enumerate(found.items()):
            draw_estimate(ax, count, estimate, GREEN, "raters who were held out" if number == 0 else None)
        ax.plot(list(found), [estimate.value for estimate in found.values()], color=GREEN, linewidth=1)
        _finish(ax, "answers (raters who gave as many)")
        there = [len([row for row in run.new if row.num_labels == count]) for count in found]
        ax.set_xticks(list(found), [f"{count}\n({number})" for count, number in zip(found, there, strict=True)])
        common_legend(figure, [ax], 1)

    return Plot(
        "new-raters",
        "",
        "New raters",
        f"Accuracy on held-out pairs of {len({row.rater for row in run.new})} raters that were not trained on, after so many "
        "answers; bars are 95% intervals over the raters. Good: rising from the left, above chance at 0.",
        3.2,
        draw,
        3.8,
    )


def _finish(ax: "Axes", label: str) -> None:
    ax.set_xlabel(label)
    chance(ax, "")
    ax.margins(y=0.12)
    percent(ax)
