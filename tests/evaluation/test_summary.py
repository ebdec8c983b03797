from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.alarms import Alarm
from evaluation.run import Run, read_run
from evaluation.summary import findings, headline


@pytest.fixture(scope="module")
def run(full_run: Path) -> Run:
    return read_run(full_run)


def with_last(run: Run, **changes: Any) -> Run:
    """The run with other numbers in its last evaluation."""
    *before, last = run.ledger.rounds
    last = replace(last, evaluation=replace(last.evaluation, **changes))
    return replace(run, ledger=replace(run.ledger, rounds=(*before, last)))


def said(run: Run) -> str:
    return "\n".join(finding.text for finding in findings(run))


OUTCOME = {"win": 0.71, "tie": 0.17, "lose": 0.12, "margin": 0.59}


def test_the_headline_is_made_of_the_numbers(run: Run) -> None:
    told = headline(with_last(run, **OUTCOME, margin_low=0.5, margin_high=0.67))
    assert told.text == "After 3 rounds the policy wins 71% and loses 12% against SFT under the gold reward."
    assert told.detail == "Win minus lose +0.59, 95% interval +0.50 to +0.67 over 24 held-out prompts."
    assert (told.kind, told.verdict) == ("good", "Better than SFT")


@pytest.mark.parametrize(
    ("low", "high", "verdict", "kind"),
    [
        (0.01, 0.2, "Better than SFT", "good"),
        (0.0, 0.2, "Not told apart from SFT", "warn"),
        (-0.1, 0.2, "Not told apart from SFT", "warn"),
        (-0.3, -0.1, "Worse than SFT", "warn"),
    ],
)
def test_it_is_honest(run: Run, low: float, high: float, verdict: str, kind: str) -> None:
    told = headline(with_last(run, win=0.4, tie=0.2, lose=0.4, margin=(low + high) / 2, margin_low=low, margin_high=high))
    assert (told.verdict, told.kind) == (verdict, kind)


def test_no_outcome_is_said(run: Run) -> None:
    assert headline(with_last(run, win=None)).verdict == "Not compared with SFT"


def test_a_single_round_and_the_ensemble_as_judge(run: Run) -> None:
    one = replace(run, ledger=replace(run.ledger, rounds=run.ledger.rounds[:1]), round_rows=run.round_rows[:1])
    one = with_last(one, judge="ensemble", gold=None)
    assert headline(one).text.startswith("After 1 round the policy")
    assert headline(one).text.endswith("under the reward ensemble.")
    assert "can be fooled along with it" in said(one)


@pytest.mark.parametrize(
    ("gold", "told"),
    [
        ((0.1, 0.5, 0.3), "The gold reward was highest after round 1 (0.50; 0.30 after round 2)."),
        ((0.1, 0.3, 0.5), ""),
        ((0.1, 0.521, 0.518), ""),  # "fell from 0.52 to 0.52"
    ],
)
def test_that_an_earlier_round_had_more_gold_is_said(run: Run, gold: list[float], told: str) -> None:
    rounds = tuple(replace(r, evaluation=replace(r.evaluation, gold=g)) for r, g in zip(run.ledger.rounds, gold, strict=True))
    text = said(replace(run, ledger=replace(run.ledger, rounds=rounds)))
    assert told in text
    assert ("gold reward" in text) == bool(told)


def test_collapse(run: Run) -> None:
    assert "Collapse: the policy gives one and the same text to 29% of the prompts" in said(run)  # 7 of 24
    assert "Collapse" not in said(replace(run, round_rows=(*run.round_rows[:2], run.start_rows)))


def test_less_variety_without_one_common_answer(run: Run) -> None:
    rows = tuple(replace(row, response=f"a b a b a b {i}") for i, row in enumerate(run.start_rows))
    assert "Less variety" in said(replace(run, round_rows=(*run.round_rows[:2], rows)))


