"""People as judges: a file of pairs in an order that tells nothing, filled in by hand, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from evaluation.json_node import JsonNode, json_lines
from evaluation.judgements import Verdict
from tokens.durable import write_file
from tokens.errors import UserError

BETTER = "better"
WORDS = ("1", "2", "tie", "")
WAITING = "not answered yet"
KEYS = ("comparison", "id", "prompt", "response_1", "response_2", BETTER)


def check_file(path: Path, comparison: str, ids: Sequence[str]) -> None:
    """Refuse a file that could not be read, or written, before any response is sampled.

    Args:
        path: of the file; it need not be there yet.
        comparison: which it must be of.
        ids: of its prompts.

    Raises:
        UserError: if it is of another comparison, or an answer is none.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"--judge human:{path}: expected a name that ends in .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--judge human:{path}: there is no directory {path.parent.absolute()}")
    if path.is_dir():
        raise UserError(f"--judge human:{path}: this is a directory, expected a file to write or to read")
    if path.exists():
        _rows(path, comparison, ids)


def write_questions(path: Path, comparison: str, questions: Sequence[tuple[str, str, str, str]]) -> None:
    """Write the file to fill in. Which model stands first is drawn for each prompt, and stands nowhere.

    Args:
        path: of the file.
        comparison: that it is of.
        questions: (id, prompt, A's response, B's response), all different responses.
    """
    lines = []
    for id_, prompt, a, b in questions:
        first, second = (a, b) if Random(f"{comparison} {path.name} {id_}").random() < 0.5 else (b, a)
        lines.append(json.dumps(dict(zip(KEYS, (comparison, id_, prompt, first, second, ""), strict=True)), ensure_ascii=False))
    write_file(path, "".join(f"{line}\n" for line in lines))


def read_verdicts(path: Path, comparison: str, ids: Sequence[str], texts: Mapping[str, tuple[str, str]]) -> dict[str, Verdict]:
    """What a person says.

    Args:
        path: of the file.
        comparison: that it must be of.
        ids: of all prompts.
        texts: A's and B's response by id, of the prompts that are in it.

    Returns:
        By prompt id; a prompt without an answer has no verdict, and says so.

    Raises:
        UserError: if a line was changed beyond its answer.
    """
    found: dict[str, Verdict] = dict.fromkeys(texts, Verdict(None, None, 1, WAITING))
    for number, (id_, row) in enumerate(_rows(path, comparison, ids).items(), start=1):
        shown = row.string("response_1"), row.string("response_2")
        a, b = texts[id_] if id_ in texts else ("", "")
        if id_ not in texts or shown not in ((a, b), (b, a)):
            raise UserError(
                f"{path}, line {number}: the responses are not those of this comparison. Only {BETTER!r} may be filled in: write "
                "the file anew (remove it and run the command again), or undo the change"
            )
        a_first, answer = shown == (a, b), _answer(row, path, number)
        if answer:
            choice = "tie" if answer == "tie" else ("a" if (answer == "1") == a_first else "b")
            found[id_] = Verdict(choice, None, 1) if a_first else Verdict(None, choice, 1)  # type: ignore[arg-type]
    return found


def _rows(path: Path, comparison: str, ids: Sequence[str]) -> dict[str, JsonNode]:
    rows: dict[str, JsonNode] = {}
    known = set(ids)
    for number, row in enumerate(json_lines(path), start=1):
        where = f"{path}, line {number}"
        if row.string("comparison") != comparison:
            raise UserError(
                f"{where}: these are answers about another comparison ({row.string('comparison')}, this is {comparison}): other "
                "models, prompts or sampling. Name another file, and it will be written"
            )
        id_ = row.string("id")
        if id_ not in known or id_ in rows:
            raise UserError(f"{where}: prompt {id_!r} {'is there twice' if id_ in rows else 'is none of this comparison'}")
        _answer(row, path, number)
        rows[id_] = row
    if not rows:
        raise UserError(f"{path}: there is no line in it; remove it, and the command writes it again")
    return rows


def _answer(row: JsonNode, path: Path, number: int) -> str:
    value = row.value(BETTER)
    answer = "" if value is None else str(value).strip().lower()
    if isinstance(value, bool) or answer not in WORDS:
        raise UserError(f'{path}, line {number}: {BETTER!r} must be 1, 2 or tie, or "" for not answered, got {value!r}')
    return answer
