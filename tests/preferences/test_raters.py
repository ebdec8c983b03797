"""Pairs with raters, and a person's answers: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preferences.config import DataConfig
from preferences.load import load_preferences
from preferences.raters import RATER, check_raters, read_answers
from preferences.sets import PreferenceSet
from tokens.errors import UserError

FINGERPRINT = "ab" * 32


def rows(**changed: Any) -> list[dict[str, Any]]:
    """Six labels of two raters; the third is changed."""
    found: list[dict[str, Any]] = [
        {"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}", "rater": "ann" if i % 2 else "bob"} for i in range(6)
    ]
    found[2] |= changed
    return found


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def loaded(folder: Path, lines: list[dict[str, Any]]) -> PreferenceSet:
    return load_preferences(DataConfig(preferences=str(written(folder, lines))))


def test_raters_are_names_or_numbers(tmp_path: Path) -> None:
    assert list(check_raters(loaded(tmp_path, rows()), 2, False).rows[RATER]) == ["bob", "ann"] * 3
    numbered = [row | {"rater": i % 2} for i, row in enumerate(rows())]
    assert list(check_raters(loaded(tmp_path, numbered), 2, False).rows[RATER]) == ["0", "1"] * 3


def test_a_rater_with_one_label_is_refused_or_left_out(tmp_path: Path) -> None:
    pairs = loaded(tmp_path, rows(rater="cy"))
    with pytest.raises(UserError, match=r"1 of 6 rows .*fewer than 2 labels \(features.fewest_labels\).*rater cy.*drop_bad"):
        check_raters(pairs, 2, False)
    left = check_raters(pairs, 2, True)
    assert len(left) == 5 and set(left.rows[RATER]) == {"ann", "bob"} and [row.where for row in left.dropped] == ["pair 3"]
    assert len(check_raters(pairs, 1, False)) == 6


def test_contradictory_labels_are_refused_or_left_out_both(tmp_path: Path) -> None:
    both = rows(prompt="p0", chosen="no 0", rejected="yes 0")  # bob, as the first
    with pytest.raises(UserError, match=r"2 of 6 rows .*prefers each response of a pair to the other.*pair 1"):
        check_raters(loaded(tmp_path, both), 1, False)
    left = check_raters(loaded(tmp_path, both), 1, True)
    assert [row.where for row in left.dropped] == ["pair 1", "pair 3"] and len(left) == 4
    thrice = [*both, both[0]]
    assert [row.where for row in check_raters(loaded(tmp_path, thrice), 1, True).dropped] == ["pair 1", "pair 3", "pair 7"]
    other = rows(prompt="p1", chosen="no 1", rejected="yes 1")  # ann says the first, bob the second
    assert len(check_raters(loaded(tmp_path, other), 2, False)) == 6


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [({"rater": None}, "rater is missing"), ({"rater": " "}, "rater is missing")],
)
def test_a_row_without_a_rater(tmp_path: Path, changed: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        check_raters(loaded(tmp_path, rows(**changed)), 1, False)


def test_bad_columns(tmp_path: Path) -> None:
    bare = [{key: value for key, value in row.items() if key != "rater"} for row in rows()]
    with pytest.raises(UserError, match=r"no column 'rater' that says who judged a pair; columns found: .*cluster reward"):
        check_raters(loaded(tmp_path, bare), 1, False)
    with pytest.raises(UserError, match=r"must hold names or whole numbers, got '0.5'"):
        check_raters(loaded(tmp_path, [row | {"rater": 0.5} for row in rows()]), 1, False)
    with pytest.raises(UserError, match="none of 6 pairs can be used"):
        check_raters(loaded(tmp_path, rows()), 9, True)


def test_answers_and_the_model_that_asked(tmp_path: Path) -> None:
    path = written(tmp_path, rows(model=FINGERPRINT))
    answers = read_answers(path)
    assert len(answers.pairs) == 6 and answers.models == (FINGERPRINT,) and answers.without == 5
    answers.check_model(FINGERPRINT)
    with pytest.raises(UserError, match=r"answers of the model abababababab, got the model cdcdcdcdcdcd.*remove the key 'model'"):
        answers.check_model("cd" * 32)
    by_hand = read_answers(written(tmp_path, rows()))
    assert by_hand.models == () and by_hand.without == 6
    by_hand.check_model(FINGERPRINT)


def test_bad_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answers a pair both ways \(answers 1, 3\).*Remove the one"):
        read_answers(written(tmp_path, rows(prompt="p0", chosen="no 0", rejected="yes 0")))
    with pytest.raises(UserError, match="must be a fingerprint as text, got 7"):
        read_answers(written(tmp_path, [row | {"model": 7} for row in rows()]))
    assert len(read_answers(written(tmp_path, rows()[:1])).pairs) == 1, "one is enough to go on from"
    with pytest.raises(UserError, match="chosen equals rejected"):
        read_answers(written(tmp_path, rows(chosen="no 2")))
