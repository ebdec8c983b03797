"""Pairs that say who judged them, and a person's answers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from preferences.config import DataConfig
from preferences.load import load_preferences
from preferences.sets import DroppedRow, PreferenceSet, refuse
from preferences.sources import TEXT_COLUMNS, shorten
from preferences.swap import as_table
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATER = "rater"
"""Column of a preference data set that names who judged a pair."""
MODEL = "model"
"""Key of an answer that holds the fingerprint of the model whose question it answers."""


def check_raters(pairs: PreferenceSet, fewest: int, drop_bad: bool) -> PreferenceSet:
    """Pairs of which each names its rater, and no rater contradicts themselves or gave hardly a label.

    Args:
        pairs: with a column ``rater``; numbers count as names.
        fewest: labels that each rater must have.
        drop_bad: leave out what cannot be used, and list it, instead of stopping.

    Returns:
        The pairs; the column is text.

    Raises:
        UserError: if there is no such column, a row cannot be used, or none is left.
    """
    names = rater_names(pairs)
    table = as_table(pairs.rows)
    bad = _contradictions(pairs, names)
    bad |= {row: "rater is missing (null or empty)" for row, name in enumerate(names) if not name}
    left = Counter(name for row, name in enumerate(names) if row not in bad)
    bad |= {
        row: f"the rater has fewer than {fewest} labels (features.fewest_labels)"
        for row, name in enumerate(names)
        if row not in bad and left[name] < fewest
    }
    ids = list(pairs.rows["id"])
    dropped = [DroppedRow(f"pair {ids[row]}", bad[row], shorten(f"rater {names[row]}")) for row in sorted(bad)]
    if dropped and not drop_bad:
        raise refuse(pairs.source, dropped, len(pairs), pairs.rows.column_names)
    if len(dropped) == len(pairs):
        raise UserError(f"{pairs.source}: none of {len(pairs)} pairs can be used; first: {dropped[0].where}: {dropped[0].reason}")
    column = pa.array([name or "" for name in names], pa.large_string())
    table = table.set_column(table.column_names.index(RATER), RATER, column)
    table = table.filter(pa.array([row not in bad for row in range(len(names))]))
    return replace(pairs.with_table(table), dropped=(*pairs.dropped, *dropped))


def rater_names(pairs: PreferenceSet) -> list[str | None]:
    """Who judged each pair.

    Args:
        pairs: with a column ``rater``.

    Returns:
        A name each; None where there is none.

    Raises:
        UserError: if there is no such column, or it holds other than text or whole numbers.
    """
    if RATER not in pairs.rows.column_names:
        raise UserError(
            f"{pairs.source}: no column {RATER!r} that says who judged a pair; columns found: "
            f"{', '.join(pairs.rows.column_names)}. Add it, or train one reward model for all (python -m cluster reward)"
        )
    names: list[str | None] = []
    for value in pairs.rows[RATER]:
        if value is not None and not (isinstance(value, str | int) and not isinstance(value, bool)):
            raise UserError(f"{pairs.source}: the column {RATER!r} must hold names or whole numbers, got {shorten(value)}")
        name = None if value is None else str(value).strip()
        names.append(name or None)
    return names


def _contradictions(pairs: PreferenceSet, names: Sequence[str | None]) -> dict[int, str]:
    """Rows by number whose rater says the opposite in another row; all of them are named."""
    said: dict[tuple[str | None, str, str, str], list[int]] = defaultdict(list)
    texts = zip(names, *(pairs.rows[column] for column in TEXT_COLUMNS), strict=True)
    for row, (name, prompt, chosen, rejected) in enumerate(texts):
        said[name, prompt, chosen, rejected].append(row)
    reason = "the rater prefers each response of a pair to the other"
    return {
        row: reason
        for (name, prompt, chosen, rejected), rows in said.items()
        if (name, prompt, rejected, chosen) in said
        for row in rows
    }


@dataclass(frozen=True)
class Answers:
    """A person's answers.

    Args:
        pairs: columns prompt, chosen, rejected.
        models: fingerprints that answers carry; none for answers written by hand.
        without: answers that carry none.
    """

    pairs: PreferenceSet
    models: tuple[str, ...]
    without: int

    def check_model(self, fingerprint: str) -> None:
        """Refuse answers to another model's questions.

        Args:
            fingerprint: of the model that is to be fitted to them.

        Raises:
            UserError: naming the other.
        """
        others = [model for model in self.models if model != fingerprint]
        if others:
            raise UserError(
                f"{self.pairs.source} holds answers of the model {others[0][:12]}, got the model {fingerprint[:12]}: expected "
                f"one. Give the model that asked, or remove the key {MODEL!r} from the answers to fit them to this one"
            )


def read_answers(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Answers:
    """Answers as lines {"prompt", "chosen", "rejected", "model"}, the last optional.

    Args:
        path: a .jsonl file.
        tokenizer: whose chat template renders conversations; not needed for texts.

    Returns:
        At least one answer.

    Raises:
        UserError: naming file and line; also if the same pair is answered both ways.
    """
    pairs = load_preferences(DataConfig(preferences=str(path)), tokenizer, fewest=1)
    contrary = sorted(_contradictions(pairs, [None] * len(pairs)))
    if contrary:
        lines = ", ".join(pairs.rows["id"][row] for row in contrary[:6])
        raise UserError(
            f"{path} answers a pair both ways (answers {lines}): expected one answer to a pair. Remove the one that was not meant"
        )
    if MODEL not in pairs.rows.column_names:
        return Answers(pairs, (), len(pairs))
    found = Counter(pairs.rows[MODEL])
    odd = [value for value in found if value is not None and not isinstance(value, str)]
    if odd:
        raise UserError(f"{path}: the key {MODEL!r} must be a fingerprint as text, got {json.dumps(odd[0])[:80]}")
    return Answers(pairs, tuple(sorted(value for value in found if value is not None)), found[None])
