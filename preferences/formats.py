"""From a row of any accepted format to (prompt, chosen, rejected) as plain text.

Formats are TRL's (explicit prompt, implicit prompt, conversational with either), the transcripts of HH-RLHF, and the lists of
turns of the public preference-strength data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from preferences.sets import Format
from preferences.sources import TEXT_COLUMNS, Source, shorten
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Messages = list[dict[str, str]]


class BadRowError(Exception):
    """A row that cannot be used; ``reason`` is counted, ``detail`` is shown."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = "" if detail == "" else shorten(detail)


@dataclass(frozen=True)
class Texts:
    """One pair as text."""

    prompt: str
    chosen: str
    rejected: str


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every token that the tokenizer treats as special, by id: those with a role (EOS ...) and those only marked as such."""
    marked = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


class Template(Protocol):
    """Renders messages as a text."""

    def render(self, messages: Messages) -> str:
        """The conversation so far, up to where the assistant's answer starts."""

    def check(self, text: str) -> None:
        """Refuse a text that could pass for the template's own markup."""


class PlainTemplate:
    """Messages as "role: content", for a reader who sees text and no markup."""

    def render(self, messages: Messages) -> str:
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def check(self, text: str) -> None:
        """Nothing is markup here."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders messages with a tokenizer's chat template, through TRL.

    Args:
        tokenizer: the tokenizer whose template is used.
    """

    tokenizer: PreTrainedTokenizerBase

    def render(self, messages: Messages) -> str:
        """The conversation so far, up to where the assistant's answer starts.

        Raises:
            BadRowError: if a text holds one of the tokenizer's special tokens, or the template refuses the messages.
        """
        from jinja2 import TemplateError
        from trl import apply_chat_template

        for message in messages:
            self.check(message["content"])
        try:
            return str(apply_chat_template({"prompt": messages}, self.tokenizer)["prompt"])
        except (TemplateError, ValueError) as error:
            raise BadRowError("the chat template refuses the messages", str(error)) from error

    def check(self, text: str) -> None:
        """Refuse a text that could pass for the template's own markup."""
        for token in special_tokens(self.tokenizer).values():
            if token in text:
                raise BadRowError(f"a message holds the special token {token!a}", text)


def column_kinds(source: Source, wanted: tuple[str, ...]) -> dict[str, str]:
    """For each text column that is there, "text", "messages" or (not for prompts) "turns".

    Raises:
        UserError: if a column holds something else.
    """
    import pyarrow as pa

    def is_text(type_: pa.DataType) -> bool:
        return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))

    def is_messages(type_: pa.DataType) -> bool:
        if not (pa.types.is_list(type_) or pa.types.is_large_list(type_)) or not pa.types.is_struct(type_.value_type):
            return False
        fields = {field.name: field.type for field in type_.value_type}
        return {"role", "content"} <= fields.keys() and is_text(fields["role"]) and is_text(fields["content"])

    def is_turns(type_: pa.DataType) -> bool:
        return bool((pa.types.is_list(type_) or pa.types.is_large_list(type_)) and is_text(type_.value_type))

    kinds = {}
    for field in source.rows.data.schema:
        if field.name not in wanted:
            continue
        if is_text(field.type) or pa.types.is_null(field.type):
            kinds[field.name] = "text"
        elif is_messages(field.type):
            kinds[field.name] = "messages"
        elif field.name != "prompt" and is_turns(field.type):
            kinds[field.name] = "turns"
        else:
            turns = "" if field.name == "prompt" else ", or a list of turns"
            raise UserError(
                f"{source.name}: column {field.name!r} must be text or a list of {{role, content}} messages{turns}, "
                f"got {field.type}. Columns found: {', '.join(source.rows.column_names)}"
            )
    return kinds


def detect_format(source: Source) -> Format:
    """The format of a preference data set, from its columns and its first usable row.

    Raises:
        UserError: if ``chosen`` or ``rejected`` is missing or of another kind than the other.
    """
    kinds = column_kinds(source, TEXT_COLUMNS)
    found = ", ".join(source.rows.column_names)
    missing = [column for column in ("chosen", "rejected") if column not in kinds]
    if missing:
        raise UserError(
            f"{source.name}: no column {' and no column '.join(map(repr, missing))}; columns found: {found}. "
            "Expected prompt, chosen, rejected (text or messages), or chosen and rejected with the prompt in both; docs/data.md"
        )
    if kinds["chosen"] != kinds["rejected"] or ("prompt" in kinds and kinds["prompt"] == "messages" != kinds["chosen"]):
        listed = ", ".join(f"{column}: {kind}" for column, kind in kinds.items())
        raise UserError(f"{source.name}: text, messages and turns are mixed ({listed}); use one of them in all columns")
    if kinds["chosen"] == "messages":
        return "conversational"
    if kinds["chosen"] == "turns":
        if "prompt" in kinds:
            raise UserError(
                f"{source.name}: chosen and rejected are lists of turns, which hold the prompt; remove the column 'prompt'"
            )
        return "turns"
    if "prompt" in kinds:
        return "explicit"
    for chosen, rejected in zip(source.rows["chosen"], source.rows["rejected"], strict=True):
        if chosen and rejected:
            both = chosen.startswith(HUMAN) and rejected.startswith(HUMAN) and ASSISTANT in chosen and ASSISTANT in rejected
            return "hh" if both else "implicit"
    return "implicit"


