"""Figures of over-optimisation: rewards by the distance from SFT with the curve of Gao et al., and the signs of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluation.panels import panels
from evaluation.records import EvaluationRow
from evaluation.run import Run
from evaluation.scaling import FEWEST_POINTS, Overoptimisation, fit_overoptimisation
from evaluation.svg import BLUE, CARD, GREEN, MUTED, ORANGE, PURPLE, RED, SKY, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 5.2
"""Inches; the two stand side by side."""
NUM_CURVE = 60
"""Places at which a fitted curve is drawn."""
SIGNS: tuple[tuple[str, str, str, str], ...] = (
    ("ensemble_std", "policy/ensemble_std", "members' disagreement", SKY),
    ("reward_accuracy", "monitor/reward_accuracy", "reward model right on fresh pairs", BLUE),
    ("length_correlation", "monitor/length_correlation", "correlation of length and reward", ORANGE),
    ("repetition_correlation", "monitor/repetition_correlation", "correlation of repetition and reward", PURPLE),
    ("repetition", "monitor/repetition", "repeated trigrams", RED),
    ("truncated", "monitor/truncated", "cut responses", RED),
    ("self_bleu", "monitor/self_bleu", "self-BLEU", GREEN),
    ("length", "policy/length", "tokens", ORANGE),
)
"""Key of an evaluation, series of the steps, title of its panel, colour."""

Places = list[tuple[float, float]]
"""(KL in nats, value)."""


@dataclass(frozen=True)
class Against:
    """One reward by the distance from SFT.

    Args:
        name: in the legend.
        colour: of ``evaluation.svg``.
        steps: of batches of rollouts.
        rounds: of the rounds' evaluations, without SFT's at (0, 0).
    """

    name: str
    colour: str
    steps: Places
    rounds: Places

    @property
    def far(self) -> float:
        """The largest distance from SFT, root of nats."""
        return max((math.sqrt(kl) for kl, _ in (*self.steps, *self.rounds) if kl > 0), default=0.0)

    @property
    def fitted(self) -> Overoptimisation | None:
        """Gao's curve, on both."""
        points = [*self.steps, *self.rounds]
        return fit_overoptimisation([kl for kl, _ in points], [gain for _, gain in points])


def distances(run: Run) -> tuple[Against, ...]:
    """The rewards of a run over SFT's, in standard deviations of SFT's responses, by KL from SFT.

    Source: ledger.json, metrics.jsonl and start/evaluation.parquet.

    Args:
        run: as read.

    Returns:
        Proxy, and held-out members and gold where there are such; steps only where the reference of their KL is SFT.

    Padding contract: there is none.
    """
    kinds: list[tuple[str, str, str, str, Callable[[EvaluationRow], float | None]]] = [
        ("proxy", "proxy", "policy/proxy", BLUE, lambda row: row.proxy),
        ("held-out", "held_out", "monitor/held_out", GREEN, lambda row: row.held_out),
        ("gold", "gold", "policy/gold", ORANGE, lambda row: row.gold),
    ]
    kls = _from_sft(run)
    found = []
    for name, key, series_name, colour, of in kinds:
        sft = [value for row in run.start_rows if (value := of(row)) is not None]
        evaluations = [(r.evaluation.kl, _value(r.evaluation.numbers, key)) for r in run.ledger.rounds]
        rounds = [(kl, value) for kl, value in evaluations if value is not None]
        if not sft or not rounds:
            continue
        zero, unit = float(np.mean(sft)), float(np.std(sft)) or 1.0
        steps = _steps(run, kls, series_name)
        found.append(Against(name, colour, *([(kl, (v - zero) / unit) for kl, v in points] for points in (steps, rounds))))
    return tuple(found)


def _from_sft(run: Run) -> dict[tuple[int, int], float]:
    """KL from SFT of the batch of each (round, step), nats; none where the reference of the steps' KL is another."""
    choices = run.ledger.rounds[-1].choices
    if "policy.reference" in choices and choices["policy.reference"] != "sft":
        return {}
    return {(row.round, row.step): row.values["policy/kl"] for row in run.metrics if "policy/kl" in row.values}


def _steps(run: Run, kls: Mapping[tuple[int, int], float], series_name: str) -> Places:
    """A series of the steps, at those that a KL is known of."""
    return [
        (kls[row.round, row.step], row.values[series_name])
        for row in run.metrics
        if series_name in row.values and (row.round, row.step) in kls
    ]


def _value(numbers: Mapping[str, float], key: str) -> float | None:
    return numbers[key] if key in numbers else None


