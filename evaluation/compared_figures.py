"""Figures of several runs: one colour per run, the same in all of them.

Letters: R runs.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evaluation.compare import WinTieLose
from evaluation.compared_runs import ComparedRun, duel
from evaluation.curves import MAX_TICKS, even_places, running_mean, spread, step_axis
from evaluation.differences import gain
from evaluation.panels import common_legend, panels
from evaluation.records import EvaluationRow
from evaluation.round_figures import perplexity
from evaluation.run import Run, series
from evaluation.svg import BLUE, CARD, GREY, MUTED, ORANGE, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 24
"""Rounds whose outcomes are drawn, over all runs."""
HEIGHT = 3.2
"""Inches."""
CURVES = (
    ("policy/score", "score (what PPO is paid by)"),
    ("policy/gold", "gold reward"),
    ("policy/kl", "KL from the reference, nats"),
)
OUTCOMES = (("win", BLUE), ("tie", GREY), ("lose", ORANGE))


def compared_figures(runs: Sequence[ComparedRun]) -> tuple[Drawing, ...]:
    """Every figure that the runs have data for, in the page's order.

    Source: MetaRM (Dou et al. 2024) and Secrets of RLHF II (win, tie and lose by round, against vanilla PPO, training curves);
    Gao et al. 2023 (reward against the square root of KL).

    Args:
        runs: R of them.

    Returns:
        The drawings; one without data is left out.

    Padding contract: there is none.
    """
    made = (
        _margins(runs),
        _against_root_kl(runs),
        _outcomes(runs),
        _duels(runs),
        _gains(runs, "gold", "Gold reward by round", [one for one in runs if _gold_known(one.run)], _gold),
        _gains(runs, "proxy", "Proxy reward by round", runs, _proxy),
        _training(runs),
    )
    return tuple(figure for figure in made if figure is not None)


def _margins(runs: Sequence[ComparedRun]) -> Drawing:
    """Win - lose against SFT by round, with its interval. Source: ledger.json."""

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for one, shift in zip(runs, _shifts(len(runs)), strict=True):
            found = [(i, r.evaluation) for i, r in enumerate(one.run.ledger.rounds, 1) if r.evaluation.margin is not None]
            x = np.array([i for i, _ in found]) + shift
            mean = np.array([e.margin for _, e in found], dtype=float)
            low, high = (np.array(v, dtype=float) for v in zip(*((e.margin_low, e.margin_high) for _, e in found), strict=True))
            bars = np.abs(np.array([mean - low, high - mean]))
            ax.errorbar(x, mean, bars, color=one.colour, marker="o", elinewidth=1.0, capsize=2, label=one.label)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.set_ylabel("win − lose against SFT")
        _rounds_axis(ax, runs, first=1)
        common_legend(figure, [ax], 1 if narrow else 2)

    return drawing(
        "margins",
        "Win minus lose by round",
        "Share of held-out prompts won against SFT minus the share lost, with 95% intervals (bootstrap over prompts). Good: it "
        "rises from round to round and stays.",
        HEIGHT,
        draw,
        HEIGHT + 0.2 * len(runs),
    )


def _outcomes(runs: Sequence[ComparedRun]) -> Drawing:
    """Win, tie and lose against SFT, a panel per run and a bar per round. Source: ledger.json."""
    shown = [spread(one.run.ledger.rounds, max(2, MOST_BARS // len(runs))) for one in runs]

    def draw(figure: "Figure", narrow: bool) -> None:
        ratios = [len(rounds) + 1 for rounds in shown]
        axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for ax, one, rounds in zip(axes, runs, shown, strict=True):
            marks = [" ★" if r.index == one.best_round.index else "" for r in rounds]
            labels = [f"round {r.index}{mark}" for r, mark in zip(rounds, marks, strict=True)]
            _stacked(
                ax, labels, [(r.evaluation.win or 0.0, r.evaluation.tie or 0.0, r.evaluation.lose or 0.0) for r in rounds], narrow
            )
            ax.set_title(one.label)
        common_legend(figure, [axes[0]], 3)

    return drawing(
        "outcomes",
        "Win, tie, lose against SFT",
        "Each run against its own SFT policy, one response per held-out prompt. ★: its best round, by its judge's mean.",
        0.6 + sum(0.45 + 0.27 * len(rounds) for rounds in shown),
        draw,
    )


def _duels(runs: Sequence[ComparedRun]) -> Drawing | None:
    """The best round of every other run against the first run's. Source: ``duel``."""
    first, found = runs[0], [(one, duel(one, runs[0])) for one in runs[1:]]
    judged: list[tuple[ComparedRun, WinTieLose]] = [(one, outcome) for one, outcome in found if outcome is not None]
    if not judged:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        labels = [f"{one.label}, round {one.best_round.index}" for one, _ in judged]
        _stacked(ax, labels, [(outcome.win, outcome.tie, outcome.lose) for _, outcome in judged], narrow)
        if narrow:  # names of runs are long: above their bars
            for y, label in enumerate(labels):
                ax.text(0, y - 0.34, label, va="bottom", ha="left")
            ax.set_yticks([])
            ax.set_ylim(len(labels) - 0.6, -0.85)
        common_legend(figure, [ax], 3)

    return drawing(
        "duels",
        f"Against {first.label.strip()}",
        f"The best round of each other run against round {first.best_round.index} of the first run named, on the same prompts, "
        "by the gold reward. Blue: the other run wins.",
        0.85 + 0.36 * len(judged),
        draw,
        0.95 + 0.5 * len(judged),
    )