def read_pair(row: Mapping[str, Any], format_: Format, template: Template | None) -> Texts:
    """One row as text.

    Args:
        row: the row's text columns.
        format_: see ``detect_format``.
        template: needed when ``format_`` is conversational.

    Raises:
        BadRowError: if the row cannot be used.
    """
    for column, value in row.items():
        if value is None:
            raise BadRowError(f"{column} is missing (null)")
        if not value or (isinstance(value, str) and not value.strip()):
            raise BadRowError(f"{column} is empty", value)
    if row["chosen"] == row["rejected"]:
        raise BadRowError("chosen equals rejected", row["chosen"])
    if format_ == "conversational":
        assert template is not None
        texts = _read_messages(row, template)
    elif format_ == "hh":
        texts = _read_transcript(row["chosen"], row["rejected"])
    elif format_ == "turns":
        texts = _read_turns(row["chosen"], row["rejected"])
    elif format_ == "implicit":
        from trl import extract_prompt

        if row["chosen"][0] != row["rejected"][0]:
            raise BadRowError("chosen and rejected do not start with the same prompt", row["chosen"])
        parts = extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})
        texts = Texts(str(parts["prompt"]), str(parts["chosen"]), str(parts["rejected"]))
    else:
        texts = Texts(row["prompt"], row["chosen"], row["rejected"])
    for column, text in (("prompt", texts.prompt), ("chosen", texts.chosen), ("rejected", texts.rejected)):
        if not text.strip():
            raise BadRowError(f"{column} is empty", texts.chosen if column == "prompt" else texts.prompt)
    if texts.chosen == texts.rejected:
        raise BadRowError("chosen equals rejected", texts.chosen)
    return texts


def _read_transcript(chosen: str, rejected: str) -> Texts:
    """Cut both at the last turn of the assistant; what stands before must be the same."""
    for text in (chosen, rejected):
        if not text.startswith(HUMAN) or ASSISTANT not in text:
            raise BadRowError("not a transcript of Human and Assistant turns as the rows above", text)
    prompt, _, good = chosen.rpartition(ASSISTANT)
    other, _, bad = rejected.rpartition(ASSISTANT)
    if prompt != other:
        raise BadRowError("the prompts of chosen and rejected differ", prompt[-80:])
    for name, text in (("chosen", good), ("rejected", bad)):
        if HUMAN in text:
            raise BadRowError(f"{name} ends with a turn of the human", text)
    return Texts(prompt + ASSISTANT, good, bad)


def _read_turns(chosen: list[str | None], rejected: list[str | None]) -> Texts:
    """Turns as the transcript that HH-RLHF would have of them: the last is the response, before it human and assistant alternate.

    Where every turn says itself who speaks ("Human: ..."), that is believed.
    """
    good, bad = ([turn for turn in turns if turn is not None] for turns in (chosen, rejected))
    if len(good) < len(chosen) or len(bad) < len(rejected):
        raise BadRowError("a turn is missing (null)")
    if good[:-1] != bad[:-1]:
        raise BadRowError("the prompts of chosen and rejected differ", good[-2] if len(good) > 1 else "")
    marks = [next((mark for mark in (HUMAN, ASSISTANT) if turn.lstrip().startswith(mark.strip())), None) for turn in good[:-1]]
    if None in marks:
        marks = [(HUMAN, ASSISTANT)[(len(good) - index) % 2] for index in range(len(good) - 1)]
        said = good[:-1]
    else:
        said = [turn.lstrip()[len(str(mark).strip()) :] for mark, turn in zip(marks, good[:-1], strict=True)]
    prompt = "".join(f"{mark}{_spaced(turn)}" for mark, turn in zip(marks, said, strict=True)) + ASSISTANT
    answers = [turn.removeprefix(ASSISTANT).removeprefix(ASSISTANT.strip()) for turn in (good[-1], bad[-1])]
    return Texts(prompt if said else "", *(_spaced(answer) for answer in answers))


def _spaced(turn: str) -> str:
    return turn if turn[:1].isspace() else f" {turn}"


def _read_messages(row: Mapping[str, Any], template: Template) -> Texts:
    """Prompt messages through the template; the responses are what one assistant message each says."""
    from trl import maybe_extract_prompt

    plain: dict[str, Any] = {column: value if isinstance(value, str) else plain_messages(value) for column, value in row.items()}
    parts = maybe_extract_prompt(plain)
    if not parts["prompt"]:
        raise BadRowError("chosen and rejected do not start with the same messages", plain["chosen"][0]["content"])
    responses = {}
    for column in ("chosen", "rejected"):
        messages = parts[column]
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = [message["role"] for message in messages]
            raise BadRowError(f"{column} must be the prompt and then one message of the assistant", roles)
        template.check(messages[0]["content"])
        responses[column] = messages[0]["content"]
    return Texts(template.render(parts["prompt"]), responses["chosen"], responses["rejected"])


def read_prompt(value: Any, template: Template | None) -> str:
    """A prompt, text or messages, as text.

    Raises:
        BadRowError: if it cannot be used.
    """
    if value is None:
        raise BadRowError("prompt is missing (null)")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadRowError("prompt is empty", value)
    if isinstance(value, str):
        return value
    assert template is not None
    return template.render(plain_messages(value))


def plain_messages(messages: list[dict[str, Any]]) -> Messages:
    """Role and content alone: other fields (of Arrow's union of all rows) mean nothing here."""
    if any(message is None or message["role"] is None or message["content"] is None for message in messages):
        raise BadRowError("a message without role or content", messages)
    return [{"role": message["role"], "content": message["content"]} for message in messages]
