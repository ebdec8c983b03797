"""One page that compares several runs. It reads their directories and nothing else.

The page runs no script and may load nothing, and every text is escaped: what a model wrote is not to be trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.compare import WinTieLose
from evaluation.compared_figures import compared_figures
from evaluation.compared_runs import ComparedRun, config_differences, duel, read_runs, same_prompts, same_truth
from evaluation.page import render_page, write_page
from evaluation.run_config import tie_of
from evaluation.summary import Finding, Headline, findings, judge_in_words
from evaluation.table import runs_table
from tokens.errors import UserError

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class Duel:
    """The best round of a run against the best round of another, as the page shows it."""

    ours: str
    theirs: str
    shares: str
    margin: str


def write_comparison(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page that compares several runs, whole or not at all.

    Source: the run directories' layout.

    Args:
        directories: 2 to 9 RUNs; the first is what the others are compared with.
        out: the page; None = comparison.html in the first of them.

    Returns:
        Its path. The same files give the same bytes.

    Raises:
        UserError: if one is no run directory or named twice, or a file is missing or malformed.
        OSError: if the disk refuses; an earlier page stays as it was.

    Padding contract: there is none.
    """
    runs = read_runs(directories)
    path = directories[0] / COMPARISON if out is None else out
    if path.is_dir():
        raise UserError(f"--out {path} is a directory: give the file that the page is written to, e.g. {path / COMPARISON}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no directory {path.absolute().parent}. Make it first, or give another place")
    return write_page(path, render_comparison(runs))


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """The page's HTML.

    Source: templates/comparison.html.j2.

    Args:
        runs: as read.

    Returns:
        A whole document.

    Padding contract: there is none.
    """
    table = runs_table({one.name: one.run.ledger for one in runs})
    best = {(one.name, f"round {one.best_round.index}") for one in runs}
    return render_page(
        "comparison.html.j2",
        name=" and ".join(one.name for one in runs),
        runs=runs,
        headline=comparison_headline(runs),
        findings=comparison_findings(runs),
        table=table,
        rows=[(row, (row[0], row[1]) in best) for row in table.rows],
        duels=_duels(runs),
        figures=compared_figures(runs),
        differences=config_differences(runs),
    )


def comparison_headline(runs: Sequence[ComparedRun]) -> Headline:
    """Which run has the best round, and whether it can be told apart from the next one's.

    The best rounds are ordered by win - lose against SFT where one judge says it of all of them, else by their gold reward; where
    there is neither, none is called the best. Whether the first is better than the second is asked directly, prompt by prompt
    under the gold reward, where both were judged so, and that has the last word.

    Source: ``evaluation.compare.win_tie_lose``.

    Args:
        runs: at least two.

    Returns:
        The headline; ``good`` only where the interval of the direct comparison leaves 0 out.

    Padding contract: there is none.
    """
    one_judge = len({one.best_round.evaluation.judge for one in runs}) == 1
    if not one_judge and not all(same_truth(runs[0], one) for one in runs):
        told = "; ".join(f"{_named(one)}: {_margin_of(one)} by {judge_in_words(one.best_round.evaluation.judge)}" for one in runs)
        text = "Which run has the best round cannot be said: their judges differ."
        return Headline("warn", "Not judged side by side", text, f"Against SFT: {told}.")
    first, second = sorted(runs, key=_by_margin if one_judge else _by_gold)[:2]
    outcome, ahead_of_sft = _duel(runs, first, second), one_judge
    if outcome is not None and outcome.high < 0:  # the other one wins, whatever the two do to SFT
        first, second, ahead_of_sft = second, first, False
        outcome = _duel(runs, first, second)
    margins = (_margin_of(first), _margin_of(second))
    if ahead_of_sft:
        text = f"{first.name} has the best round: round {first.best_round.index}, {margins[0]} against SFT."
        detail = f"Next is {second.name}, round {second.best_round.index}, with {margins[1]}."
    else:
        text = f"By the gold reward {_round_of(first)} is ahead of {_round_of(second)}."
        detail = f"Against SFT, each by its run's own judge: {first.name} {margins[0]}, {second.name} {margins[1]}."
    if outcome is None:
        return Headline("warn", "Not judged side by side", text, f"{detail} The two share no judge and prompts.")
    detail += (
        f" Prompt by prompt {first.name} wins {outcome.win:.0%} and loses {outcome.lose:.0%} of {outcome.num}: "
        f"win minus lose {outcome.margin:+z.2f}, 95% interval {outcome.low:+z.2f} to {outcome.high:+z.2f}."
    )
    if outcome.low > 0:
        return Headline("good", "Told apart on the same prompts", text, detail)
    return Headline("warn", "Not told apart on the same prompts", text, detail)