def _gains(
    runs: Sequence[ComparedRun], what: str, title: str, having: Sequence[ComparedRun], value: Callable[[EvaluationRow], float]
) -> Drawing | None:
    """Gain over SFT by round with its interval. Source: ``gain``."""
    if not having:
        return None
    lines = [(one, [(0.0, 0.0), *_gains_of(one.run, value)]) for one in having]

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for (one, points), shift in zip(lines, _shifts(len(lines)), strict=True):
            means, halves = zip(*points, strict=True)
            x = np.arange(len(points)) + shift
            ax.errorbar(x, means, halves, color=one.colour, marker="o", elinewidth=1.0, capsize=2, label=one.label)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.set_ylabel("gain over SFT (SFT std)")
        _rounds_axis(ax, having, first=0)
        common_legend(figure, [ax], 1 if narrow else 2)

    absent = [one.label.strip() for one in runs if one not in having]
    return drawing(
        f"{what}-gain",
        title,
        f"Mean gain of the {what} reward over SFT on the same prompts, in standard deviations of SFT's responses, with 95% "
        "intervals." + (f" Not known for {', '.join(absent)}." if absent else ""),
        HEIGHT,
        draw,
        HEIGHT + 0.2 * len(having),
    )


def _against_root_kl(runs: Sequence[ComparedRun]) -> Drawing:
    """Proxy and gold gain against sqrt(KL) at the end of every round. Source: Gao et al. 2023, the axis."""

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, 2, narrow, sharex=True, sharey=True)
        for ax, name, value in ((axes[0], "proxy", _proxy), (axes[1], "gold", _gold)):
            for one in runs if name == "proxy" else [one for one in runs if _gold_known(one.run)]:
                kl = [0.0, *(max(0.0, r.evaluation.kl) for r in one.run.ledger.rounds)]
                gains = [0.0, *(mean for mean, _ in _gains_of(one.run, value))]
                ax.plot(np.sqrt(kl), gains, "-o", color=one.colour, label=one.label, linewidth=1.4)
                best = one.best + 1
                ax.plot(np.sqrt(kl[best]), gains[best], "*", color=one.colour, markersize=10, markeredgecolor=CARD, zorder=4)
            ax.axhline(0, color=MUTED, linewidth=0.8)
            ax.set_title(f"{name} reward")
            ax.set_xlabel("√KL from SFT")
        axes[0].set_ylabel("gain over SFT (SFT std)")
        common_legend(figure, axes, 1 if narrow else 2)

    return drawing(
        "root-kl",
        "Reward against distance from SFT",
        "A dot per round, from SFT at the left; ★: the best round. Good: a run's two curves rise together, and steeply. Proxy "
        "that goes on rising where gold turns down is over-optimisation.",
        HEIGHT,
        draw,
        5.0 + 0.2 * len(runs),
    )


def _training(runs: Sequence[ComparedRun]) -> Drawing | None:
    """Running means over the PPO steps of all rounds. Source: metrics.jsonl."""
    named = [(title, [(one, series(one.run, "policy", name)) for one in runs]) for name, title in CURVES]
    named.append(("perplexity under the reference", [(one, perplexity(one.run)) for one in runs]))
    shown = [(title, lines) for title, lines in named if any(points for _, points in lines)]
    if not shown:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (title, lines) in zip(axes, shown, strict=True):
            for one, points in lines:
                values = running_mean([value for *_, value in points], max(1, len(points) // 12))
                ax.plot([x for x, *_ in points], values, color=one.colour, label=one.label, linewidth=1.4)
            ax.set_title(title)
        step_axis(axes[-1], "PPO step, all rounds")
        common_legend(figure, list(axes), 1 if narrow else 2)

    return drawing(
        "training",
        "Training curves",
        "Running means over the rollout batches. Scores have each round's own reward model for a judge, so compare their course, "
        "and the gold reward's height.",
        5.2,
        draw,
        5.2 + 0.2 * len(runs),
    )


def _stacked(ax: "Axes", labels: Sequence[str], shares: Sequence[tuple[float, float, float]], narrow: bool) -> None:
    left, places = np.zeros(len(labels)), np.arange(len(labels))
    for number, (name, colour) in enumerate(OUTCOMES):
        part = np.array([share[number] for share in shares])
        ax.barh(places, part, left=left, color=colour, height=0.62, label=name)
        for y, (share, start) in enumerate(zip(part, left, strict=True)):
            if share >= (0.13 if narrow else 0.08):  # where the number has room
                ax.text(start + share / 2, y, f"{share:.0%}", ha="center", va="center", color=CARD, fontweight="bold")
        left = left + part
    ax.set_yticks(places, list(labels))
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _rounds_axis(ax: "Axes", runs: Sequence[ComparedRun], first: int) -> None:
    """Ticks of SFT (0) and the rounds, which count from 0."""
    most = max(len(one.run.ledger.rounds) for one in runs)
    shown = even_places(first, most, MAX_TICKS)
    ax.set_xticks(shown, ["SFT" if x == 0 else str(x - 1) for x in shown])
    ax.set_xlabel("round")
    ax.set_xlim(first - 0.3, most + 0.3)
    ax.grid(axis="x", visible=False)


def _shifts(num: int) -> list[float]:
    """Runs stand beside each other at a round, so that their intervals do not cover each other."""
    return [0.05 * (i - (num - 1) / 2) for i in range(num)]


def _gains_of(run: Run, value: Callable[[EvaluationRow], float]) -> list[tuple[float, float]]:
    return [gain(rows, run.start_rows, value) for rows in run.round_rows]


def _gold_known(run: Run) -> bool:
    return all(row.gold is not None for rows in (run.start_rows, *run.round_rows) for row in rows)


def _gold(row: EvaluationRow) -> float:
    assert row.gold is not None  # only asked where it is known
    return row.gold


def _proxy(row: EvaluationRow) -> float:
    return row.proxy