def overoptimisation_figure(run: Run) -> Drawing | None:
    """Rewards by the square root of KL, each with Gao's curve.

    Source: ``distances`` and ``fit_overoptimisation``.

    Args:
        run: as read.

    Returns:
        The drawing; None with fewer than three points off SFT.

    Padding contract: there is none.
    """
    lines = distances(run)
    if not any(len([kl for kl, _ in (*line.steps, *line.rounds) if kl > 0]) >= FEWEST_POINTS for line in lines):
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for line in lines:
            _dots(ax, line.steps, line.colour, small=True)
            _dots(ax, line.rounds, line.colour, small=False, label=line.name)
            curve = line.fitted
            if curve is not None:
                xs = np.linspace(0, line.far, NUM_CURVE)
                ax.plot(xs, [curve.at(float(x)) for x in xs], color=line.colour, linewidth=1.4)
                if curve.peak is not None and curve.peak < line.far:
                    ax.axvline(curve.peak, color=line.colour, linewidth=0.9, linestyle=":")
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.set_xlabel("√KL from SFT (nats per response)")
        ax.set_ylabel("gain over SFT (SFT std)")
        ax.set_xlim(left=0)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)

    words = [f"{line.name} α {fit.alpha:z.2f}, β {fit.beta:z.2f}, {_top(line, fit)}" for line in lines if (fit := line.fitted)]
    return drawing(
        "over-optimisation",
        "Reward by distance from SFT",
        "Large dots: evaluations of the rounds; small ones: batches of rollouts; lines: R(d) = d (α − β log d), d = √KL, by "
        f"least squares ({'; '.join(words) or 'too few points'}). Good: all bend alike. The proxy still rising where gold or "
        "held-out falls is over-optimisation.",
        HEIGHT,
        draw,
        3.6,
    )


def _top(line: Against, fit: Overoptimisation) -> str:
    """Where a fitted curve is highest; how far beyond the run that would be says nothing."""
    return f"highest at √KL {fit.peak:.2g}" if fit.peak is not None and fit.peak < line.far else "no top within the run"


def _dots(ax: "Axes", points: Sequence[tuple[float, float]], colour: str, small: bool, label: str | None = None) -> None:
    xs = [math.sqrt(max(0.0, kl)) for kl, _ in points]
    ys = [value for _, value in points]
    size, edge = (2.5, 0.0) if small else (7.0, 1.5)
    ax.plot(
        xs, ys, "o", color=colour, markersize=size, markeredgecolor=CARD, markeredgewidth=edge, alpha=0.35 if small else 1.0,
        label=label, zorder=2 if small else 5,
    )  # fmt: skip


@dataclass(frozen=True)
class Sign:
    """One sign by the distance from SFT.

    Args:
        title: of its panel.
        colour: of ``evaluation.svg``.
        told: of SFT's evaluation and the rounds'.
        steps: of the batches of rollouts that were monitored.
    """

    title: str
    colour: str
    told: Places
    steps: Places


def signs(run: Run) -> list[Sign]:
    """The signs of over-optimisation that a run has, by KL from SFT.

    Source: ledger.json and metrics.jsonl; ``evaluation.signs``.

    Args:
        run: as read.

    Returns:
        Steps only where the reference of their KL is SFT.

    Padding contract: there is none.
    """
    monitored = {(row.round, row.step) for row in run.metrics if row.phase == "monitor"}
    kls = {at: kl for at, kl in _from_sft(run).items() if at in monitored}
    rounds = [r.evaluation for r in run.ledger.rounds]
    found = []
    for key, series_name, title, colour in SIGNS:
        of_sft = run.ledger.sft_ensemble_std if key == "ensemble_std" else _value(run.ledger.start.numbers, key)
        values = [(run.ledger.start.kl, of_sft), *((e.kl, _value(e.numbers, key)) for e in rounds)]
        told = [(kl, value) for kl, value in values if value is not None]
        alone = key == "ensemble_std" and all(value == 0 for _, value in told)  # one member agrees with itself
        if told and not alone:
            found.append(Sign(title, colour, told, _steps(run, kls, series_name)))
    return found


def signs_figure(run: Run) -> Drawing | None:
    """The signs of over-optimisation by the square root of KL.

    Source: ``signs``.

    Args:
        run: as read.

    Returns:
        The drawing; None for a run of an earlier version, which has none of them.

    Padding contract: there is none.
    """
    if not any("self_bleu" in r.evaluation.numbers for r in run.ledger.rounds):
        return None
    shown = signs(run)

    def draw(figure: "Figure", narrow: bool) -> None:
        for ax, sign in zip(panels(figure, len(shown), narrow, sharex=True), shown, strict=True):
            _dots(ax, sign.steps, sign.colour, small=True)
            order = sorted((math.sqrt(max(0.0, kl)), value) for kl, value in sign.told)
            ax.plot([x for x, _ in order], [y for _, y in order], "-o", color=sign.colour, linewidth=1.2, markersize=4.5)
            ax.set_title(sign.title)
            ax.margins(y=0.2)
            ax.tick_params(labelbottom=True)
        for ax in figure.axes[-1 if narrow else -2 :]:
            ax.set_xlabel("√KL from SFT")

    return drawing(
        "signs",
        "Signs of over-optimisation",
        "By distance from SFT (the leftmost dot): dots are the rounds' evaluations, small ones, if there are any, batches of "
        "rollouts (evaluation.every_steps). Good: all stay near where SFT is. docs/monitor.md says what each means.",
        HEIGHT,
        draw,
        1.35 * len(shown) + 0.5,
    )
