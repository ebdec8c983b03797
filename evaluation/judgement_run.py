"""The directory of `evaluate`: a line a prompt, and a card of what they come to.

Letters: N prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from evaluation.compare import WinTieLose
from evaluation.json_node import JsonNode, json_file, json_lines
from evaluation.judgements import (
    CHOICES,
    Agreement,
    Choice,
    LengthEffect,
    OrderEffect,
    Verdict,
    agreement,
    length_effect,
    order_effect,
    outcome,
)
from tokens.errors import UserError

KIND, FORMAT = "evaluation", 1
CARD, JUDGEMENTS = "card.json", "judgements.jsonl"


@dataclass(frozen=True)
class JudgementRow:
    """One prompt.

    Args:
        prompt_id: unique in its file.
        prompt: as text.
        domain: or "".
        a: A's response, special tokens left out.
        b: B's.
        a_tokens: of A's response, EOS included.
        b_tokens: of B's.
        a_finished: False if A's was cut at the longest response.
        b_finished: likewise.
        verdicts: by judge.
    """

    prompt_id: str
    prompt: str
    domain: str
    a: str
    b: str
    a_tokens: int
    b_tokens: int
    a_finished: bool
    b_finished: bool
    verdicts: Mapping[str, Verdict]

    def line(self) -> str:
        """As a line of the file; each judge's verdict by what stood first, and what they come to."""
        verdicts = {name: {**asdict(verdict), "verdict": verdict.choice} for name, verdict in self.verdicts.items()}
        return json.dumps({**vars(self), "verdicts": verdicts}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class JudgedBy:
    """What one judge's verdicts come to.

    Args:
        judge: its name.
        outcome: None if it gave no verdict.
        order: whether the order decided, of the prompts on which the responses differ; None likewise.
        length: whether the longer response won, by characters.
        no_verdict: prompts without a verdict, and why, by how many.
    """

    judge: str
    outcome: WinTieLose | None
    order: OrderEffect | None
    length: LengthEffect
    no_verdict: Mapping[str, int]


@dataclass(frozen=True)
class JudgementRun:
    """A finished comparison.

    Args:
        directory: of it.
        card: of it.
        rows: [N].
        judges: one each.
        agreement: of each two judges that have prompts in common.
        notes: what was told when they were asked, as of judges that share what they learned from with a policy; none in a file
            from before they were kept.
    """

    directory: Path
    card: JsonNode
    rows: tuple[JudgementRow, ...]
    judges: tuple[JudgedBy, ...]
    agreement: tuple[tuple[str, str, Agreement], ...]
    notes: tuple[str, ...] = ()


def judged_by(judge: str, rows: Sequence[JudgementRow]) -> JudgedBy:
    """What a judge's verdicts come to.

    Source: as the functions of ``evaluation.judgements``.

    Args:
        judge: its name.
        rows: [N].

    Returns:
        The sums.

    Padding contract: prompts without a verdict are counted as such, and change nothing else.
    """
    verdicts = [row.verdicts[judge] for row in rows]
    reasons = [verdict.why or "asked in one order only" for verdict in verdicts if verdict.choice is None]
    lengths = [(len(row.a), len(row.b)) for row in rows]  # the two may count tokens differently
    missing = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    told_apart = [row.verdicts[judge] for row in rows if row.a != row.b]
    return JudgedBy(judge, outcome(verdicts), order_effect(told_apart), length_effect(verdicts, lengths), missing)


def agreements(rows: Sequence[JudgementRow]) -> list[tuple[str, str, Agreement]]:
    """How far each two judges say the same, of the prompts on which the responses differ.

    Source: as ``agreement``.

    Args:
        rows: [N], at least one.

    Returns:
        Two names and their agreement; pairs without a common prompt are left out.

    Padding contract: as ``agreement``.
    """
    found, differ = [], [row for row in rows if row.a != row.b]
    for one, other in combinations(rows[0].verdicts, 2):
        same = agreement([row.verdicts[one] for row in differ], [row.verdicts[other] for row in differ])
        if same is not None:
            found.append((one, other, same))
    return found


def card_of_judge(judge: str, rows: Sequence[JudgementRow]) -> dict[str, Any]:
    """A judge's entry of the card.

    Source: as ``judged_by``.

    Args:
        judge: its name.
        rows: [N].

    Returns:
        What JSON holds.

    Padding contract: as ``judged_by``.
    """
    entry = asdict(judged_by(judge, rows))
    return {**entry, "no_verdict": sum(entry["no_verdict"].values()), "reasons": entry["no_verdict"]}


def cards_of_agreement(rows: Sequence[JudgementRow]) -> list[dict[str, Any]]:
    """The card's entries of each two judges.

    Source: as ``agreements``.

    Args:
        rows: [N].

    Returns:
        What JSON holds.

    Padding contract: as ``agreement``.
    """
    return [{"judges": [one, other], **asdict(same)} for one, other, same in agreements(rows)]


def read_judgement_run(directory: Path) -> JudgementRun:
    """Read what `evaluate` wrote; sums are made again from the rows.

    Source: the directory's layout, docs/evaluate.md.

    Args:
        directory: STORAGE/evaluations/COMPARISON.

    Returns:
        The comparison.

    Raises:
        UserError: if a file is missing or malformed.

    Padding contract: there is none.
    """
    card = json_file(directory / CARD)
    card.one_of("kind", (KIND,))
    if card.number("format") != FORMAT:
        raise UserError(f"{directory / CARD}: format {card.value('format')}, this version reads {FORMAT}")
    rows = tuple(_row(node) for node in json_lines(directory / JUDGEMENTS))
    if not rows:
        raise UserError(f"{directory / JUDGEMENTS}: holds no prompt; remove it and run the same `evaluate` again")
    judges = tuple(judged_by(judge, rows) for judge in rows[0].verdicts)
    notes = card.texts("notes") if card.has("notes") else ()
    return JudgementRun(directory, card, rows, judges, tuple(agreements(rows)), notes)


def _row(node: JsonNode) -> JudgementRow:
    verdicts = node.child("verdicts")
    names = verdicts.strings()
    return JudgementRow(
        prompt_id=node.string("prompt_id"),
        prompt=node.string("prompt"),
        domain=node.string("domain"),
        a=node.string("a"),
        b=node.string("b"),
        a_tokens=int(node.number("a_tokens")),
        b_tokens=int(node.number("b_tokens")),
        a_finished=bool(node.value("a_finished")),
        b_finished=bool(node.value("b_finished")),
        verdicts={name: _verdict(verdicts.child(name)) for name in names},
    )


def _verdict(node: JsonNode) -> Verdict:
    return Verdict(_choice(node, "a_first"), _choice(node, "b_first"), int(node.number("orders")), node.string("why"))


def _choice(node: JsonNode, key: str) -> Choice | None:
    value = None if node.value(key) is None else node.one_of(key, CHOICES)
    return next((choice for choice in CHOICES if choice == value), None)
