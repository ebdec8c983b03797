"""Texts to learn to write: prompt and completion, conversations, or plain text, in TRL's formats.

Letters: N texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preferences.encode import encode_prompt, encode_response
from preferences.formats import BadRowError, Template, column_kinds, plain_messages, read_prompt
from preferences.load import chat_template, refuse_long
from preferences.sets import DroppedRow, held_out, refuse
from preferences.sources import Source, open_source
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "completion", "messages", "text")
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and of its response with EOS."""


@dataclass(frozen=True)
class TextRow:
    """One text: its place in the source, the prompt ("" for plain text) and what is learnt."""

    where: str
    prompt: str
    response: str


@dataclass(frozen=True)
class TextSet:
    """Texts, checked.

    Args:
        rows: N of them, in the source's order.
        source: where they came from.
        templated: True if the prompts were rendered with a chat template.
        dropped: rows that were left out.
    """

    rows: tuple[TextRow, ...]
    source: str
    templated: bool
    dropped: tuple[DroppedRow, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over prompt and response of every row, in order; the file format plays no part."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.prompt, row.response], ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[TextSet, TextSet]:
        """Training and held-out texts; those of one prompt (or, without one, equal texts) stay together.

        Args:
            fraction: share of the distinct prompts that is held out; 0 gives an empty second set.
            seed: another seed holds out other prompts.

        Raises:
            UserError: if there are too few to hold one out.
        """
        keys = [row.prompt or row.response for row in self.rows]
        out = held_out(keys, fraction, seed)
        train, other = (
            tuple(row for row, key in zip(self.rows, keys, strict=True) if (key in out) == side) for side in (False, True)
        )
        return replace(self, rows=train), replace(self, rows=other, dropped=())


def load_texts(
    name: str, split: str, allow_hub: bool, drop_bad: bool, tokenizer: PreTrainedTokenizerBase | None = None
) -> TextSet:
    """A data set of texts, in one of TRL's formats: ``prompt`` and ``completion`` (text, or messages of which the completion is
    one of the assistant), ``messages`` (the last, the assistant's, is learnt), or ``text``.

    Args:
        name: path or hub name, as for preference pairs.
        split: split to read where the source has several.
        allow_hub: whether a name that is no local path may be fetched.
        drop_bad: leave out rows that cannot be used instead of stopping.
        tokenizer: whose chat template renders conversations.

    Raises:
        UserError: naming file, line and columns.
    """
    source = open_source(name, split, allow_hub)
    columns, conversational = _columns(source)
    template = chat_template(source, tokenizer) if conversational else None
    rows: list[TextRow] = []
    bad: list[DroppedRow] = []
    for index, row in enumerate(source.rows.select_columns(list(columns))):
        where = source.where(index)
        try:
            prompt, response = _read(row, template)
            refuse_long({"prompt": prompt, "response": response})
            rows.append(TextRow(where, prompt, response))
        except BadRowError as error:
            bad.append(DroppedRow(where, error.reason, error.detail))
    if bad and not drop_bad:
        raise refuse(name, bad, len(source.rows), source.rows.column_names)
    if not rows:
        first = f"; first: {bad[0].where}: {bad[0].reason}" if bad else ""
        raise UserError(f"{name}: no usable text of {len(source.rows)} rows{first}")
    return TextSet(tuple(rows), name, conversational, tuple(bad))


def _columns(source: Source) -> tuple[tuple[str, ...], bool]:
    """The columns that are read, and whether they hold messages."""
    kinds = column_kinds(source, COLUMNS)
    found = ", ".join(source.rows.column_names)
    for columns in (("prompt", "completion"), ("messages",), ("text",)):
        if not all(column in kinds for column in columns):
            continue
        ours = {column: kinds[column] for column in columns}
        expected = {"messages": "messages", "text": "text"}
        if len(set(ours.values())) > 1 or "turns" in ours.values() or any(ours[c] != expected[c] for c in ours if c in expected):
            listed = ", ".join(f"{column}: {kind}" for column, kind in ours.items())
            raise UserError(
                f"{source.name}: prompt and completion must both be text or both messages, messages a list of "
                f"{{role, content}}, text a text; got {listed}"
            )
        return columns, "messages" in ours.values()
    pairs = " (preference pairs go into data.preferences: their chosen responses are learnt)" if "chosen" in found else ""
    raise UserError(
        f"{source.name}: expected the columns prompt and completion, or messages, or text; columns found: {found}{pairs}; "
        "see docs/sft.md"
    )


def _read(row: Mapping[str, Any], template: Template | None) -> tuple[str, str]:
    """(prompt, response) of a row."""
    for column, value in row.items():
        if value is None or not value or (isinstance(value, str) and not value.strip()):
            raise BadRowError(f"{column} is missing (null)" if value is None else f"{column} is empty", value or "")
    if template is None:
        return ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
    whole = plain_messages(row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]])
    if "completion" in row and len(row["completion"]) != 1:
        raise BadRowError("completion must be one message of the assistant", [m["role"] for m in row["completion"]])
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise BadRowError("the messages must end with one of the assistant, and another before it", [m["role"] for m in whole])
    response = whole[-1]["content"]
    if not response.strip():
        raise BadRowError("the assistant's message is empty")
    template.check(response)
    return read_prompt(whole[:-1], template), response


def encode_texts(
    texts: TextSet, tokenizer: PreTrainedTokenizerBase, context: int | None, drop: bool
) -> tuple[tuple[Example, ...], tuple[DroppedRow, ...]]:
    """Every text as token ids.

    A plain text's prompt is BOS, or, where the tokenizer has none, its own first token: nothing comes before it to predict it by.

    Args:
        texts: the texts.
        tokenizer: the model's.
        context: most tokens of prompt and response together, EOS included; None = any number.
        drop: leave out texts that do not fit, and list them, instead of stopping.

    Returns:
        The examples that fit, in order, and the rows that were left out.

    Raises:
        UserError: if a text does not fit and ``drop`` is False, or if none fits.
    """
    fitting: list[Example] = []
    bad: list[DroppedRow] = []
    for row in texts.rows:
        prompt, response = _encode(row, tokenizer, texts.templated)
        if context is not None and len(prompt) + len(response) > context:
            detail = f"{len(prompt)} + {len(response)} tokens, the model's context is {context}"
            bad.append(DroppedRow(row.where, "longer than the context", detail))
        elif not prompt or not response:
            bad.append(DroppedRow(row.where, "too short", "a text needs two tokens"))
        else:
            fitting.append((prompt, response))
    columns = ("prompt", "response")
    if texts.rows and ((bad and not drop) or not fitting):
        raise refuse(texts.source, bad, len(texts.rows), columns)
    return tuple(fitting), tuple(bad)


def _encode(row: TextRow, tokenizer: PreTrainedTokenizerBase, templated: bool) -> Example:
    response = encode_response(tokenizer, row.response)
    if row.prompt:
        return encode_prompt(tokenizer, row.prompt, templated), response
    if tokenizer.bos_token_id is not None:
        return (tokenizer.bos_token_id,), response
    return response[:1], response[1:]


def fingerprint(*examples: Sequence[Example]) -> str:
    """SHA-256 of encoded texts: a model that is there was made of the same.

    Args:
        examples: training and held-out examples.
    """
    digest = hashlib.sha256()
    for each in examples:
        for prompt, response in each:
            digest.update(json.dumps([prompt, response]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
