"""report.html of a comparison of two models. Reads the directory of `evaluate` and nothing else.

The page runs no script and may load nothing, and every text is escaped: responses and judges' names are not to be trusted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.json_node import read_text
from evaluation.judgement_run import JudgedBy, JudgementRun, read_judgement_run
from evaluation.page import Tiles, render_page, write_page
from evaluation.panels import common_legend
from evaluation.preference_report import LONGEST_TEXT, draw_figures
from evaluation.summary import Finding, Headline
from evaluation.svg import BLUE, GREY, INK, ORANGE, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_SHOWN = 40
"""Prompts on the page, the first of the file."""
MOVED_BY_ORDER = 0.25
POOR_KAPPA = 0.4
"""Below it agreement is called fair at best, Landis and Koch 1977."""
MANY_CUT = 0.05
SETTINGS = "settings.json"


def write_judgement_report(directory: Path) -> Path:
    """Write report.html and figures/*.png of a comparison, each whole or not at all.

    Source: none needed.

    Args:
        directory: STORAGE/evaluations/COMPARISON.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    run = read_judgement_run(directory)
    judged = [judge for judge in run.judges if judge.outcome is not None]
    models = run.card.child("models")
    page = render_page(
        "judgements.html.j2",
        name=directory.resolve().name,
        headline=_headline(judged),
        findings=_findings(run),
        tiles=_tiles(run),
        figures=draw_figures(directory, [_plot(judged)] if judged else []),
        models=[(letter, models.child(letter)) for letter in ("A", "B")],
        judges=run.judges,
        agreement=run.agreement,
        rows=run.rows[:NUM_SHOWN],
        num_rows=len(run.rows),
        longest=LONGEST_TEXT,
        config=read_text(directory / SETTINGS),
        versions=run.card.child("versions").strings(),
    )
    return write_page(directory / "report.html", page)


def _headline(judged: Sequence[JudgedBy]) -> Headline:
    if not judged or judged[0].outcome is None:
        return Headline("warn", "Not judged yet", "No judge has given a verdict.", "Fill in the file, and run the command again.")
    found = judged[0].outcome
    text = f"A wins {found.win:.1%}, ties {found.tie:.1%} and loses {found.lose:.1%} of {found.num:,} prompts against B."
    detail = (
        f"By {judged[0].judge}: wins − losses {found.margin:+.1%}, 95% interval {found.low:+.1%} to {found.high:+.1%} (paired "
        "bootstrap over prompts)."
    )
    told = [(judge.judge, judge.outcome) for judge in judged if judge.outcome]
    sides = [(name, outcome.low > 0) for name, outcome in told if not outcome.low <= 0 <= outcome.high]
    if len({a_wins for _, a_wins in sides}) > 1:
        said = "; ".join(f"{name} prefers {'A' if a_wins else 'B'}" for name, a_wins in sides)
        return Headline("warn", "The judges disagree", text, f"{detail} {said}, each with an interval that leaves 0 out.")
    if found.low > 0:
        return Headline("good", "A is better", text, detail)
    return Headline("warn", "B is better" if found.high < 0 else "Not told apart", text, detail)


def _findings(run: JudgementRun) -> list[Finding]:
    """What must be known before the numbers are believed."""
    found = list(run.notes)
    for judge in run.judges:
        if judge.order is not None and judge.order.consistent is not None and 1 - judge.order.consistent > MOVED_BY_ORDER:
            found.append(
                f"{judge.judge} changes its mind with the order on {1 - judge.order.consistent:.0%} of prompts; these count as "
                "ties. A stronger judge would decide more of them."
            )
        if judge.order is not None and not judge.order.bias.low <= 0 <= judge.order.bias.high:
            side = "first" if judge.order.bias.value > 0 else "second"
            found.append(f"{judge.judge} prefers what it is shown {side}. Both orders are asked, so neither model gains by it.")
        if judge.length.longer is not None and judge.length.longer.low > 0.5:
            found.append(
                f"{judge.judge} prefers the longer response on {judge.length.longer.value:.0%} of {judge.length.num:,} prompts "
                "that it decides: either longer is better here, or length is what wins."
            )
        found += [f"{judge.judge} has no verdict on {num:,} prompts: {reason}." for reason, num in judge.no_verdict.items()]
    poor = [
        f"{one} and {other} ({same.kappa.value:.2f})"
        for one, other, same in run.agreement
        if same.kappa is not None and same.kappa.high < POOR_KAPPA
    ]
    if poor:
        found.append(f"Hardly agree, so that they do not measure the same (Cohen's kappa): {'; '.join(poor)}.")
    models = run.card.child("models")
    for letter in ("A", "B"):
        cut = models.child(letter).number("cut")
        if cut > MANY_CUT:
            found.append(f"{cut:.0%} of {letter}'s responses were cut before they ended: raise `--max-new-tokens`.")
    return [Finding("warn", text) for text in found]


def _tiles(run: JudgementRun) -> Tiles:
    models, sampling = run.card.child("models"), run.card.child("sampling")
    lengths = [models.child(letter).number("mean_characters") for letter in ("A", "B")]
    same = sum(row.a == row.b for row in run.rows)
    temperature = sampling.number("temperature")
    return [
        ("prompts", f"{len(run.rows):,}", run.card.child("prompts").string("name")),
        ("judges", str(len(run.judges)), "asked"),
        ("length of A", f"{lengths[0]:,.0f}", "characters a response"),
        ("length of B", f"{lengths[1]:,.0f}", "characters a response"),
        ("same answer", f"{same / len(run.rows):.0%}", "a tie; nobody is asked"),
        ("sampling", f"T {temperature:g}", f"{sampling.number('max_new_tokens'):g} new tokens, seed {sampling.number('seed'):g}"),
    ]


def _plot(judged: Sequence[JudgedBy]) -> Plot:
    """Shares of each judge as a bar, and wins less losses with their interval below it."""

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        for place, judge in enumerate(reversed(judged)):
            _bar(ax, place, judge)
        ax.set_yticks(range(len(judged)), [_short(judge.judge, narrow) for judge in reversed(judged)])
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.grid(False, axis="y")
        common_legend(figure, [ax], 3)

    height = 1.0 + 0.55 * len(judged)
    return Plot("win-tie-lose", "", "A against B", "Share of prompts on which A wins, ties and loses, by judge.", height, draw)


def _bar(ax: "Axes", place: int, judge: JudgedBy) -> None:
    assert judge.outcome is not None
    left = 0.0
    parts = (("A wins", judge.outcome.win, BLUE), ("tie", judge.outcome.tie, GREY), ("B wins", judge.outcome.lose, ORANGE))
    for label, width, colour in parts:
        ax.barh(place, width, left=left, color=colour, height=0.62, label=label, alpha=0.85 if colour != GREY else 0.35)
        if width >= 0.08:
            ax.text(left + width / 2, place, f"{width:.0%}", ha="center", va="center", color=INK)
        left += width


def _short(name: str, narrow: bool) -> str:
    limit = 14 if narrow else 26
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"
