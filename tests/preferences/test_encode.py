"""One convention for ids; a text cannot smuggle in a special token."""

from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preferences.encode import encode_pairs, encode_prompt, encode_prompts, encode_response
from preferences.sets import PreferenceSet, PromptSet, prompt_id
from tokens.errors import UserError


def words(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, so that ids can be written down."""
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "<pad>": 3, "good": 4, "day": 5, "bad": 6}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>"} | ({"bos_token": "<bos>"} if bos else {})
    special |= {"eos_token": "<eos>"} if eos else {}
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    return made


def pairs(*rows: tuple[str, str, str], format_: str = "explicit") -> PreferenceSet:
    columns = {
        "id": [f"p{i}" for i in range(len(rows))],
        "prompt": [row[0] for row in rows],
        "chosen": [row[1] for row in rows],
        "rejected": [row[2] for row in rows],
        "domain": ["tea"] * len(rows),
    }
    return PreferenceSet(Dataset.from_dict(columns), "here", format_)  # type: ignore[arg-type]


def test_bos_comes_first_and_eos_last() -> None:
    assert encode_prompt(words(), "good day") == (1, 4, 5)
    assert encode_prompt(words(bos=False), "good day") == (4, 5)
    assert encode_response(words(), "bad day") == (6, 5, 2)
    with pytest.raises(UserError, match="no eos_token"):
        encode_response(words(eos=False), "bad day")
    with pytest.raises(UserError, match="no tokens"):
        encode_prompt(words(bos=False), " ")


def test_special_tokens_in_a_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "good<eos><|assistant|>day<pad>"
    ids = encode_response(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(range(5))  # SPECIAL in conftest.py
    assert tokenizer.decode(list(ids[:-1])) == text
    assert encode_prompt(tokenizer, text) == (tokenizer.bos_token_id, *ids[:-1])
    # and without the protection the same text does become special
    assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_rendered_prompt_keeps_its_marks_and_gets_no_second_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    user, answer = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|user|>", "<|assistant|>"))
    ids = encode_prompt(tokenizer, "<bos><|user|>hi<eos><|assistant|>", templated=True)
    assert ids[:2] == (tokenizer.bos_token_id, user)
    assert ids[-2:] == (tokenizer.eos_token_id, answer)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_cannot_keep_them_apart_is_refused() -> None:
    # splitting on white space leaves "<eos>" whole, and the vocabulary knows it
    with pytest.raises(UserError, match=r"'good <eos>' becomes the special token\(s\) <eos>"):
        encode_response(words(), "good <eos>")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_comes_back(backend: Tokenizer, text: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")  # type: ignore[no-untyped-call]
    response = encode_response(tokenizer, text)
    assert tokenizer.decode(list(response[:-1]), clean_up_tokenization_spaces=False) == text
    assert encode_prompt(tokenizer, text)[1:] == response[:-1]


def test_pairs_become_records() -> None:
    (pair,), dropped = encode_pairs(pairs(("good day", "good", "bad bad")), words(), 3, 3, drop=False)
    assert (pair.id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ("p0", (1, 4, 5), (4, 2), (6, 6, 2))
    assert pair.domain == "tea"
    assert dropped == ()


def test_what_is_too_long_stops_or_is_listed() -> None:
    data = pairs(
        ("good", "good", "bad"), ("good day day", "good", "bad"), ("good", "good", "bad bad bad"), ("good", "tea", "cup")
    )
    with pytest.raises(UserError) as caught:
        encode_pairs(data, words(), 3, 3, drop=False)
    for part in (
        "here",
        "3 of 4",
        "pair p1: prompt too long: 4 tokens, limit 3",
        "pair p2: response too long: 2 and 4",
        "p3",
        "drop_bad",
    ):
        assert part in str(caught.value)
    kept, dropped = encode_pairs(data, words(), 3, 3, drop=True)
    assert [pair.id for pair in kept] == ["p0"]
    assert [row.reason for row in dropped] == ["prompt too long", "response too long", "chosen and rejected have the same tokens"]
    with pytest.raises(UserError, match="no row is left of 4"):
        encode_pairs(data, words(), 1, 3, drop=True)


def test_exactly_the_limit_fits() -> None:
    kept, _ = encode_pairs(pairs(("good day", "good day", "bad day")), words(), 3, 3, drop=False)
    assert len(kept) == 1


def test_prompts_become_records() -> None:
    prompts = pairs(("good day", "a", "b"), ("bad", "a", "b"), ("good day", "c", "d")).prompts()
    encoded, _ = encode_prompts(prompts, words(), 3, drop=False)
    assert [(prompt.text, prompt.token_ids, prompt.domain) for prompt in encoded] == [
        ("good day", (1, 4, 5), "tea"),
        ("bad", (1, 6), "tea"),
    ]
    assert encoded[0].id == prompt_id("good day")
    with pytest.raises(UserError, match="prompt too long: 3 tokens, limit 2: 'good day'"):
        encode_prompts(prompts, words(), 2, drop=False)
    assert [prompt.text for prompt in encode_prompts(prompts, words(), 2, drop=True)[0]] == ["bad"]


def test_templated_sets_are_encoded_as_such(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "<|user|>hi<eos><|assistant|>"
    (pair,), _ = encode_pairs(pairs((text, "good", "bad"), format_="conversational"), tokenizer, 20, 20, drop=False)
    assert pair.prompt_ids == encode_prompt(tokenizer, text, templated=True)
    rows = Dataset.from_dict({"id": ["x"], "prompt": [text], "domain": [""]})
    (prompt,), _ = encode_prompts(PromptSet(rows, "here", templated=True), tokenizer, 20, drop=False)
    assert prompt.token_ids == pair.prompt_ids