def comparison_findings(runs: Sequence[ComparedRun]) -> tuple[Finding, ...]:
    """What makes the runs less comparable than they look, and what each run's own page warns of.

    Source: none needed.

    Args:
        runs: at least two.

    Returns:
        Sentences; perhaps none.

    Padding contract: there is none.
    """
    first, found = runs[0], []
    judges = {one.name: judge_in_words(one.best_round.evaluation.judge) for one in runs}
    if len(set(judges.values())) > 1:
        told = ", ".join(f"{name} by {judge}" for name, judge in judges.items())
        found.append(Finding("warn", f"The judges differ: {told}. Wins and losses of different judges cannot be compared."))
    others = [one.name for one in runs if not same_prompts(first, one)]
    if others:
        found.append(
            Finding(
                "warn", f"Judged on other prompts than {first.name}: {', '.join(others)}. Compare the courses, not the heights."
            )
        )
    answers = {row.prompt_id: row.response for row in first.run.start_rows}
    starts = [one.name for one in runs if {row.prompt_id: row.response for row in one.run.start_rows} != answers]
    if set(starts) - set(others):
        found.append(Finding("note", f"Another SFT policy, or other samples of it, than {first.name}: {', '.join(starts)}."))
    ties = {tie_of(one.config) for one in runs}
    if len(ties) > 1:
        found.append(
            Finding(
                "warn", f"evaluation.tie differs ({', '.join(f'{tie:g}' for tie in sorted(ties))}): ties are counted differently."
            )
        )
    counts = {one.name: len(one.run.ledger.rounds) for one in runs}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {name}" for name, count in counts.items())
        found.append(
            Finding(
                "note",
                f"The prompts of this page also chose the best rounds, among {told}: with more to choose from, the best "
                "looks better here than on prompts that chose nothing (python -m cluster evaluate).",
            )
        )
    found += [
        Finding("warn", f"{one.name}: {finding.text}") for one in runs for finding in findings(one.run) if finding.kind == "warn"
    ]
    return tuple(found)


def _margin_of(one: ComparedRun) -> str:
    e = one.best_round.evaluation
    if e.margin is None or e.margin_low is None or e.margin_high is None:
        return "no outcome"
    return f"win minus lose {e.margin:+z.2f} [{e.margin_low:+z.2f}, {e.margin_high:+z.2f}]"


def _duels(runs: Sequence[ComparedRun]) -> tuple[Duel, ...]:
    """Every run against every other one that was judged by the same truth on the same prompts."""
    found = []
    for number, theirs in enumerate(runs):
        for ours in runs[number + 1 :]:
            o = duel(ours, theirs)
            if o is not None:
                shares = f"{o.win:.0%} / {o.tie:.0%} / {o.lose:.0%}"
                margin = f"{o.margin:+z.2f} [{o.low:+z.2f}, {o.high:+z.2f}]"
                found.append(Duel(_named(ours), _named(theirs), shares, margin))
    return tuple(found)


def _duel(runs: Sequence[ComparedRun], first: ComparedRun, second: ComparedRun) -> WinTieLose | None:
    """``duel`` by the numbers of the table: there the run that is named later is asked about the earlier one."""
    if runs.index(first) > runs.index(second):
        return duel(first, second)
    found = duel(second, first)
    if found is None:
        return None
    return replace(found, win=found.lose, lose=found.win, margin=-found.margin, low=-found.high, high=-found.low)


def _by_margin(one: ComparedRun) -> float:
    return -(one.best_round.evaluation.margin or 0.0)


def _by_gold(one: ComparedRun) -> float:
    return -(one.best_round.evaluation.gold or 0.0)


def _round_of(one: ComparedRun) -> str:
    return f"{one.name}'s round {one.best_round.index}"


def _named(one: ComparedRun) -> str:
    return f"{one.name}, round {one.best_round.index}"
