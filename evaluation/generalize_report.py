"""report.html of `generalize`: how the upper loss and the hypergradient went for each beta, and what the targets came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.curves import legend, running_mean, step_axis
from evaluation.json_node import JsonNode, json_file, read_text
from evaluation.page import render_page, write_page
from evaluation.preference_report import draw_figures
from evaluation.summary import Headline
from evaluation.svg import SERIES, Plot
from evaluation.table import NOTHING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OuterCurve:
    """The outer steps of all seeds of one beta.

    Args:
        beta: reward factor.
        steps: [S] outer steps, from 1.
        upper: [S] upper loss, nats per comparison, mean over the seeds.
        gradient_norm: [S] of the hypergradient, likewise.
    """

    beta: float
    steps: tuple[int, ...]
    upper: tuple[float, ...]
    gradient_norm: tuple[float, ...]


@dataclass(frozen=True)
class TargetOutcome:
    """One target by the reward models of one beta.

    Args:
        target: its name.
        beta: reward factor.
        accuracy: of reward, reference and policy, means over the seeds; None where the target has no preferences.
        gain: of the best of n over the mean sample, in units of the reward.
    """

    target: str
    beta: float
    accuracy: dict[str, float] | None
    gain: float


@dataclass(frozen=True)
class GeneralizeRun:
    """A finished `generalize`.

    Args:
        form: of differentiation.
        per: token or response: what the reference policies' log-probabilities were counted per.
        beta: that the targets are meant for.
        seeds: how many of each beta.
        curves: by beta.
        targets: by target and beta.
    """

    form: str
    per: str
    beta: float
    seeds: int
    curves: tuple[OuterCurve, ...]
    targets: tuple[TargetOutcome, ...]


@dataclass(frozen=True)
class TargetLine:
    """A line of the table, as text."""

    target: str
    beta: str
    reward: str
    reference: str
    policy: str
    gain: str


KINDS = ("reward", "reference", "policy")
CHANCE = 0.5
TOGETHER = {
    "response": "the policy that the reward makes of the reference (log pi_ref + beta * reward)",
    "token": "a length-normalised score of both, which is no policy's (log pi_ref per token + beta * reward)",
}
"""What ranks in the column of reward and reference together, by what log pi_ref is counted per."""


def read_generalize(directory: Path) -> GeneralizeRun:
    """Read what a finished `generalize` left.

    Source: none needed.

    Args:
        directory: STORAGE/generalize/NAME.

    Raises:
        UserError: if the card is missing or malformed.

    Padding contract: there is none.
    """
    card = json_file(directory / "card.json")
    rewards = [card.child_of_list("rewards", i) for i in range(card.length("rewards"))]
    targets = [card.child_of_list("targets", i) for i in range(card.length("targets"))]
    betas = list(dict.fromkeys(node.number("beta") for node in rewards))
    by_target: dict[tuple[str, float], list[JsonNode]] = {}
    for node in targets:
        by_target.setdefault((node.string("target"), node.number("beta")), []).append(node)
    curves = tuple(_curve(beta, [node for node in rewards if node.number("beta") == beta]) for beta in betas)
    outcomes = tuple(_outcome(name, beta, nodes) for (name, beta), nodes in by_target.items())
    form, per = card.string("form"), card.one_of("reference_per", ("token", "response"))
    return GeneralizeRun(form, per, card.number("beta"), len(rewards) // len(betas), curves, outcomes)


def _curve(beta: float, nodes: Sequence[JsonNode]) -> OuterCurve:
    by_step: dict[int, list[JsonNode]] = {}
    for node in nodes:
        for index in range(node.length("steps")):
            step = node.child_of_list("steps", index)
            by_step.setdefault(int(step.number("step")), []).append(step)
    steps = sorted(by_step)
    upper, norm = (
        tuple(fmean(step.number(key) for step in by_step[number]) for number in steps) for key in ("upper", "gradient_norm")
    )
    return OuterCurve(beta, tuple(steps), upper, norm)


def _outcome(name: str, beta: float, nodes: Sequence[JsonNode]) -> TargetOutcome:
    accuracy = None
    if all(node.value("accuracy") is not None for node in nodes):
        accuracy = {kind: fmean(node.child("accuracy").number(kind) for node in nodes) for kind in KINDS}
    return TargetOutcome(name, beta, accuracy, fmean(node.number("reward_gain") for node in nodes))


def write_generalize_report(directory: Path) -> Path:
    """Write report.html and figures/*.png, each whole or not at all.

    Source: 2402.14760 for the two levels.

    Args:
        directory: STORAGE/generalize/NAME.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    run = read_generalize(directory)
    page = render_page(
        "generalize.html.j2",
        name=directory.resolve().name,
        headline=headline(run),
        together=TOGETHER[run.per],
        lines=tuple(_line(outcome) for outcome in run.targets),
        seeds=f"{run.seeds} seeds" if run.seeds > 1 else "one seed",
        figures=draw_figures(directory, outer_plots(run)),
        config=read_text(directory / "config.yaml"),
        versions=json_file(directory / "versions.json").strings(),
    )
    return write_page(directory / "report.html", page)


def headline(run: GeneralizeRun) -> Headline:
    """What the targets came to at the beta that they are meant for.

    Source: none needed.

    Args:
        run: as read.

    Returns:
        The verdict; a warning where the reward ranks no better than the reference policies alone, or than chance.

    Padding contract: there is none.
    """
    means = {kind: [o.accuracy[kind] for o in run.targets if o.beta == run.beta and o.accuracy is not None] for kind in KINDS}
    if not means["reward"]:
        return Headline("warn", "Not measured", "No target has preferences to measure on.", "")
    reward, reference, policy = (fmean(means[kind]) for kind in KINDS)
    detail = (
        f"Mean over {len(means['reward'])} targets at beta {run.beta:g}, form {run.form}. Their reference policies alone rank "
        f"{reference:.1%}, {TOGETHER[run.per]} {policy:.1%}. Against a pooled reward model this says nothing: train one with "
        "`python -m cluster reward` on all pairs."
    )
    text = f"On domains that nobody labelled the reward ranks {reward:.1%} of the pairs right."
    if reward <= max(reference, CHANCE):
        return Headline("warn", "Reward does not help", text, detail)
    return Headline("good", "Measured", text, detail)


def _line(outcome: TargetOutcome) -> TargetLine:
    shown = {kind: NOTHING if outcome.accuracy is None else f"{outcome.accuracy[kind]:.1%}" for kind in KINDS}
    return TargetLine(target=outcome.target, beta=f"{outcome.beta:g}", gain=f"{outcome.gain:+.3f}", **shown)


def outer_plots(run: GeneralizeRun) -> tuple[Plot, ...]:
    """Upper loss and hypergradient over the outer steps, a curve for each beta.

    Source: 2402.14760, whose convergence in outer steps and in beta they are to be held against.

    Args:
        run: as read.

    Returns:
        Two plots.

    Padding contract: there is none.
    """

    def plot(name: str, title: str, caption: str, label: str, key: str) -> Plot:
        def draw(figure: Figure, narrow: bool) -> None:
            ax = figure.subplots()
            for number, curve in enumerate(run.curves):
                values = curve.upper if key == "upper" else curve.gradient_norm
                colour, width = SERIES[number % len(SERIES)], max(1, len(values) // 10)
                ax.plot(curve.steps, values, color=colour, alpha=0.25, linewidth=1.0)
                ax.plot(curve.steps, running_mean(values, width), color=colour, label=f"beta {curve.beta:g}")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            step_axis(ax, "outer step")
            legend(ax, 3)

        return Plot(name, "", title, caption, 2.7, draw)

    return (
        plot(
            "upper-loss",
            "Upper loss",
            "Preference loss of the policies that the reward makes of the reference policies, mean over a step's domains; "
            "0.693 is chance. Falling and flat at the end is what convergence looks like.",
            "nats per comparison",
            "upper",
        ),
        plot(
            "hypergradient",
            "Norm of the hypergradient",
            "Before clipping, of a step's batch. At a stationary point what is left of it is the noise of batches. It is about "
            "beta times as large, since beta multiplies the reward: compare shapes, not heights.",
            "norm",
            "gradient_norm",
        ),
    )
