"""The report's figures: what each shows, and what a good one looks like.

Letters: R rounds, N prompts, k samples per prompt.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from evaluation.baseline_figure import dpo_figure
from evaluation.curves import curve, legend, round_ticks, spread, step_and_round, step_axis
from evaluation.differences import gain, pair_differences
from evaluation.meta_figure import META_CAPTION, META_HEIGHT, META_NARROW_HEIGHT, META_SERIES, META_TITLE, draw_meta, has_meta
from evaluation.monitor_figures import overoptimisation_figure, signs_figure
from evaluation.people_figure import people_figure
from evaluation.records import EvaluationRow
from evaluation.round_figures import curves_by_round, scaled_differences
from evaluation.run import Run, series
from evaluation.summary import judge_in_words
from evaluation.svg import BLUE, BROWN, CARD, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, RED, SERIES, SKY, YELLOW, Drawing, drawing
from evaluation.timeline_figure import timeline_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PANELS = 4
TALL, TALLER = 3.2, 4.0
"""Inches. Two figures that stand side by side have one height."""


def all_figures(run: Run) -> tuple[Drawing, ...]:
    """Every figure that the run has data for, in the page's order.

    Source: MetaRM (Dou et al. 2024), figures of reward-difference distributions; Secrets of RLHF I (KL, perplexity, reward).

    Args:
        run: the run, as read.

    Returns:
        The drawings; one whose data is absent (no MetaRM, a policy that logged no step) is left out.

    Padding contract: there is none.
    """
    made = (
        _reward_by_round(run),
        _reward_by_step(run),
        dpo_figure(run),
        _outcomes(run),
        people_figure(run),
        _time_by_phase(run),
        _kl(run),
        _perplexity(run),
        curves_by_round(run),
        overoptimisation_figure(run),
        signs_figure(run),
        _reward_differences(run),
        scaled_differences(run),
        _meta_step(run),
        _meta_heldout(run),
        timeline_figure(run.timeline),
    )
    return tuple(figure for figure in made if figure is not None)


def _reward_by_round(run: Run) -> Drawing:
    """Gain over SFT of proxy, ensemble and gold, one point per round. Source: ``gain``."""
    kinds: list[tuple[str, str, Callable[[EvaluationRow], float]]] = [
        ("proxy", BLUE, lambda row: row.proxy),
    ]
    if any(len(row.member_scores) > 1 for row in run.round_rows[-1]):  # the mean of one member is the proxy
        kinds.append(("ensemble", SKY, lambda row: row.ensemble_mean))
    if all(row.held_out is not None for rows in (run.start_rows, *run.round_rows) for row in rows):
        kinds.append(("held-out", GREEN, lambda row: row.held_out if row.held_out is not None else 0.0))
    if all(row.gold is not None for rows in (run.start_rows, *run.round_rows) for row in rows):
        kinds.append(("gold", ORANGE, lambda row: row.gold if row.gold is not None else 0.0))

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for shift, (name, colour, value) in enumerate(kinds):
            points = [(0.0, 0.0), *(gain(rows, run.start_rows, value) for rows in run.round_rows)]
            means, halves = [p[0] for p in points], [p[1] for p in points]
            x = np.arange(len(points)) + 0.04 * (shift - 1)
            ax.errorbar(x, means, halves, color=colour, marker="o", elinewidth=1.0, capsize=2, label=name)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        round_ticks(ax, run)
        ax.set_ylabel("gain over SFT (SFT std)")
        legend(ax, 3)

    return drawing(
        "reward-round",
        "Reward by round",
        "Mean gain over SFT on the same held-out prompts, in standard deviations of SFT's responses, with 95% intervals. "
        "Good: all curves rise together. Proxy up while gold falls is over-optimisation.",
        TALL,
        draw,
    )


def _reward_by_step(run: Run) -> Drawing | None:
    """Score of the rollouts by PPO step, and their gold reward where there is one. Source: metrics.jsonl."""
    score, gold = series(run, "policy", "policy/score"), series(run, "policy", "policy/gold")
    if not score:
        return None
    jump = "" if run.baseline else "A jump of the score there is the new reward model, not the policy. "

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots(2 if gold else 1, 1, sharex=True, squeeze=False)[:, 0]
        curve(axes[0], score, BLUE, None)
        axes[0].set_title("score (what PPO is paid by)")
        if gold:
            curve(axes[1], gold, ORANGE, None)
            axes[1].set_title("gold reward")
        step_axis(axes[-1], "PPO step, all rounds")

    return drawing(
        "reward-step",
        "Reward by step",
        "Means over each rollout batch (pale, where a round has many) and their running mean. Dotted lines part the rounds. "
        f"{jump}Good: both rise, then flatten.",
        TALL,
        draw,
    )


def _outcomes(run: Run) -> Drawing:
    """Win, tie and lose against SFT per round, stacked. Source: ledger.json."""
    rounds = spread(run.ledger.rounds, 12)
    judge = run.ledger.rounds[-1].evaluation.judge

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        left = np.zeros(len(rounds))
        labels = [f"round {r.index}" for r in rounds]
        for name, colour, shares in (
            ("win", BLUE, [r.evaluation.win or 0.0 for r in rounds]),
            ("tie", GREY, [r.evaluation.tie or 0.0 for r in rounds]),
            ("lose", ORANGE, [r.evaluation.lose or 0.0 for r in rounds]),
        ):
            ax.barh(labels, shares, left=left, color=colour, height=0.62, label=name)
            for y, (share, start) in enumerate(zip(shares, left, strict=True)):
                if share >= 0.08:
                    ax.text(start + share / 2, y, f"{share:.0%}", ha="center", va="center", color=CARD, fontweight="bold")
            left = left + shares
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        legend(ax, 3)

    return drawing(
        "outcomes",
        "Win, tie, lose against SFT",
        f"One response per held-out prompt from each, judged by {judge_in_words(judge)}. Good: blue grows from round to round.",
        _bars(1 + len(rounds)),
        draw,
    )


def _kl(run: Run) -> Drawing:
    """KL from the reference by PPO step, and from SFT at each evaluation. Source: metrics.jsonl and ledger.json."""
    return step_and_round(
        run,
        "kl",
        "Distance from SFT (KL)",
        "Nats per response. Curve: rollouts in training; dots: evaluation at the end of each round. Good: it grows slowly and "
        "levels off; a sudden climb means that the policy has left the texts that the reward model knows.",
        "nats per response",
        series(run, "policy", "policy/kl"),
        [run.ledger.start.kl, *(r.evaluation.kl for r in run.ledger.rounds)],
        PURPLE,
    )


def _perplexity(run: Run) -> Drawing:
    """Perplexity of the responses under the SFT model per round. Source: ledger.json."""
    return step_and_round(
        run,
        "perplexity",
        "Perplexity under SFT",
        "How surprising the responses are to the SFT model. Good: it stays near its start. Far above: the text is "
        "breaking up; far below: the policy repeats a few safe phrases.",
        "perplexity",
        [],
        [run.ledger.start.perplexity, *(r.evaluation.perplexity for r in run.ledger.rounds)],
        GREEN,
    )


def _reward_differences(run: Run) -> Drawing | None:
    """Distribution of |r_i - r_j| on S_k, without and with MetaRM, per round. Source: ``pair_differences``."""
    panels = [
        (
            f"round {r.index}",
            pair_differences(rows, lambda row: row.score_vanilla),
            pair_differences(rows, lambda row: row.score_metarm),
        )
        for r, rows in spread(tuple(zip(run.ledger.rounds, run.meta_rows, strict=True)), MAX_PANELS)
    ]
    panels = [panel for panel in panels if len(panel[2])]
    if not panels:
        return None
    top = max(float(np.quantile(values, 0.995)) for _, *both in panels for values in both if len(values)) or 1.0
    edges = np.linspace(0, top, 25)

    def draw(figure: "Figure", narrow: bool) -> None:
        columns = 2 if len(panels) == 4 and not narrow else 1
        lines = -(-len(panels) // columns)
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, (title, vanilla, meta) in zip(axes, panels, strict=False):
            for name, values, colour in (("before (vanilla)", vanilla, GREY), ("after MetaRM", meta, BLUE)):
                if len(values):
                    weights = np.full(len(values), 1 / len(values))
                    clipped = np.minimum(values, top)
                    ax.hist(clipped, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.28)
                    ax.hist(clipped, edges, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
                    ax.axvline(float(np.mean(values)), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
            ax.set_title(title)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        for ax in axes[len(panels) :]:
            ax.axis("off")
        axes[(lines - 1) * columns].set_xlabel("|r_i − r_j| (SFT std)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)

    return drawing(
        "differences",
        "Does the reward model still tell S_k apart?",
        "Score differences over all pairs of the k responses of a prompt; dashed: mean. Good: with MetaRM the mass moves to "
        "the right, away from zero, where responses look equal to the model.",
        TALLER,
        draw,
    )


def _meta_step(run: Run) -> Drawing | None:
    """J at theta and at theta' by reward step, and how much the ascent raised it. Source: metrics.jsonl; J is MetaRM's."""
    before = series(run, "reward", "reward/J")
    after = series(run, "reward", "reward/J_ascended")
    if not before or not after:
        return None
    at_theta = {x: value for x, _, value in before}
    rise = [(x, r, value - at_theta[x]) for x, r, value in after if x in at_theta]

    def draw(figure: "Figure", narrow: bool) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        curve(top, before, GREY, "J at θ")
        curve(top, after, BLUE, "J at θ′")
        legend(top, 2)
        curve(bottom, rise, GREEN, None)
        bottom.axhline(0, color=MUTED, linewidth=0.8)
        bottom.set_title("J(θ′) − J(θ)")
        step_axis(bottom, "reward step, all rounds")

    return drawing(
        "meta",
        "The meta step at work",
        "J measures how far the model's scores of one prompt's responses lie apart. Good: the difference below is above zero "
        "at nearly every step. At zero the ascent step (meta.eta) is too small to do anything.",
        TALLER,
        draw,
    )


def _meta_heldout(run: Run) -> Drawing | None:
    """J and spread on prompts of S_k that no ascent saw, and how far and where the ascent goes. Source: metrics.jsonl."""
    points = {name: series(run, "reward", name) for name in META_SERIES}
    if not has_meta(points):
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        draw_meta(figure, narrow, points, "reward step, all rounds")

    return drawing("meta-heldout", META_TITLE, META_CAPTION, META_HEIGHT, draw, META_NARROW_HEIGHT)


def _time_by_phase(run: Run) -> Drawing:
    """Seconds per phase and round, stacked. Source: ledger.json."""
    bars = [
        ("start", run.ledger.start_seconds),
        *((f"round {r.index}", r.seconds) for r in spread(run.ledger.rounds, 12)),
    ]
    totals: Counter[str] = Counter()
    for _, seconds in bars:
        totals.update(seconds)
    named = [phase for phase, _ in totals.most_common(len(SERIES) - 1)]
    colours = dict(zip(named, (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED, BROWN), strict=False))

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        labels = [label for label, _ in bars]
        left = np.zeros(len(bars))
        for phase, colour in [*colours.items(), ("other", GREY)]:
            names = {phase} if phase != "other" else totals.keys() - colours.keys()
            values = np.array([sum(v for p, v in seconds.items() if p in names) for _, seconds in bars])
            if values.any():
                ax.barh(labels, values, left=left, color=colour, height=0.62, label=phase)
                left += values
        for y, total in enumerate(left):
            ax.annotate(
                f"{total:.0f} s" if total >= 10 else f"{total:.1f} s",
                (total, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        ax.set_xlim(0, float(left.max()) * (1.18 if narrow else 1.1) or 1.0)
        ax.set_xlabel("seconds")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        handles, shown = ax.get_legend_handles_labels()
        figure.legend(handles, shown, loc="outside upper left", ncols=3 if narrow else 5)

    return drawing(
        "time",
        "Where the time goes",
        "Wall-clock seconds of each phase, largest first. Start: what is done once per run.",
        _bars(len(bars)),
        draw,
    )


def _bars(num: int) -> float:
    """Height of a figure of so many horizontal bars, inches."""
    return max(2.1, 1.25 + 0.34 * num)
