"""Asks a judge about pairs in both orders, and keeps every answer where a second call finds it.

Letters: N pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from cluster.console import Console
from cluster.judges import FIRST, NONE, SECOND, TIE, Answer, Judge, JudgeFailed, NotAsked
from cluster.signals import obey_termination
from preferences.formats import Texts
from tokens.errors import UserError

FEW_NOT_ASKED, SHARE_NOT_ASKED = 4, 0.05
"""So many questions, or this share of all, may be more than the judge can take; beyond that something else is wrong."""


@dataclass(frozen=True)
class _Comparison:
    """One question to a judge."""

    prompt: str
    first: str
    second: str

    def key(self, judge: str) -> str:
        """What the answer is kept under."""
        return hashlib.sha256(json.dumps([judge, self.prompt, self.first, self.second]).encode()).hexdigest()


@dataclass(frozen=True)
class Answers:
    """Answers by the digest of judge and texts, and the file that each new one is added to.

    Args:
        known: the answers.
        file: to add to.
    """

    known: dict[str, int]
    file: TextIO

    def add(self, keys: Sequence[str], answers: Sequence[Answer | None]) -> None:
        """Keep those that are answers. A question that could not be asked is not in the file: a later call asks again, since the
        judge may have been given more room."""
        for key, answer in zip(keys, answers, strict=True):
            if answer is not None and not isinstance(answer, NotAsked):
                self.known[key] = answer
                self.file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self.file.flush()


@contextmanager
def open_answers(path: Path) -> Iterator[Answers]:
    """What was answered before, and a file to add to. A line that a crash cut off is passed over."""
    known: dict[str, int] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["answer"] in (FIRST, SECOND, NONE, TIE):
                known[str(row["key"])] = row["answer"]
    with path.open("a", encoding="utf-8") as file:
        if lines and not lines[-1].endswith(b"\n"):
            file.write("\n")
        yield Answers(known, file)


def ask_in_both_orders(
    texts: Sequence[Texts | None], judge: Judge, answers: Answers, console: Console, *, few_will_do: bool = False
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Ask about every pair twice.

    Args:
        texts: N pairs; None for one that is not asked about.
        judge: who is asked.
        answers: what is there already, and where new answers are kept.
        console: shows how far it is.
        few_will_do: go on however many it could not be asked about.

    Returns:
        [N] int64 answers with chosen shown first, and [N] with rejected shown first, both in terms of the pair: 1 = chosen is
        better, 0 = rejected is, -1 = no answer, 2 = a tie, from a judge that may say so.
        And the pairs that the judge could not be asked about in at least one order, by their index, with the reason.

    Raises:
        UserError: if there are more of these than a few, unless few will do, or no question at all was answered.
        JudgeFailed: if the judge cannot go on.
    """
    usable = [text for text in texts if text is not None]
    questions = [
        _Comparison(text.prompt, *sides)
        for text in usable
        for sides in ((text.chosen, text.rejected), (text.rejected, text.chosen))
    ]
    keys = [question.key(judge.name) for question in questions]
    todo = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers.known}
    refused: dict[str, str] = {}
    total = len(set(keys))
    if len(todo) < total:
        console.say(f"{total - len(todo):,} of {total:,} answers are there from an earlier call")
    with console.bar("ask the judge", "answers") as bar:
        waiting = list(todo)
        for start in range(0, len(waiting), judge.batch_size):
            batch = waiting[start : start + judge.batch_size]
            refused |= _ask(batch, [todo[key] for key in batch], judge, answers, total)
            if not few_will_do:
                _refuse_too_many(refused, answers, total)
            bar.update(start + len(batch), len(waiting))
            obey_termination()
    raw = np.array([answers.known[key] if key in answers.known else NONE for key in keys], dtype=np.int64).reshape(-1, 2)
    places = [place for place, text in enumerate(texts) if text is not None]
    not_asked = {places[i // 2]: refused[key] for i, key in enumerate(keys) if key in refused}
    if len(raw) and (raw == NONE).all():
        reasons = f"; first: {next(iter(not_asked.values()))}" if not_asked else ": no reply is clearly one of the two responses"
        raise UserError(
            f"the judge answered none of {total:,} questions about {len(places):,} pairs{reasons}. Nothing is written; what it "
            f"replied is kept in {answers.file.name}, remove that to ask the same judge again"
        )
    forward, backward = (np.full(len(texts), NONE, dtype=np.int64) for _ in range(2))
    forward[places] = raw[:, 0]
    backward[places] = np.where(np.isin(raw[:, 1], (FIRST, SECOND)), 1 - raw[:, 1], raw[:, 1])
    return forward, backward, not_asked


def _answers_of(judge: Judge, questions: Sequence[_Comparison]) -> list[Answer]:
    """What the judge says, held to its promise: one answer to each question, and nothing but an answer."""
    try:
        said = judge.compare([q.prompt for q in questions], [q.first for q in questions], [q.second for q in questions])
    except (UserError, JudgeFailed):
        raise
    except Exception as error:
        raise JudgeFailed(f"the judge {judge.name} failed: {type(error).__name__}: {error}", [None] * len(questions)) from error
    odd = [answer for answer in said if not isinstance(answer, NotAsked) and answer not in (FIRST, SECOND, NONE, TIE)]
    if len(said) != len(questions) or odd:
        got = f"{odd[0]!r} for an answer" if odd else f"{len(said)} answers to {len(questions)} questions"
        raise JudgeFailed(f"the judge {judge.name} gave {got}, expected 1, 0, -1 or 2 to each", [None] * len(questions))
    return said


def _ask(keys: Sequence[str], questions: Sequence[_Comparison], judge: Judge, answers: Answers, total: int) -> dict[str, str]:
    """Ask and keep; why there is no answer, by key, for the questions that the judge could not be asked."""
    try:
        said = _answers_of(judge, questions)
    except JudgeFailed as error:
        answers.add(keys, error.answers)
        raise JudgeFailed(
            f"{error}. {len(answers.known):,} answers ({total:,} are needed) are kept in {answers.file.name}", ()
        ) from None
    answers.add(keys, said)
    return {key: answer.reason for key, answer in zip(keys, said, strict=True) if isinstance(answer, NotAsked)}


def _refuse_too_many(refused: Mapping[str, str], answers: Answers, total: int) -> None:
    if len(refused) > max(FEW_NOT_ASKED, SHARE_NOT_ASKED * total):
        raise UserError(
            f"{len(refused):,} of {total:,} questions were more than the judge can take, and not all are asked "
            f"yet; last: {list(refused.values())[-1]}. Leave such pairs out, or ask a judge with more room. "
            f"{len(answers.known):,} answers are kept in {answers.file.name}"
        )