def test_cut_responses(run: Run) -> None:
    assert "end by themselves" in said(with_last(run, finished=run.ledger.start.finished - 0.3))
    assert "end by themselves" not in said(with_last(run, finished=run.ledger.start.finished))


def test_an_idle_meta_step(run: Run) -> None:
    rounds = run.ledger.rounds
    idle = replace(rounds[1], reward=replace(rounds[1].reward, j_after=rounds[1].reward.j_before))
    assert "did not raise J in round 1:" in said(replace(run, ledger=replace(run.ledger, rounds=(rounds[0], idle, rounds[2]))))
    none = tuple(replace(r, reward=replace(r.reward, j_before=None, j_after=None)) for r in rounds)
    assert "without MetaRM" in said(replace(run, ledger=replace(run.ledger, rounds=none)))


def test_an_ascent_that_only_inflates(run: Run) -> None:
    """The made-up ledger: J rises on the prompts kept back, the spread does not."""
    assert "Round 2: The ascent makes scores larger and tells responses apart no better" in said(run)
    *before, last = run.ledger.rounds
    risen = replace(last, reward=replace(last.reward, numbers={**last.reward.numbers, "spread_heldout_after": 0.8}))
    assert "no better" not in said(replace(run, ledger=replace(run.ledger, rounds=(*before, risen))))


def test_collapsed_prototypes_of_the_last_round(run: Run) -> None:
    def with_prototypes(effective: float) -> Run:
        rows = [
            replace(row, values={**row.values, "reward/prototypes_effective": effective if row.round == 2 else 1.0})
            for row in run.metrics
        ]
        return replace(run, metrics=tuple(rows))

    assert "Round 2: The prototypes of SwAV have collapsed" in said(with_prototypes(1.04))
    assert "prototypes" not in said(with_prototypes(3.0))  # of the last round alone
    assert "prototypes" not in said(run)


def test_an_alarm_of_the_last_round_is_told(run: Run) -> None:
    alarm = Alarm("repetition", "so many", "Do this")
    rounds = run.ledger.rounds
    last = replace(run, ledger=replace(run.ledger, rounds=(*rounds[:-1], replace(rounds[-1], alarms=(alarm,)))))
    assert [f.text for f in findings(last) if f.kind == "warn" and f.text not in [g.text for g in findings(run)]] == [
        "Alarm repetition: so many. Do this."
    ]
    first = replace(run, ledger=replace(run.ledger, rounds=(replace(rounds[0], alarms=(alarm,)), *rounds[1:])))
    assert findings(first) == findings(run), "of an earlier round, the ledger has it"


def test_wins_that_were_bought_are_no_good_news(run: Run) -> None:
    won = with_last(run, **OUTCOME, margin_low=0.5, margin_high=0.67)
    rounds = won.ledger.rounds
    names = ("proxy_up_gold_down", "truncation")
    last = replace(rounds[-1], alarms=tuple(Alarm(name, "so", "Do this") for name in names), best="round 0 of 3 is the best")
    bought = replace(won, ledger=replace(won.ledger, rounds=(*rounds[:-1], last)))
    assert (headline(bought).kind, headline(bought).verdict) == ("warn", "Over-optimised")
    assert headline(bought).text == headline(won).text, "the numbers stay"
    assert "best/: round 0 of 3 is the best." in said(bought) and "best/" not in said(won)


def test_what_an_alarm_says_is_not_said_twice(run: Run) -> None:
    fallen = with_last(run, gold=-5.0, proxy=50.0, finished=0.1)
    assert "The gold reward was highest" in said(fallen) and "Only 10% of the responses" in said(fallen)
    rounds = fallen.ledger.rounds
    for name, words in (("proxy_up_gold_down", "The gold reward was highest"), ("truncation", "Only 10%")):
        alarmed = (*rounds[:-1], replace(rounds[-1], alarms=(Alarm(name, "so", "Do this"),)))
        assert words not in said(replace(fallen, ledger=replace(fallen.ledger, rounds=alarmed)))
