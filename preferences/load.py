"""Reads preference pairs and prompts into checked sets of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preferences.config import DataConfig
from preferences.formats import BadRowError, ChatTemplate, Template, column_kinds, detect_format, read_pair, read_prompt
from preferences.sets import DroppedRow, PreferenceSet, PromptSet, distinct_prompts, refuse
from preferences.sources import TEXT_COLUMNS, Source, open_source
from tokens.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table
    from transformers import PreTrainedTokenizerBase

BATCH = 1000
LONGEST_TEXT = 1_000_000
"""Characters. No model here reads as much, and a tokenizer may need minutes for it."""


def load_preferences(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None, fewest: int = 2) -> PreferenceSet:
    """The preference pairs that ``config.preferences`` names, as text.

    Args:
        config: the ``data`` section; ``preferences`` is a path or a hub name here (the sandbox writes files of its own).
        tokenizer: whose chat template renders conversational data; not needed for the other formats.
        fewest: pairs that there must be.

    Raises:
        UserError: naming file, line and columns.
    """
    source = open_source(config.preferences, config.split, config.allow_hub)
    format_ = detect_format(source)
    template = chat_template(source, tokenizer) if format_ == "conversational" else None

    def read(row: Mapping[str, Any]) -> dict[str, str]:
        texts = read_pair(row, format_, template)
        return {"prompt": texts.prompt, "chosen": texts.chosen, "rejected": texts.rejected}

    rows, dropped = _collect(source, TEXT_COLUMNS, read, config.max_pairs, config.drop_bad)
    if len(rows) < fewest:
        raise UserError(
            f"{source.name}: {len(rows)} usable preference pair(s), need at least {fewest}"
            + (f" ({len(dropped)} left out; first: {dropped[0].where}: {dropped[0].reason})" if dropped else "")
        )
    return PreferenceSet(rows, source.name, format_, dropped)


def load_validation(
    config: DataConfig, training: PreferenceSet, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreferenceSet, PreferenceSet]:
    """The held-out pairs that ``config.validation`` names, and the training pairs that are none of them.

    Args:
        config: the ``data`` section; ``validation`` is a path or a hub name here.
        training: the training pairs.
        tokenizer: as for ``load_preferences``.

    Returns:
        Training and held-out pairs. The ids of the second begin with "validation-", so that no two pairs share one.

    Raises:
        UserError: as ``load_preferences``; if one of the two is conversational and the other is not; or if a pair is in both, in
            either order, and ``drop_bad`` is False. With it such pairs are left out of the training pairs, and listed.
    """
    import pyarrow as pa
    from pyarrow import compute as pc

    from preferences.strength_files import text_key
    from preferences.swap import as_table

    assert config.validation is not None
    named = {"preferences": config.validation, "split": config.validation_split, "max_pairs": None, "validation": None}
    found = load_preferences(config.model_copy(update=named), tokenizer)
    if found.templated != training.templated:
        raise UserError(
            f"data.validation: {found.source} is {found.format}, {training.source} is {training.format}: give both as "
            "conversations, or neither"
        )
    table = as_table(found.rows)
    ids = pc.binary_join_element_wise(pa.scalar("validation", table["id"].type), table["id"], pa.scalar("-", table["id"].type))
    found = found.with_table(table.set_column(table.column_names.index("id"), "id", ids))
    held = set()
    for prompt, chosen, rejected in _texts(found):
        held |= {text_key(prompt, chosen, rejected), text_key(prompt, rejected, chosen)}
    both = [text_key(*texts) in held for texts in _texts(training)]
    if not any(both):
        return training, found
    bad = [
        DroppedRow(f"pair {id_}", f"stands in data.validation {config.validation} too")
        for id_, twice in zip(training.rows["id"], both, strict=True)
        if twice
    ]
    if not config.drop_bad:
        raise refuse(training.source, bad, len(training), training.rows.column_names)
    if len(bad) > len(training) - 2:
        raise UserError(
            f"{training.source}: {len(bad)} of {len(training)} pairs stand in data.validation {config.validation} too"
        )
    left = as_table(training.rows).filter(pa.array([not twice for twice in both]))
    return replace(training.with_table(left), dropped=(*training.dropped, *bad)), found


def _texts(pairs: PreferenceSet) -> Iterator[tuple[str, str, str]]:
    for batch in pairs.rows.select_columns(list(TEXT_COLUMNS)).iter(batch_size=BATCH):
        yield from zip(*(batch[column] for column in TEXT_COLUMNS), strict=True)


def load_prompts(
    source: str,
    split: str = "train",
    allow_hub: bool = False,
    drop_bad: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompts: int | None = None,
    template: Template | None = None,
) -> PromptSet:
    """A data set of prompts: a column ``prompt``, text or messages; repeated prompts count once.

    Args:
        source: path or hub name, as for preference pairs.
        split: split to read where the source has several.
        allow_hub: whether a name that is no local path may be fetched.
        drop_bad: leave out rows that cannot be used instead of stopping.
        tokenizer: whose chat template renders conversational data.
        max_prompts: read at most this many rows.
        template: renders conversational data instead of the tokenizer's.

    Raises:
        UserError: naming file, line and columns.
    """
    opened = open_source(source, split, allow_hub)
    kinds = column_kinds(opened, ("prompt",))
    if "prompt" not in kinds:
        raise UserError(f"{source}: no column 'prompt'; columns found: {', '.join(opened.rows.column_names)}; see docs/data.md")
    conversational = kinds["prompt"] == "messages"
    if conversational and template is None:
        template = chat_template(opened, tokenizer)

    def read(row: Mapping[str, Any]) -> dict[str, str]:
        return {"prompt": read_prompt(row["prompt"], template)}

    rows, dropped = _collect(opened, ("prompt",), read, max_prompts, drop_bad)
    if not len(rows):
        raise UserError(f"{source}: no usable prompt; first: {dropped[0].where}: {dropped[0].reason}")
    return PromptSet(distinct_prompts(rows), source, conversational, dropped)


def chat_template(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate:
    """The tokenizer's template, for conversational data.

    Args:
        source: of the data, for the message.
        tokenizer: whose template is used.

    Raises:
        UserError: if it has none.
    """
    if tokenizer is None or not tokenizer.chat_template:
        which = "no tokenizer was given" if tokenizer is None else f"the tokenizer {tokenizer.name_or_path!r} has none"
        raise UserError(
            f"{source.name}: the data is conversational, which needs a chat template, and {which}. "
            "Use an instruction-tuned model's tokenizer, set its chat_template, or turn the messages into text"
        )
    return ChatTemplate(tokenizer)


def _collect(
    source: Source,
    columns: tuple[str, ...],
    read: Callable[[Mapping[str, Any]], dict[str, str]],
    limit: int | None,
    drop_bad: bool,
) -> tuple[Dataset, tuple[DroppedRow, ...]]:
    """Read the rows batch by batch; other columns are carried along as they are."""
    import pyarrow as pa
    from datasets import Dataset

    given = source.rows.column_names
    named = [column for column in given if column in {*columns, "id", "domain"}]
    others = [column for column in given if column not in {*named, *TEXT_COLUMNS}]
    total = len(source.rows) if limit is None else min(limit, len(source.rows))
    ids: set[str] = set()
    bad: list[DroppedRow] = []
    tables = []
    arrow = source.rows.with_format("arrow")
    for start in range(0, total, BATCH):
        batch = arrow[start : min(start + BATCH, total)]
        records, kept = [], []
        for offset, row in enumerate(_values(batch.select(named), start, source)):
            try:
                id_, domain = _identify(row, start + offset, ids), _domain(row)
                texts = read({column: row[column] for column in columns if column in row})
                refuse_long(texts)
                records.append({"id": id_, **texts, "domain": domain})
            except BadRowError as error:
                bad.append(DroppedRow(source.where(start + offset), error.reason, error.detail))
                continue
            ids.add(id_)
            kept.append(offset)
        table = pa.table(
            {name: pa.array([record[name] for record in records], pa.large_string()) for name in ("id", *columns, "domain")}
        )
        for column, values in zip(others, batch.select(others).take(pa.array(kept, pa.int64())).columns, strict=True):
            table = table.append_column(column, values)
        tables.append(table)
    if bad and not drop_bad:
        raise refuse(source.name, bad, total, given)
    return Dataset(pa.concat_tables(tables)), tuple(bad)


def refuse_long(texts: Mapping[str, str]) -> None:
    """Leave out a row before a tokenizer sees it.

    Args:
        texts: of the row, by column.

    Raises:
        BadRowError: if one of them has more than ``LONGEST_TEXT`` characters.
    """
    for column, text in texts.items():
        if len(text) > LONGEST_TEXT:
            raise BadRowError(f"{column} has more than {LONGEST_TEXT:,} characters", text[:80])


def _values(table: Table, start: int, source: Source) -> list[dict[str, Any]]:
    """The rows of an Arrow table as Python values; ``start`` is the number of its first row."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source.name}: a text in rows {start + 1} to {start + len(table)} is not UTF-8 ({error.reason})"
        ) from error
    return rows


def _identify(row: Mapping[str, Any], index: int, taken: set[str]) -> str:
    """The row's own id, or its number counted from 1."""
    if "id" not in row:
        return str(index + 1)
    if row["id"] is None or not str(row["id"]).strip():
        raise BadRowError("id is missing (null or empty)")
    if str(row["id"]) in taken:
        raise BadRowError("the id was used before", row["id"])
    return str(row["id"])


def _domain(row: Mapping[str, Any]) -> str:
    if "domain" not in row or row["domain"] is None:
        return ""
    if not isinstance(row["domain"], str):
        raise BadRowError("domain is not text", row["domain"])
    return row["domain"]
