"""The figures of a customisation: accuracy over training, general against domain accuracy, and each domain by itself."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from evaluation.curves import step_axis
from evaluation.domains import DOMAIN_STAGE, GENERAL_STAGE, DomainRow, DomainRun, Outcome
from evaluation.groups import how_many_seeds, over_seeds
from evaluation.panels import Y_MARGIN, chance, common_legend, draw_curves, panels, percent
from evaluation.studies import Curve
from evaluation.svg import GREY, MUTED, SERIES, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 10
"""Parts of a stage at which curves are drawn."""
STYLES = [(colour, opacity) for opacity in (1.0, 0.5) for colour in SERIES]
"""Colour and opacity of the strategies in order; more than these take the first again."""


def domain_plots(run: DomainRun, found: Sequence[Outcome]) -> tuple[Plot, ...]:
    """Every figure that the run has data for.

    Source: Everyone Deserves A Reward (2309.03126), its figures of accuracy against training samples.

    Args:
        run: as read.
        found: its outcomes.

    Returns:
        The plots.

    Padding contract: there is none.
    """
    plots = []
    if any(row.stage == GENERAL_STAGE for row in run.rows):
        plots.append(_general_stage(run))
    if found:
        plots.append(_domain_stage(run))
        if any(outcome.general is not None for outcome in found):
            plots.append(_front(run, found))
        plots.append(_each_domain(run, found))
    return tuple(plots)


def over_samples(rows: Sequence[DomainRow], names: Sequence[str], own: bool) -> tuple[Curve, ...]:
    """Mean accuracy against queries seen, a curve for each strategy.

    A stage's measurements are put on a grid of ``GRID`` equal parts of its queries by straight lines between them, since domains
    differ in size; then comes the mean over sets and domains within a seed, and over the seeds. An axis of queries is the mean
    over the stages.

    Source: ``over_seeds`` at each place.

    Args:
        rows: of one kind of stage.
        names: of the sets that count.
        own: True counts only the set of the stage's own domain.

    Returns:
        A curve per strategy.

    Padding contract: there is none.
    """
    curves: list[Curve] = []
    for strategy in dict.fromkeys(row.strategy for row in rows):
        stages: dict[tuple[int, str], list[DomainRow]] = {}
        for row in rows:
            if row.strategy == strategy and row.set in names and (not own or row.set == row.domain):
                stages.setdefault((row.seed, f"{row.domain} {row.set}"), []).append(row)
        if not stages:
            continue
        fractions = np.linspace(0, 1, GRID + 1)
        by_seed: dict[int, list[np.ndarray]] = {}
        for (seed, _), of in stages.items():
            seen = [row.samples for row in of]
            by_seed.setdefault(seed, []).append(np.interp(fractions * max(seen), seen, [row.accuracy for row in of]))
        means = np.stack([np.mean(of, axis=0) for of in by_seed.values()])  # [S, GRID + 1]
        queries = fmean(max(row.samples for row in of) for of in stages.values())
        steps = tuple(round(fraction * queries) for fraction in fractions)
        points = tuple(over_seeds(column.tolist()) for column in means.T)
        curves.append(Curve(strategy, strategy, 0, len(by_seed), steps, points))
    return tuple(curves)


def _general_stage(run: DomainRun) -> Plot:
    rows = [row for row in run.rows if row.stage == GENERAL_STAGE]

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, len(run.general), narrow, sharex=True)
        for ax, name in zip(axes, run.general, strict=True):
            lines = _different(over_samples(rows, [name], own=False))
            draw_curves(ax, lines, _styles(len(lines)))
            _finish(ax, name, run.length_alone[name], "general queries seen")
        common_legend(figure, axes, 2 if narrow else 4)

    return Plot(
        "general-stage",
        "",
        "The general stage",
        f"Accuracy on each general set as the general model is fitted. {how_many_seeds(run.rows)}. Dotted: what "
        "length alone reaches. Good: well above it, and still rising slowly at the end.",
        2.4 + 1.6 * ((len(run.general) - 1) // 2),
        draw,
        1.4 + 1.8 * len(run.general),
    )


def _different(lines: Sequence[Curve]) -> list[Curve]:
    """Without the strategies that share an earlier one's general stage."""
    found: dict[tuple[object, ...], Curve] = {}
    for line in lines:
        found.setdefault((line.steps, line.points), line)
    return list(found.values())


