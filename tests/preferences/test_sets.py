"""Splitting by prompt."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.sets import PreferenceSet, held_out, with_equal_columns
from tests.preferences.strengths import preference_set
from tokens.errors import UserError


def make(prompts: list[str]) -> PreferenceSet:
    rows = {
        "id": [str(i) for i in range(len(prompts))],
        "prompt": prompts,
        "chosen": ["a"] * len(prompts),
        "rejected": ["b"] * len(prompts),
        "domain": [""] * len(prompts),
    }
    return PreferenceSet(Dataset.from_dict(rows), "here", "explicit")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.floats(0.01, 0.8), st.integers(0, 3))
def test_a_split_never_shares_a_prompt(prompts: list[str], fraction: float, seed: int) -> None:
    pairs = make(prompts)
    if max(1, round(fraction * len(set(prompts)))) >= len(set(prompts)):
        with pytest.raises(UserError, match="cannot hold out"):
            pairs.split(fraction, seed)
        return
    train, validation = pairs.split(fraction, seed)
    assert not set(train.rows["prompt"]) & set(validation.rows["prompt"])
    assert sorted([*train.rows["id"], *validation.rows["id"]]) == sorted(pairs.rows["id"])
    assert len(set(validation.rows["prompt"])) == max(1, round(fraction * len(set(prompts))))
    train_prompts, validation_prompts = pairs.prompts().split(fraction, seed)
    assert set(train_prompts.rows["prompt"]) == set(train.rows["prompt"])
    assert set(validation_prompts.rows["prompt"]) == set(validation.rows["prompt"])


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    prompts = [str(i) for i in range(100)]
    first = held_out(prompts, 0.2, seed=0)
    assert len(first) == 20
    assert held_out(prompts[::-1], 0.2, seed=0) == first
    assert held_out(prompts, 0.2, seed=1) != first


def test_nothing_is_held_out_at_zero() -> None:
    train, validation = make(["a", "b", "a"]).split(0.0, 0)
    assert len(train) == 3
    assert len(validation) == 0
    assert train.fingerprint == make(["a", "b", "a"]).fingerprint


def test_prompts_are_distinct_in_first_seen_order() -> None:
    prompts = make(["b", "a", "b", "c"]).prompts()
    assert list(prompts.rows["prompt"]) == ["b", "a", "c"]
    assert len(set(prompts.rows["id"])) == 3


def test_two_sets_that_one_file_can_hold() -> None:
    first = preference_set(2, {"label": [1, 0], "score": [1, 2]})
    second = preference_set(1, {"score": [0.5], "note": ["hm"]})
    one, two = with_equal_columns(first, second)
    assert one.rows.features == two.rows.features
    assert list(one.rows["label"]) == [1, 0] and list(two.rows["label"]) == [None]
    assert list(one.rows["score"]) == [1.0, 2.0] and list(two.rows["note"]) == ["hm"] and list(one.rows["note"]) == [None] * 2
    assert one.fingerprint == first.fingerprint
    assert with_equal_columns(first, first) == (first, first)
    with pytest.raises(UserError, match="a column of one name and different types"):
        with_equal_columns(first, preference_set(1, {"score": ["high"]}))


def test_a_digest_over_further_columns() -> None:
    plain, labelled = preference_set(2), preference_set(2, {"label": [1, 0]})
    assert plain.digest(("label",)) == plain.fingerprint == labelled.fingerprint
    assert labelled.digest(("label",)) not in (plain.fingerprint, preference_set(2, {"label": [1, 1]}).digest(("label",)))
