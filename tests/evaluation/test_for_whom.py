"""For whom a policy is better: each person by themselves."""

import math

import pytest

from evaluation.compare import mean_interval
from evaluation.for_whom import person_rows, who_gains

OURS = [[1.0, 0.0], [2.0, -1.0], [3.0, -2.5]]
THEIRS = [[0.0, 0.1], [0.5, 0.0], [2.2, -1.0]]


def test_everybody_has_a_paired_gain_and_minorities_stay_visible() -> None:
    nan = math.nan
    rows = person_rows(("ann", "bob"), OURS, THEIRS, [[1.0, nan], [1.0, nan], [4.0, nan]], [[0.0, nan], [0.5, nan], [2.0, nan]])
    assert [row.name for row in rows] == ["ann", "bob"] and rows[0].num_prompts == 3
    assert (rows[0].gain, rows[0].low, rows[0].high) == pytest.approx(mean_interval([1.0, 1.5, 0.8]))
    assert rows[1].score == pytest.approx(-3.5 / 3) and rows[1].gain == pytest.approx(-2.6 / 3)
    assert rows[0].gold_gain == pytest.approx(3.5 / 3) and rows[1].gold is rows[1].gold_high is None
    assert who_gains(rows).startswith("of 1 people, by the true reward of each: better than SFT for 0, worse for 0")


def test_without_a_truth_the_reward_model_speaks() -> None:
    rows = person_rows(("ann", "bob"), OURS, [[0.0, 1.0], [1.1, 0.1], [2.0, -1.6]], None, None)
    said = who_gains(rows)
    assert said.startswith("of 2 people, by the reward model of each: better than SFT for 1, worse for 1")
    assert said.endswith("worst off is bob with -1.00; it is what the policy was paid by, and flatters it")
    with pytest.raises(ValueError, match="got nobody"):
        who_gains([])


def test_who_is_written_for_is_asked_about_their_own_prompts() -> None:
    ours, theirs = [*OURS, [5.0, 4.0]], [*THEIRS, [0.0, 0.0]]
    rows = person_rows(
        ("ann", "bob", "cleo"),
        [[*row, 0.0] for row in ours],
        [[*row, 1.0] for row in theirs],
        None,
        None,
        ["ann", "bob", "ann", "bob"],
    )
    assert [(row.name, row.num_prompts) for row in rows] == [("ann", 2), ("bob", 2)], "nothing is written for cleo"
    assert rows[0].gain == pytest.approx((1.0 + 0.8) / 2) and rows[1].gain == pytest.approx((-1.0 + 4.0) / 2)


def test_tables_of_two_sizes_or_one_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 and 2"):
        person_rows(("ann", "bob"), OURS, THEIRS[:2], None, None)
    with pytest.raises(ValueError, match="at least two"):
        person_rows(("ann", "bob"), OURS[:1], THEIRS[:1], None, None)
