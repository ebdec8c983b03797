"""Texts of every accepted format, as ids, split and fingerprinted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from preferences.encode import encode_prompt, encode_response
from preferences.texts import encode_texts, fingerprint, load_texts
from tests.preferences.test_encode import words
from tokens.errors import UserError


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompt_and_completion_are_cut_where_the_columns_are(tmp_path: Path) -> None:
    name = write(
        tmp_path / "t.jsonl", {"prompt": "good", "completion": "day day", "id": 7}, {"prompt": "bad", "completion": "day"}
    )
    texts = load_texts(name, "train", False, False)
    assert [(row.where, row.prompt, row.response) for row in texts.rows] == [
        ("line 1", "good", "day day"), ("line 2", "bad", "day"),
    ]  # fmt: skip
    assert encode_texts(texts, words(), 5, False) == ((((1, 4), (5, 5, 2)), ((1, 6), (5, 2))), ())


def test_plain_text_follows_bos_or_its_own_first_token(tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path / "t.jsonl", {"text": "good day"}), "train", False, False)
    assert encode_texts(texts, words(), 9, False)[0] == (((1,), (4, 5, 2)),)
    assert encode_texts(texts, words(bos=False), 9, False)[0] == (((4,), (5, 2)),)


@pytest.mark.parametrize("columns", ["messages", "prompt and completion"])
def test_conversations_go_through_the_chat_template(columns: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    asked, answer = [said("system", "be kind"), said("user", "good day")], said("assistant", "day")
    row = {"messages": [*asked, answer]} if columns == "messages" else {"prompt": asked, "completion": [answer]}
    texts = load_texts(write(tmp_path / "t.jsonl", row), "train", False, False, tokenizer)
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert (texts.templated, texts.rows[0].prompt, texts.rows[0].response) == (True, rendered, "day")
    (example,), _ = encode_texts(texts, tokenizer, 999, False)
    assert example == (encode_prompt(tokenizer, rendered, True), encode_response(tokenizer, "day"))


BAD = {
    "ends with the user": ({"messages": [said("assistant", "a"), said("user", "b")]}, "must end with one of the assistant"),
    "nothing asked": ({"messages": [said("assistant", "a")]}, "another before it"),
    "two answers": (
        {"prompt": [said("user", "a")], "completion": [said("assistant", "b"), said("assistant", "c")]}, "one message",
    ),
    "an empty answer": ({"messages": [said("user", "a"), said("assistant", " ")]}, "message is empty"),
    "markup in the answer": ({"messages": [said("user", "a"), said("assistant", "b<eos>")]}, "special token"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_refused_or_listed(
    row: dict[str, object], reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked, answer = [said("user", "good")], said("assistant", "day")
    good = {"messages": [*asked, answer]} if "messages" in row else {"prompt": asked, "completion": [answer]}
    name = write(tmp_path / "t.jsonl", good, row)
    with pytest.raises(UserError, match="line 2") as error:
        load_texts(name, "train", False, False, tokenizer)
    assert reason in str(error.value)
    left = load_texts(name, "train", False, True, tokenizer)
    assert len(left.rows) == 1 and reason in left.dropped[0].reason


def test_texts_of_one_prompt_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(40)]
    texts = load_texts(write(tmp_path / "t.jsonl", *rows), "train", False, False)
    train, held_out = texts.split(0.25, 3)
    assert (len(train.rows), len(held_out.rows)) == (30, 10)
    assert not {row.prompt for row in train.rows} & {row.prompt for row in held_out.rows}
    assert texts.split(0.25, 3) == (train, held_out) != texts.split(0.25, 4)


def test_the_fingerprint_knows_sides_and_order() -> None:
    one, other = ((1, 2), (3,)), ((1,), (2, 3))
    digests = {fingerprint(*sets) for sets in (([one], []), ([other], []), ([], [one]), ([one, other], []), ([other, one], []))}
    assert len(digests) == 5 and fingerprint([one], []) in digests


def test_what_is_too_long_is_listed(tmp_path: Path) -> None:
    name = write(tmp_path / "t.jsonl", {"text": "good"}, {"text": "good day good day"})
    texts = load_texts(name, "train", False, False)
    fitting, dropped = encode_texts(texts, words(), 4, True)
    assert fitting == (((1,), (4, 2)),) and dropped[0].detail == "1 + 5 tokens, the model's context is 4"
    with pytest.raises(UserError, match="1 of 2 rows"):
        encode_texts(texts, words(), 4, False)
