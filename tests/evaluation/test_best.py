"""Which round is the best, and when a run ends by itself."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.best import OUT, Best, best_of, rounds_waited, why_stopped
from evaluation.config import EvaluationConfig, Judge


def ledger(*golds: float, sft: float = 1.0, judge: str = "gold") -> dict[str, Any]:
    name = {"gold": "gold", "held_out": "held_out", "ensemble": "ensemble_mean"}[judge]
    entries = [{"round": i, "evaluation": {name: gold, "judge": judge}} for i, gold in enumerate(golds)]
    return {"start": {"evaluation": {name: sft, "judge": judge}}, "rounds": entries}


def of(*gains: float, judge: Judge = "gold") -> Best:
    return Best(judge, gains, None)


@pytest.mark.parametrize("judge", ["gold", "held_out", "ensemble"])
def test_the_best_round_is_the_highest_over_sft_and_not_the_last(judge: str) -> None:
    best = best_of(ledger(1.5, 2.25, 2.0, judge=judge))
    assert (best.round, best.gain, best.gains) == (1, 1.25, (0.5, 1.25, 1.0))
    assert best.independent == (judge != "ensemble")
    assert "round 1 of 3 is +1.250 above SFT" in best.words() and "the last one, round 2, is +1.000" in best.words()


def test_of_equals_the_earlier_one_is_taken_and_sft_before_all() -> None:
    assert best_of(ledger(1.5, 2.0, 2.0)).round == 1
    assert best_of(ledger(1.0, 0.5)).round is None
    assert best_of(ledger()).round is None and "no round is committed" in best_of(ledger()).words()


def test_a_best_round_that_raised_alarms_itself_says_which() -> None:
    told = ledger(1.5, 2.25, 2.0)
    for entry, names in zip(told["rounds"], ([], ["truncation", "kl_budget"], ["sameness"]), strict=True):
        entry["alarms"] = [{"name": name, "text": "", "do": ""} for name in names]
    best = best_of(told)
    assert (best.round, best.alarms) == (1, ("truncation", "kl_budget"))
    assert best.words().endswith("the last one, round 2, is +1.000; its own alarms: truncation, kl_budget")
    assert "alarms" not in best_of(ledger(1.5, 2.25, 2.0)).words()


def test_that_no_round_beats_sft_is_said_plainly() -> None:
    best = best_of(ledger(0.5, 0.75, 0.25))
    assert (best.round, best.gain) == (None, 0.0)
    assert best.words() == (
        "no round beats SFT by the gold reward (the nearest is round 1 of 3, -0.250): SFT's policy stays the best"
    )


@pytest.mark.parametrize(
    ("gains", "min_delta", "waited"),
    [
        ([], 0.0, 0),
        ([0.1], 0.0, 0),
        ([-0.1], 0.0, 1),  # no better than SFT
        ([0.5, 0.5], 0.0, 1),  # an equal is no better
        ([0.5, 0.4, 0.3, 0.6], 0.0, 0),
        ([0.5, 0.55, 0.58], 0.1, 2),  # each a little better than the one before, none by more than 0.1 than 0.5
        ([0.5, 0.55, 0.61], 0.1, 0),  # together they are
        ([0.1], 0.1, 1),
    ],
)
def test_waiting_by_hand(gains: list[float], min_delta: float, waited: int) -> None:
    assert rounds_waited(gains, min_delta) == waited


@given(st.lists(st.integers(-5, 5), max_size=12))
def test_without_a_margin_one_waits_since_the_first_highest(gains: list[int]) -> None:
    values = [0, *gains]
    assert rounds_waited([float(g) for g in gains], 0.0) == len(gains) - values.index(max(values))


def test_why_a_run_ends() -> None:
    assert why_stopped(of(0.5, 0.4), 2, 0.0, 5) is None
    assert why_stopped(of(0.5, 0.4, 0.3), None, 0.0, 5) is None
    assert why_stopped(of(0.5, 0.4, 0.3, judge="held_out"), 2, 0.0, 5) == (
        "2 rounds in a row brought no better judgement by held-out reward models (rounds.stop.patience 2)"
    )
    assert "1 round in a row brought no better judgement by the gold reward by more than 0.2 (rounds.stop.min_delta)" in str(
        why_stopped(of(0.1), 1, 0.2, 5)
    )
    assert why_stopped(of(0.5, 0.6), 2, 0.0, 2) == "all 2 rounds are played (rounds.num_rounds)"


def test_a_round_with_an_alarm_that_disqualifies_is_neither_the_best_nor_better() -> None:
    told = ledger(1.5, 2.0, 2.5, 3.0)
    for entry, names in zip(told["rounds"], ([], [], ["truncation"], ["truncation", "kl_budget"]), strict=True):
        entry[OUT] = names
    best = best_of(told)
    assert (best.round, best.gains, best.counted) == (1, (0.5, 1.0, 1.5, 2.0), (0.5, 1.0, -math.inf, -math.inf))
    assert best.words().startswith("round 1 of 4 is +1.000 above SFT by")
    assert best.words().endswith("the most of those that count; the last one, round 3, is +2.000 "
                                 "(not counted: rounds 2, 3, by truncation, kl_budget)")  # fmt: skip
    assert str(why_stopped(best, 2, 0.0, 9)).endswith(
        "(rounds.stop.patience 2) (not counted: rounds 2, 3, by truncation, kl_budget)"
    )
    assert why_stopped(replace(best, out=()), 2, 0.0, 9) is None
    for entry in told["rounds"]:
        entry[OUT] = ["truncation"]
    none = best_of(told)
    assert none.round is None and none.gain == 0.0 and "no round that counts beats SFT" in none.words()
    assert "SFT's policy stays the best" in none.words() and "not counted: rounds 0, 1, 2, 3, by truncation" in none.words()
    for entry in told["rounds"]:
        del entry[OUT]
    assert best_of(told).round == 3, "a ledger from before there was such a thing"


def test_a_budget_that_is_not_set_disqualifies_nobody_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"disqualify names kl_budget, and kl_budget is null"):
        EvaluationConfig(disqualify=("kl_budget",))
    assert EvaluationConfig(disqualify=("kl_budget",), kl_budget=9.0).disqualify == ("kl_budget",)