def _domain_stage(run: DomainRun) -> Plot:
    rows = [row for row in run.rows if row.stage == DOMAIN_STAGE]

    def draw(figure: "Figure", narrow: bool) -> None:
        both = panels(figure, 2 if run.general else 1, narrow, sharex=True)
        lines = over_samples(rows, run.domains, own=True)
        draw_curves(both[0], lines, _styles(len(lines)))
        _finish(both[0], "own domain", fmean(run.length_alone[name] for name in run.domains), "queries seen (mean over domains)")
        if run.general:
            lines = over_samples(rows, run.general, own=False)
            draw_curves(both[1], lines, _styles(len(lines)))
            _finish(
                both[1],
                "general sets",
                fmean(run.length_alone[name] for name in run.general),
                "queries seen (mean over domains)",
            )
        common_legend(figure, both, 2 if narrow else 4)

    return Plot(
        "domain-stage",
        "",
        "The domain stage",
        f"Accuracy on the model's own domain and on the general sets as it is customised, means over domains. "
        f"{how_many_seeds(run.rows)}. Dotted: what length alone reaches. Good: the left curve rises, the right one stays where "
        "it began.",
        3.0,
        draw,
        5.0,
    )


def _front(run: DomainRun, found: Sequence[Outcome]) -> Plot:
    general, own = (fmean(run.length_alone[name] for name in names) for names in (run.general, run.domains))

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        front: list[tuple[float, float]] = []
        for outcome, (colour, opacity) in zip(found, _styles(len(found)), strict=True):
            if outcome.general is None:
                continue
            x, y = outcome.general, outcome.domain
            ax.plot([x.value], [y.value], "o" if outcome.best else "x", color=colour, alpha=opacity, label=outcome.strategy)
            ax.plot([x.low, x.high], [y.value] * 2, color=colour, alpha=0.5 * opacity, linewidth=1)
            ax.plot([x.value] * 2, [y.low, y.high], color=colour, alpha=0.5 * opacity, linewidth=1)
            if outcome.best:
                front.append((x.value, y.value))
        front.sort()
        ax.axvline(general, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
        ax.axhline(own, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
        ax.plot([x for x, _ in front], [y for _, y in front], color=GREY, linewidth=1, zorder=0)
        ax.set_xlabel("accuracy on the general sets")
        ax.set_ylabel("accuracy on the own domain")
        ax.margins(0.12)
        _percents(ax)
        digits = _digits(ax.get_xticks())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")
        common_legend(figure, [ax], 2 if narrow else 3)

    return Plot(
        "pareto",
        "",
        "General against domain accuracy",
        "Where each strategy ends, means over domains; bars are 95% intervals over the seeds, from three seeds on. Dots joined "
        "by the line are the Pareto front: no strategy is better in both. Good: up and to the right. Dotted: what length "
        f"alone reaches, {general:.1%} on the general sets and {own:.1%} on the domains.",
        3.8,
        draw,
        4.2,
    )


def _each_domain(run: DomainRun, found: Sequence[Outcome]) -> Plot:
    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        for place, domain in enumerate(run.domains):
            for number, (outcome, (colour, opacity)) in enumerate(zip(found, _styles(len(found)), strict=True)):
                value = outcome.per_domain[domain]
                shift = (number - (len(found) - 1) / 2) * 0.7 / max(1, len(found))
                label = outcome.strategy if place == 0 else None
                ax.plot([place + shift], [value], "o", color=colour, alpha=opacity, label=label)
            alone = run.length_alone[domain]
            ax.plot([place - 0.4, place + 0.4], [alone, alone], color=MUTED, linewidth=1, linestyle=":")
        ax.set_xticks(range(len(run.domains)), run.domains, rotation=30 if narrow or len(run.domains) > 5 else 0)
        ax.grid(axis="x", visible=False)
        ax.margins(y=Y_MARGIN)
        chance(ax, "")
        percent(ax)
        common_legend(figure, [ax], 2 if narrow else 4)

    return Plot(
        "each-domain",
        "",
        "Each domain",
        f"Accuracy of each domain's model on its own held-out queries, at the end. {how_many_seeds(run.rows)}. Dotted: what "
        "length alone reaches there.",
        3.4,
        draw,
        4.2,
    )


def _styles(number: int) -> list[tuple[str, float]]:
    return [STYLES[i % len(STYLES)] for i in range(number)]


def _finish(ax: "Axes", title: str, alone: float, label: str) -> None:
    ax.axhline(alone, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
    ax.set_title(title)
    step_axis(ax, label)
    _percents(ax)


def _percents(ax: "Axes") -> None:
    """Per cent, with a digit more where the ticks are not whole ones."""
    percent(ax)
    digits = _digits(ax.get_yticks())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")


def _digits(ticks: Sequence[float] | np.ndarray) -> int:
    return 0 if np.allclose(100 * np.asarray(ticks), np.round(100 * np.asarray(ticks)), atol=1e-6) else 1
