"""Figures 16 and 17 of Secrets of RLHF Part II, for one run: score differences scaled to 0 to 1, and the rounds' training
curves over each other.

Letters: R rounds.
"""

from typing import TYPE_CHECKING

import numpy as np

from evaluation.curves import running_mean, spread, step_axis
from evaluation.differences import pair_differences, scaled, unseen
from evaluation.panels import common_legend, panels, percent
from evaluation.run import Run, series
from evaluation.svg import BLUE, GREY, SERIES, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PANELS, MAX_LINES, BINS, FEW = 4, 5, 20, 200
CLOSE = 0.2
"""Scaled differences below this are those that the paper's vanilla reward model crowds into."""
CURVES = (
    ("policy/score", "reward (score)"),
    ("policy/reward", "return (score and KL penalty)"),
    ("policy/kl", "KL from the reference, nats"),
)


def scaled_differences(run: Run) -> Drawing | None:
    """Distribution of the score differences on what the ascent never saw of S_k by round, each reward model's scaled to 0 to 1.

    Source: Secrets of RLHF Part II, Figure 16; ``evaluation.differences``, ``scaled`` and ``unseen``.

    Args:
        run: as read.

    Returns:
        The drawing; None where no reward model was fitted on S_k, or there is no vanilla one to compare it with.

    Padding contract: there is none.
    """
    parts = [unseen(rows) for rows in run.meta_rows]
    back = all(recorded for _, recorded in parts)
    rounds = [
        (round_.index, part if back else rows)
        for round_, rows, (part, _) in zip(run.ledger.rounds, run.meta_rows, parts, strict=True)
    ]
    found = [
        (
            f"round {index}",
            scaled(pair_differences(rows, lambda row: row.score_vanilla)),
            scaled(pair_differences(rows, lambda row: row.score_metarm)),
        )
        for index, rows in spread(rounds, MAX_PANELS)
    ]
    shown = [(title, vanilla, meta) for title, vanilla, meta in found if len(vanilla) and len(meta)]
    if not shown:
        return None
    fewest, most = min(len(meta) for _, _, meta in shown), max(len(meta) for _, _, meta in shown)
    edges = np.linspace(0, 1, 1 + (BINS if fewest >= FEW else BINS // 2))
    told = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    where = (
        f"On the prompts of S_k that the ascent never saw, {told} differences a round"
        if back
        else "On all of S_k: which prompts the ascent never saw was not recorded in every round"
    )

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, len(shown), narrow, sharex=True, sharey=True)
        for ax, (title, vanilla, meta) in zip(axes, shown, strict=True):
            for name, values, colour in (("vanilla", vanilla, GREY), ("MetaRM", meta, BLUE)):
                weights = np.full(len(values), 1 / len(values))
                ax.hist(values, edges.tolist(), weights=weights, histtype="stepfilled", color=colour, alpha=0.28)
                ax.hist(values, edges.tolist(), weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
            close = " → ".join(f"{np.mean(values < CLOSE):.0%}" for values in (vanilla, meta))
            ax.set_title(f"{title}: {close} below {CLOSE:g}")
            percent(ax)
        common_legend(figure, axes, 2)

    lines = -(-len(shown) // 2)
    return drawing(
        "scaled-differences",
        "Score differences on S_k, scaled to 0 to 1",
        "As Figure 16 of Secrets of RLHF II: differences over all pairs of responses to one prompt, divided by the largest of "
        f"the same reward model, so that inflated scores do not count as better ones. {where}. Good: with MetaRM fewer are close "
        "to 0.",
        1.0 + 1.5 * lines,
        draw,
        1.0 + 1.35 * len(shown),
    )


def curves_by_round(run: Run) -> Drawing | None:
    """Reward, return, KL and perplexity by PPO step within a round, a line per round.

    Source: Secrets of RLHF Part II, Figure 17; metrics.jsonl.

    Args:
        run: as read.

    Returns:
        The drawing; None where fewer than two rounds logged PPO steps.

    Padding contract: there is none.
    """
    found = [(title, series(run, "policy", name)) for name, title in CURVES]
    found = [(title, points) for title, points in [*found, ("perplexity under the reference", perplexity(run))] if points]
    rounds = sorted({index for _, points in found for _, index, _ in points})
    if len(rounds) < 2:
        return None
    shown = spread(rounds, MAX_LINES)

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = panels(figure, len(found), narrow, sharex=True)
        for ax, (title, points) in zip(axes, found, strict=True):
            for index, colour in zip(shown, SERIES, strict=False):
                values = [value for _, of, value in points if of == index]
                mean = running_mean(values, max(1, len(values) // 6))
                ax.plot(range(len(mean)), mean, color=colour, linewidth=1.5, label=f"round {index}")
            ax.set_title(title)
        for number, ax in enumerate(axes):
            step_axis(ax, "PPO step of the round" if number >= len(axes) - (1 if narrow else 2) else "")
        common_legend(figure, axes, 3 if narrow else 5)

    return drawing(
        "by-round",
        "Training curves, round over round",
        "As Figure 17 of Secrets of RLHF II, running means. Good: reward rises within each round, KL grows slowly, perplexity "
        "stays level or falls. A reward that still rises while perplexity climbs is no longer to be trusted. Vanilla PPO beside "
        "them: compare two runs.",
        4.0,
        draw,
        1.6 * len(found) + 0.6,
    )


def perplexity(run: Run) -> list[tuple[int, int, float]]:
    """Perplexity of the rollouts under the reference, by PPO step.

    exp(H + K / L), H the mean per token of -log pi, K the KL of a response, L its mean length; this is exp of the mean per token
    of -log ref

    Source: the definition of perplexity; ``policy/entropy``, ``policy/kl`` and ``policy/length`` of metrics.jsonl.

    Args:
        run: as read.

    Returns:
        (x, round, value), as of ``series``; at the sampler's temperature.

    Padding contract: there is none; means are over real tokens.
    """
    entropy, kl, length = (
        {x: value for x, _, value in series(run, "policy", f"policy/{name}")} for name in ("entropy", "kl", "length")
    )
    return [
        (x, index, float(np.exp(entropy[x] + kl[x] / length[x])))
        for x, index, _ in series(run, "policy", "policy/length")
        if x in entropy and x in kl
    ]
