"""The second labeller's column makes three validation sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.config import DataConfig
from preferences.labels import combine, has_labels, labels_of, refuse_other_labels, validation_sets, write_table
from preferences.load import load_preferences
from preferences.strength import write_strengths
from preferences.swap import as_table
from tests.preferences.strengths import preference_set
from tokens.errors import UserError


def test_three_sets() -> None:
    pairs = preference_set(
        4, {"label": [1, 0, -1, 1], "gold_chosen": [1.0, 2.0, 3.0, 4.0], "gold_rejected": [5.0, 6.0, 7.0, 8.0]}
    )
    sets = validation_sets(pairs)
    assert list(sets) == ["original", "relabelled", "agreement"]
    assert sets["original"].fingerprint == pairs.fingerprint
    relabelled = list(sets["relabelled"].rows)
    assert [row["id"] for row in relabelled] == ["a0", "a1", "a3"]
    assert [row["chosen"] for row in relabelled] == ["good 0", "bad 1", "good 3"]
    assert [row["rejected"] for row in relabelled] == ["bad 0", "good 1", "bad 3"]
    assert [row["gold_chosen"] for row in relabelled] == [1.0, 6.0, 4.0]
    assert [row["label"] for row in relabelled] == [1, 1, 1]  # chosen is now what the second labeller prefers
    assert list(sets["agreement"].rows["id"]) == ["a0", "a3"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([1, 0, -1]), min_size=1, max_size=12))
def test_no_pair_is_lost_or_made_up(labels: list[int]) -> None:
    sets = validation_sets(preference_set(len(labels), {"label": labels}))
    assert len(sets["original"]) == len(labels)
    assert len(sets["relabelled"]) == len(labels) - labels.count(-1)
    assert len(sets["agreement"]) == labels.count(1)
    swapped = [str(text).startswith("bad") for text in sets["relabelled"].rows["chosen"]]
    assert swapped == [label == 0 for label in labels if label != -1]


def test_the_public_column_counts_where_ours_is_missing() -> None:
    pairs = preference_set(3, {"GPT4 label": [1, None, 0]})
    assert has_labels(pairs)
    assert labels_of(as_table(pairs.rows), "here").tolist() == [1, -1, 0]
    both = preference_set(2, {"GPT4 label": [1, 1], "label": [0, -1]})
    assert labels_of(as_table(both.rows), "here").tolist() == [0, -1]
    assert not has_labels(preference_set(2))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "no column 'label' and no column 'GPT4 label'; columns found: id, prompt.*cluster relabel"),
        ({"label": [1, 2]}, r"column 'label' must hold 1 \(chosen\), 0 \(rejected\) or -1 \(no label\); row 2 has 2"),
        ({"label": ["A", "B"]}, "must hold the numbers 1, 0 and -1, got"),
        ({"label": [0.5, 1.0]}, "must hold the numbers 1, 0 and -1, got double"),
    ],
)
def test_bad_labels(extra: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validation_sets(preference_set(2, extra))


@pytest.mark.parametrize(
    ("forward", "backward", "label"), [(1, 1, 1), (0, 0, 0), (1, 0, -1), (0, 1, -1), (-1, 1, -1), (0, -1, -1), (-1, -1, -1)]
)
def test_both_orders_must_agree(forward: int, backward: int, label: int) -> None:
    assert combine(forward, backward) == label


def test_sets_are_written_in_one_step_and_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = preference_set(3, {"label": [1, 0, 1]})
    path = tmp_path / "relabelled.parquet"
    write_table(as_table(validation_sets(pairs)["relabelled"].rows), path)
    assert load_preferences(DataConfig(preferences=str(path))).rows["chosen"][1] == "bad 1"
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_table(pa.table({"a": [1]}), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"label": ["good", "bad"]}, "column 'label' must hold the numbers 1, 0 and -1, got string"),
        ({"label": [1, 7]}, r"column 'label' must hold 1 .*; row 2 has 7"),
        ({"label": [1.0, 0.5]}, "column 'label' must hold the numbers 1, 0 and -1, got double"),
        ({"label": [1, 0], "GPT4 label": [3, 0]}, r"column 'GPT4 label' must hold 1 .*; row 1 has 3"),
    ],
)
def test_a_label_of_another_meaning_is_refused_with_what_to_do(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    pairs = preference_set(2, extra)
    with pytest.raises(UserError, match=message + ".*rename or remove the column"):
        refuse_other_labels(pairs)
    if "GPT4 label" not in extra:
        with pytest.raises(UserError, match=message):
            write_strengths(
                tmp_path,
                0,
                as_table(pairs.rows),
                np.ones((2, 1)),
                np.zeros((2, 1)),
                split="train",
                source="here",
                fingerprint=None,
            )
        assert not list(tmp_path.iterdir())


def test_labels_of_a_second_labeller_pass() -> None:
    refuse_other_labels(preference_set(2))
    refuse_other_labels(preference_set(3, {"label": [1, None, -1], "GPT4 label": [0, 1, 1]}))
    refuse_other_labels(preference_set(2, {"label": [None, None]}))
