"""The data sets that the rest of the house reads: preference pairs and prompts, as text, checked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tokens.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

Format = Literal["explicit", "implicit", "conversational", "hh", "turns"]


@dataclass(frozen=True)
class DroppedRow:
    """A row that was left out.

    Args:
        where: its line or row number (or its id, once rows have one).
        reason: why, in words that can be counted.
        detail: what was found, shortened.
    """

    where: str
    reason: str
    detail: str = ""


def count_reasons(dropped: Iterable[DroppedRow]) -> dict[str, int]:
    """How many rows were left out for each reason, most frequent first."""
    return dict(Counter(row.reason for row in dropped).most_common())


def refuse(source: str, bad: Sequence[DroppedRow], num_rows: int, columns: Sequence[str]) -> UserError:
    """The error for rows that cannot be used: how many, why, the first ones, and what to do."""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in count_reasons(bad).items())
    first = "; ".join(f"{row.where}: {row.reason}{': ' if row.detail else ''}{row.detail}" for row in bad[:3])
    return UserError(
        f"{source}: {len(bad)} of {num_rows} rows cannot be used ({reasons}). First: {first}. "
        f"Columns found: {', '.join(columns)}. Correct the rows, or set data.drop_bad to true to leave them out and list them"
    )


def prompt_id(text: str) -> str:
    """A prompt's id: the first 12 hex digits of its SHA-1, the same in every data set."""
    return hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()[:12]


def place_of(prompt: str, seed: int) -> bytes:
    """Where a prompt stands in an order that goes by its text and the seed: the SHA-256 of both."""
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()


def held_out(prompts: Sequence[str], fraction: float, seed: int) -> frozenset[str]:
    """The prompts held out: those with the smallest SHA-256 of seed and text, so that the order of rows plays no part.

    Args:
        prompts: texts, repeated ones count once.
        fraction: share of the distinct prompts; above 0 at least one is held out.
        seed: another seed holds out other prompts.

    Raises:
        UserError: if nothing would be left on one of the sides.
    """
    if fraction == 0:
        return frozenset()
    distinct = sorted(set(prompts), key=lambda text: place_of(text, seed))
    count = max(1, round(fraction * len(distinct)))
    if count >= len(distinct):
        raise UserError(
            f"cannot hold out {fraction:g} of {len(distinct)} distinct prompt(s) and keep one to train on. "
            "Add prompts, or set data.validation_fraction to 0"
        )
    return frozenset(distinct[:count])


def _digest(rows: Dataset, columns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for batch in rows.select_columns(list(columns)).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            digest.update(json.dumps(values, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()


def _keep(rows: Dataset, keep: Iterable[bool]) -> Dataset:
    return rows.select([index for index, kept in enumerate(keep) if kept], keep_in_memory=True)


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in the order in which they were first seen.

    Args:
        rows: columns id (see ``prompt_id``), prompt, domain ("" without one), and whatever else the source had.
        source: where they came from.
        templated: True if the texts were rendered with a chat template, whose special tokens then count as such.
        dropped: rows that were left out.
    """

    rows: Dataset
    source: str
    templated: bool = False
    dropped: tuple[DroppedRow, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over prompt and domain of every row, in order; the file format plays no part."""
        return _digest(self.rows, ("prompt", "domain"))

    def split(self, validation_fraction: float, seed: int) -> tuple[PromptSet, PromptSet]:
        """Training and held-out prompts, by the same rule as ``PreferenceSet.split``."""
        prompts = list(self.rows["prompt"])
        out = held_out(prompts, validation_fraction, seed)
        train, validation = (_keep(self.rows, ((text in out) == side for text in prompts)) for side in (False, True))
        return replace(self, rows=train), replace(self, rows=validation, dropped=())


@dataclass(frozen=True)
class PreferenceSet:
    """Preference pairs as text.

    Args:
        rows: columns id (unique), prompt, chosen, rejected, domain ("" without one), and whatever else the source had.
        source: where they came from.
        format: the format they were read from.
        dropped: rows that were left out.
    """

    rows: Dataset
    source: str
    format: Format
    dropped: tuple[DroppedRow, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def templated(self) -> bool:
        """True if the prompts were rendered with a chat template, whose special tokens then count as such."""
        return self.format == "conversational"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over id, prompt, chosen, rejected and domain of every row, in order; the file format plays no part."""
        return self.digest(())

    def digest(self, others: Sequence[str]) -> str:
        """The same over further columns too, as far as they are there."""
        there = [name for name in others if name in self.rows.column_names]
        return _digest(self.rows, ("id", "prompt", "chosen", "rejected", "domain", *there))

    def split(self, validation_fraction: float, seed: int) -> tuple[PreferenceSet, PreferenceSet]:
        """Training and held-out pairs; the pairs of one prompt stay together.

        Args:
            validation_fraction: share of the distinct prompts; 0 gives an empty second set.
            seed: another seed holds out other prompts.

        Raises:
            UserError: if there are too few prompts to hold one out.
        """
        prompts = list(self.rows["prompt"])
        out = held_out(prompts, validation_fraction, seed)
        train, validation = (_keep(self.rows, ((text in out) == side for text in prompts)) for side in (False, True))
        return replace(self, rows=train), replace(self, rows=validation, dropped=())

    def with_table(self, table: Table) -> PreferenceSet:
        """The same set with other rows: an Arrow table that has the columns of ``rows``."""
        from datasets import Dataset

        return replace(self, rows=Dataset(table))

    def prompts(self) -> PromptSet:
        """The distinct prompts, in first-seen order; a prompt's domain is that of its first pair."""
        return PromptSet(distinct_prompts(self.rows.select_columns(["prompt", "domain"])), self.source, self.templated)


def with_equal_columns(first: PreferenceSet, second: PreferenceSet) -> tuple[PreferenceSet, PreferenceSet]:
    """Two sets that one file can hold: a column that one of them lacks is null there.

    Raises:
        UserError: if a column has types in the two that do not go together.
    """
    if first.rows.features == second.rows.features:
        return first, second
    import pyarrow as pa

    from preferences.swap import as_table

    tables = [as_table(pairs.rows) for pairs in (first, second)]
    try:
        schema = pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
        made = [
            pa.table(
                [
                    table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
                    for field in schema
                ],
                schema=schema,
            )
            for table in tables
        ]
    except pa.ArrowException as error:
        raise UserError(
            f"{first.source} and {second.source} have a column of one name and different types ({error}): give both one type, or "
            "leave the column out"
        ) from error
    return first.with_table(made[0]), second.with_table(made[1])


def distinct_prompts(rows: Dataset) -> Dataset:
    """The first row of every distinct ``prompt``, with ``id`` set to the prompt's own."""
    seen: set[str] = set()
    first = []
    for index, text in enumerate(rows["prompt"]):
        if text not in seen:
            seen.add(text)
            first.append(index)
    kept = rows.select(first, keep_in_memory=True)
    kept = kept.remove_columns([name for name in kept.column_names if name == "id"])
    return kept.add_column("id", [prompt_id(text) for text in kept["prompt"]])
