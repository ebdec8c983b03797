"""Each alarm, at its limit and below it."""

from typing import Any, get_args

import pytest

from evaluation.alarms import alarms
from evaluation.config import AlarmName

SFT: dict[str, Any] = {
    "proxy": 0.0, "gold": 1.0, "held_out": 0.0, "ensemble_std": 0.4, "length": 20.0, "finished": 0.98, "repetition": 0.02,
    "self_bleu": 0.3, "length_correlation": 0.1, "reward_accuracy": None, "kl": 0.0, "judge": "gold",
}  # fmt: skip
GOOD = SFT | {"sft_ensemble_std": 0.4, "proxy": 1.0, "gold": 1.5, "held_out": 0.8, "reward_accuracy": 0.8, "kl": 4.0}


def names(*rounds: dict[str, Any], kl_budget: float | None = None) -> list[str]:
    return [alarm.name for alarm in alarms(SFT, rounds, kl_budget)]


def test_a_good_round_raises_none() -> None:
    assert names(GOOD) == names(GOOD, GOOD | {"proxy": 2.0, "gold": 1.8}) == []


@pytest.mark.parametrize(
    ("name", "changed", "nearly"),
    [
        ("disagreement_grows", {"ensemble_std": 0.61}, {"ensemble_std": 0.59}),
        ("length_hacking", {"length": 26.1, "length_correlation": 0.31}, {"length": 26.0, "length_correlation": 0.29}),
        ("length_hacking", {"length": 26.1, "length_correlation": 0.31}, {"length": 25.9, "length_correlation": 0.9}),
        ("repetition", {"repetition": 0.121}, {"repetition": 0.119}),
        ("truncation", {"finished": 0.879}, {"finished": 0.881}),
        ("sameness", {"self_bleu": 0.501}, {"self_bleu": 0.499}),
        ("reward_model_blind", {"reward_accuracy": 0.549}, {"reward_accuracy": 0.55}),
    ],
)
def test_a_sign_beyond_its_limit(name: str, changed: dict[str, float], nearly: dict[str, float]) -> None:
    assert names(GOOD | changed) == [name] and names(GOOD | nearly) == []


def test_proxy_up_and_judge_down_since_the_best_round_or_sft() -> None:
    worse = GOOD | {"proxy": 1.5, "gold": 1.2}
    assert names(GOOD, worse) == ["proxy_up_gold_down"]
    (alarm,) = alarms(SFT, [GOOD, worse])
    assert "since round 0 the reward model's score has risen from 1.00 to 1.50 while the gold reward has fallen" in alarm.text
    assert "best/" in alarm.do and alarm.words() == f"{alarm.name}: {alarm.text}. {alarm.do}"
    assert names(GOOD, worse | {"proxy": 0.9}) == [], "both have fallen: that is something else"
    assert "since SFT" in alarms(SFT, [GOOD | {"gold": 0.5}])[0].text
    nobody_knows = {"gold": None}
    held_out = [each | nobody_knows for each in (GOOD, worse | {"held_out": 0.5})]
    assert [alarm.name for alarm in alarms(SFT | nobody_knows, held_out)] == ["proxy_up_held_out_down"]


def test_disagreement_is_that_of_the_same_members_on_sfts_responses() -> None:
    assert names(GOOD | {"ensemble_std": 0.61, "sft_ensemble_std": 0.5}) == [], "at the start one member less scored SFT's"
    (alarm,) = alarms(SFT, [GOOD | {"ensemble_std": 0.45, "sft_ensemble_std": 0.3}])
    assert alarm.text == "the members' scores lie 0.45 apart, on SFT's responses 0.30"


def test_where_the_truth_is_known_the_held_out_members_have_no_say() -> None:
    better = GOOD | {"proxy": 1.5, "gold": 1.7, "held_out": 0.4}
    assert names(GOOD, better) == []
    assert names(GOOD, better | {"gold": None}) == ["proxy_up_held_out_down"]


@pytest.mark.parametrize(
    ("agreed", "labels", "blind"),
    [
        (0.49, 192.0, True), (0.5, 192.0, False), (0.54, 192.0, False), (0.52, 1000.0, True), (0.53, 1000.0, False),
        (0.4, 32.0, True), (0.42, 32.0, False), (0.5, None, False),
    ],
)  # fmt: skip
def test_labels_must_be_enough_to_call_a_reward_model_blind(agreed: float, labels: float | None, blind: bool) -> None:
    told = {"reward_accuracy": None, "fresh_accuracy": agreed, "fresh_labelled": labels}
    assert names(GOOD | told) == (["reward_model_blind"] if blind else [])
    assert names(GOOD | told | {"reward_accuracy": 0.8}) == [], "the truth is known"


def test_a_budget_of_kl() -> None:
    assert names(GOOD, kl_budget=3.9) == ["kl_budget"] and names(GOOD, kl_budget=4.0) == names(GOOD) == []


def test_an_evaluation_of_an_earlier_version_is_not_alarmed_about() -> None:
    assert alarms({"proxy": 0.0}, [{"proxy": 9.0, "judge": "gold"}]) == ()
    with pytest.raises(ValueError, match="got none"):
        alarms(SFT, [])


def test_every_alarm_may_disqualify_a_round() -> None:
    bad = {
        "ensemble_std": 9.0, "length": 99.0, "length_correlation": 0.9, "repetition": 0.9, "finished": 0.1, "self_bleu": 0.9,
        "reward_accuracy": 0.1, "proxy": 9.0, "gold": -9.0, "kl": 99.0,
    }  # fmt: skip
    told = {*names(GOOD, GOOD | bad, kl_budget=1.0)}
    nobody_knows = GOOD | bad | {"gold": None, "held_out": -9.0}
    told |= {alarm.name for alarm in alarms(SFT | {"gold": None}, [GOOD | {"gold": None}, nobody_knows])}
    assert told == set(get_args(AlarmName))
