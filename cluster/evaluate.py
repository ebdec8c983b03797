"""`evaluate`: two models answer the same prompts, and judges say which answer is better; in this process, without Ray.

STORAGE/evaluations/COMPARISON/
    settings.json       the models' fingerprints, the prompts', and how was sampled: what the directory belongs to
    responses_a.jsonl   a line a prompt; what is there is not sampled again
    responses_b.jsonl
    answers.jsonl       what judges were asked and said; nothing is asked twice
    judgements.jsonl    a line a prompt: both responses, and each judge's verdict in both orders
    card.json           the sum of it all; written last
    report.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.asking import open_answers
from cluster.config import RunConfig
from cluster.console import Console
from cluster.differences import flat, refuse_differences
from cluster.evaluate_inputs import Comparison, Evaluating, compare
from cluster.evaluate_judges import check_endpoints, models_of, open_judges, verdicts_of
from cluster.evaluate_models import Contestant, Letter, Response, is_whole, sample
from cluster.hold import locked
from cluster.judges import Judge
from cluster.own_judge import remarks_on
from cluster.run_directory import now, space_errors
from cluster.storage import storage_root
from cluster.versions import versions
from evaluation.judgement_report import write_judgement_report
from evaluation.judgement_run import CARD, FORMAT, JUDGEMENTS, KIND, JudgementRow, card_of_judge, cards_of_agreement
from evaluation.judgements import Verdict
from tokens.durable import write_file
from tokens.errors import UserError

FOLDER = "evaluations"


def evaluate(asked: Evaluating, console: Console) -> Path:
    """Compare two models; the same command again goes on, and another judge finds the responses there.

    Args:
        asked: which, on what, by whom.
        console: to show progress and the outcome on.

    Returns:
        The directory.

    Raises:
        UserError: if an input is wrong; before a model is loaded where that can be known.
        JudgeFailed: if a judge cannot go on; its answers so far are kept.
    """
    comparison = compare(asked)
    with ExitStack() as stack:
        judges = open_judges(asked, comparison, stack)
        directory = _directory(asked, comparison)
        if not all(is_whole(_file(directory, letter), comparison.prompts.ids) for letter in comparison.ids):
            check_endpoints(judges)
        _make(directory)
        stack.enter_context(space_errors(directory))
        hold = stack.enter_context(locked(directory))
        console.say(f"[bold]Rondo[/] A {comparison.a.path} against B {comparison.b.path} in {directory}")
        notes = _remarks(comparison, judges)
        for line in notes:
            console.say(f"[yellow]note:[/] {line}")
        hold.check()
        write_file(directory / "settings.json", json.dumps(comparison.settings, indent=1))
        responses = _sample(comparison, directory, console)
        answers = stack.enter_context(open_answers(directory / "answers.jsonl"))
        verdicts = {name: verdicts_of(name, judge, comparison, responses, answers, console) for name, judge in judges.items()}
        hold.check()
        card = _write(directory, asked, comparison, responses, verdicts, notes)
    _say(card, console)
    console.say(f"Report: {write_judgement_report(directory)}")
    return directory


def _directory(asked: Evaluating, comparison: Comparison) -> Path:
    """Where it goes; what is there and of another comparison is refused."""
    if asked.out is None:
        directory = storage_root(RunConfig(name="evaluate")) / FOLDER / comparison.name
    else:
        directory = asked.out.expanduser()
    there = directory / "settings.json"
    if there.is_file():
        refuse_differences(directory, flat(json.loads(there.read_text("utf-8"))), flat(comparison.settings))
    elif directory.exists() and (not directory.is_dir() or any(path.name != ".lock" for path in directory.iterdir())):
        raise UserError(f"--out {directory} is there, and no directory of `evaluate`: name another one")
    return directory


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error.strerror}; name another place with --out") from error


def _remarks(comparison: Comparison, judges: Mapping[str, Judge | Path]) -> list[str]:
    """What a reader of the result must know, and no error is."""
    found = []
    if comparison.a.digest == comparison.b.digest:
        found.append("A and B are the same model: every prompt is a tie")
    for name, judge in judges.items():
        if not isinstance(judge, Path) and (models := models_of(judge)):
            found += remarks_on(name, models, (comparison.a, comparison.b))
    return found


def _file(directory: Path, letter: Letter) -> Path:
    return directory / f"responses_{letter.lower()}.jsonl"


def _sample(comparison: Comparison, directory: Path, console: Console) -> dict[Letter, list[Response]]:
    ids = comparison.prompts.ids
    return {
        one.letter: sample(one, ids, comparison.ids[one.letter], comparison.sampling, _file(directory, one.letter), console)
        for one in (comparison.a, comparison.b)
    }


def _write(
    directory: Path,
    asked: Evaluating,
    comparison: Comparison,
    responses: Mapping[Letter, Sequence[Response]],
    verdicts: Mapping[str, Sequence[Verdict]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write the judgements and, last, the card."""
    prompts = comparison.prompts
    rows = [
        JudgementRow(
            prompts.ids[place], prompts.plain[place], prompts.domains[place], a.text, b.text, a.num_tokens, b.num_tokens,
            a.finished, b.finished, {name: given[place] for name, given in verdicts.items()},
        )
        for place, (a, b) in enumerate(zip(responses["A"], responses["B"], strict=True))
    ]  # fmt: skip
    write_file(directory / JUDGEMENTS, "".join(row.line() for row in rows))
    card = {
        "kind": KIND,
        "format": FORMAT,
        "comparison": comparison.name,
        "finished_at": now(),
        "models": {one.letter: _card_of(one, responses[one.letter]) for one in (comparison.a, comparison.b)},
        "prompts": {"name": prompts.name, "num": len(prompts.ids), "sha256": prompts.digest},
        "sampling": asdict(comparison.sampling),
        "tie": asked.tie,
        "judges": {name: card_of_judge(name, rows) for name in verdicts},
        "agreement": cards_of_agreement(rows),
        "notes": list(notes),
        "versions": versions(),
    }
    write_file(directory / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    return card


def _card_of(one: Contestant, responses: Sequence[Response]) -> dict[str, Any]:
    """A model, and what can be said of its responses without a judge."""
    num = len(responses)
    return {
        "path": str(one.path.resolve()),
        "sha256": one.digest,
        "run": None if one.run is None else str(one.run),
        "mean_tokens": sum(r.num_tokens for r in responses) / num,
        "mean_characters": sum(len(r.text) for r in responses) / num,
        "cut": sum(not r.finished for r in responses) / num,
        "empty": sum(not r.text.strip() for r in responses) / num,
    }


def _say(card: Mapping[str, Any], console: Console) -> None:
    table = Table(title="A against B", title_justify="left")
    for column in ("judge", "prompts", "A wins", "tie", "A loses", "wins - losses [95%]", "order decides", "no verdict"):
        table.add_column(column, justify="left" if column == "judge" else "right")
    for name, judge in card["judges"].items():
        found, order = judge["outcome"], judge["order"]
        if found is None:
            table.add_row(name[:60], "0", *["-"] * 5, str(judge["no_verdict"]))
            continue
        margin = f"{found['margin']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}]"
        decided = "-" if order is None or order["consistent"] is None else f"{1 - order['consistent']:.1%}"
        shares = [f"{found[key]:.1%}" for key in ("win", "tie", "lose")]
        table.add_row(name[:60], f"{found['num']:,}", *shares, margin, decided, str(judge["no_verdict"]))
    console.show(table)
