"""report.html of a customisation: a table of strategies, curves, the Pareto front. Reads the directory and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.domain_figures import domain_plots
from evaluation.domains import DomainRun, Outcome, outcomes, read_domain_run
from evaluation.groups import Estimate
from evaluation.json_node import json_file, read_text
from evaluation.page import render_page, write_page
from evaluation.preference_report import draw_figures
from evaluation.summary import Headline
from evaluation.svg import Plot
from evaluation.table import NOTHING


@dataclass(frozen=True)
class StrategyLine:
    """One line of the table, as text."""

    strategy: str
    what: str
    domain: str
    general: str
    forgotten: str
    best: bool


def write_domain_report(directory: Path) -> Path:
    """Write report.html, table.md and figures/*.png of a finished customisation, each whole or not at all.

    Source: Everyone Deserves A Reward (2309.03126); see ``evaluation.domains`` for what is computed.

    Args:
        directory: STORAGE/domains/NAME.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    run = read_domain_run(directory)
    found = outcomes(run)
    plots: Sequence[Plot] = domain_plots(run, found)
    lines = tuple(_line(run, outcome) for outcome in found)
    write_page(directory / "table.md", table_text(run, found))
    page = render_page(
        "domains.html.j2",
        name=directory.resolve().name,
        headline=_headline(found),
        lines=lines,
        length_domain=f"{_mean(run, run.domains):.1%}",
        length_general=f"{_mean(run, run.general):.1%}" if run.general else NOTHING,
        figures=draw_figures(directory, plots),
        config=read_text(directory / "config.yaml"),
        versions=json_file(directory / "versions.json").strings(),
    )
    return write_page(directory / "report.html", page)


def table_text(run: DomainRun, found: Sequence[Outcome]) -> str:
    """The table as Markdown.

    Source: none needed.

    Args:
        run: as read.
        found: its outcomes.

    Returns:
        A line a strategy, and one for what length alone reaches.

    Padding contract: there is none.
    """
    head = "| strategy | | own domain | general sets | forgotten | Pareto front |\n|---|---|---|---|---|---|\n"
    rows = [_line(run, outcome) for outcome in found]
    text = [f"| {r.strategy} | {r.what} | {r.domain} | {r.general} | {r.forgotten} | {'yes' if r.best else ''} |" for r in rows]
    general = f"{_mean(run, run.general):.1%}" if run.general else NOTHING
    text.append(f"| length alone | | {_mean(run, run.domains):.1%} | {general} | {NOTHING} | |")
    return head + "\n".join(text) + "\n"


def _line(run: DomainRun, outcome: Outcome) -> StrategyLine:
    best = outcome.best and outcome.general is not None
    shown = (outcome.domain, outcome.general, outcome.forgotten)
    domain, general, forgotten = (_shown(value) for value in shown)
    return StrategyLine(outcome.strategy, run.strategies[outcome.strategy], domain, general, forgotten, best)


def _shown(value: Estimate | None) -> str:
    if value is None:
        return NOTHING
    interval = f" [{value.low:.1%}, {value.high:.1%}]" if value.low < value.high else ""
    return f"{value.value:.1%}{interval}"


def _mean(run: DomainRun, names: Sequence[str]) -> float:
    return sum(run.length_alone[name] for name in names) / len(names)


def _headline(found: Sequence[Outcome]) -> Headline:
    if not found:
        return Headline("warn", "Not measured", "No strategy has a finished domain.", "")
    best = max(found, key=lambda outcome: outcome.domain.value)
    text = f"{best.strategy} is the most accurate on the domains: {best.domain.value:.1%} of held-out comparisons."
    known = [outcome for outcome in found if outcome.forgotten is not None]
    if not known:
        detail = "No strategy had a general stage, or a general reward model to start from: nothing could be forgotten."
        return Headline("good", "Measured", text, detail)
    least = min(known, key=lambda outcome: outcome.forgotten.value if outcome.forgotten else 0.0)
    assert least.forgotten is not None
    detail = (
        f"{least.strategy} forgets least: its general accuracy changes by {-least.forgotten.value:+.1%} in the domain stage "
        "(mean over domains)."
    )
    return Headline("good", "Measured", text, detail)
