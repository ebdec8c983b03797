"""Judges of a comparison: opened and checked before anything is sampled, then asked about every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.asking import Answers, ask_in_both_orders
from cluster.console import Console
from cluster.endpoint_judge import EndpointJudge
from cluster.evaluate_inputs import HUMAN, Comparison, Evaluating
from cluster.evaluate_models import Letter, Response
from cluster.human_answers import WAITING, check_file, read_verdicts, write_questions
from cluster.judges import FIRST, NONE, SECOND, TIE, EnsembleJudge, Judge, RewardJudge
from cluster.open_judge import open_judge
from cluster.own_judge import refuse_own_judge
from evaluation.judgements import Choice, Verdict
from preferences.formats import Texts
from tokens.errors import UserError
from tokens.paths import check_path

CHOICE: dict[int, Choice | None] = {FIRST: "a", SECOND: "b", TIE: "tie", NONE: None}
UNCLEAR = "a reply is not clearly one of the two, or a tie"


def open_judges(asked: Evaluating, comparison: Comparison, stack: ExitStack) -> dict[str, Judge | Path]:
    """The judges of a comparison, checked but not yet asked.

    Args:
        asked: what `evaluate` was told.
        comparison: what it is about.
        stack: closes connections.

    Returns:
        By name; of a person, the file.

    Raises:
        UserError: if one cannot judge it.
    """
    prompts, found = comparison.prompts, dict[str, Judge | Path]()
    for name in asked.judges:
        kind, _, place = name.partition(":")
        if kind in (HUMAN, "reward", "ensemble") or (kind == "gold" and place):
            for part in place.split(","):
                check_path(part)
        if kind == HUMAN:
            check_file(Path(place).expanduser(), comparison.name, prompts.ids)
            found[name] = Path(place).expanduser()
            continue
        if name == "gold" and prompts.sandbox is None:
            raise UserError(
                "--judge gold knows the sandbox's prompts only: give --prompts sandbox:CONFIG.yaml, or --judge gold:CONFIG.yaml "
                "with prompts of that world"
            )
        judge = open_judge(name, prompts.sandbox, prompts.conversational, asked.options, stack, asked.tie)
        prompts.for_judge(name, judge.template)
        if kind == "gold":
            judge.compare(prompts.plain, [""] * len(prompts.ids), [""] * len(prompts.ids))  # refuses another world's prompts
        refuse_own_judge(name, models_of(judge), (comparison.a, comparison.b))
        found[name] = judge
    if not found:
        raise UserError("nobody is asked: give at least one --judge")
    return found


def check_endpoints(judges: Mapping[str, Judge | Path]) -> None:
    """See that endpoints answer, before long work that would be in vain.

    Args:
        judges: as opened.

    Raises:
        UserError: if one does not.
    """
    for judge in judges.values():
        if isinstance(judge, EndpointJudge):
            judge.check()


def models_of(judge: Judge) -> list[Path]:
    """Directories of a judge's reward models.

    Args:
        judge: any.
    """
    if isinstance(judge, EnsembleJudge):
        return [member.path for member in judge.members]
    return [judge.path] if isinstance(judge, RewardJudge) else []


def verdicts_of(
    name: str,
    judge: Judge | Path,
    comparison: Comparison,
    responses: Mapping[Letter, Sequence[Response]],
    answers: Answers,
    console: Console,
) -> list[Verdict]:
    """What a judge says. Where both models say the same nobody is asked: that is a tie.

    Args:
        name: of the judge.
        judge: opened; of a person, the file.
        comparison: what it is about.
        responses: of each model, in the prompts' order.
        answers: earlier ones, and where new ones are kept.
        console: shows how far it is.

    Returns:
        One a prompt.

    Raises:
        UserError: if it answers nothing, or too much is more than it can take; or a person's file was changed.
        JudgeFailed: if it cannot go on.
    """
    prompts = comparison.prompts
    pairs = [(a.text, b.text) for a, b in zip(responses["A"], responses["B"], strict=True)]
    differ = [a != b for a, b in pairs]
    if isinstance(judge, Path):
        return _of_person(name, judge, comparison, pairs, console)
    texts = prompts.for_judge(name, judge.template)
    asked = [Texts(text, a, b) if other else None for text, (a, b), other in zip(texts, pairs, differ, strict=True)]
    if not any(differ):
        return [Verdict("tie", "tie")] * len(pairs)
    console.say(f"[bold]{name}[/]")
    forward, backward, not_asked = ask_in_both_orders(asked, judge, answers, console)
    reasons = [not_asked[place] if place in not_asked else UNCLEAR for place in range(len(pairs))]
    return [
        _verdict(CHOICE[int(a_first)], CHOICE[int(b_first)], why) if other else Verdict("tie", "tie")
        for a_first, b_first, why, other in zip(forward, backward, reasons, differ, strict=True)
    ]


def _verdict(a_first: Choice | None, b_first: Choice | None, why: str) -> Verdict:
    return Verdict(a_first, b_first, 2, "" if a_first and b_first else why)


def _of_person(
    name: str, file: Path, comparison: Comparison, pairs: Sequence[tuple[str, str]], console: Console
) -> list[Verdict]:
    prompts = comparison.prompts
    questions = [(id_, text, a, b) for id_, text, (a, b) in zip(prompts.ids, prompts.plain, pairs, strict=True) if a != b]
    if not file.exists() and questions:
        write_questions(file, comparison.name, questions)
    given = read_verdicts(file, comparison.name, prompts.ids, {q[0]: q[2:] for q in questions}) if questions else {}
    missing = sum(verdict.choice is None for verdict in given.values())
    if missing:
        console.say(
            f'[yellow]{name}[/] has {missing:,} of {len(questions):,} answers to give: fill in 1, 2 or tie for "better" in '
            f"{file}, and run the same command again"
        )
    alike = Verdict(None, None, 1, WAITING) if missing else Verdict("tie", None, 1)  # or those would weigh more than the answered
    return [given[id_] if id_ in given else alike for id_ in prompts.ids]
