"""What an evaluation and S_k keep of every response: the judge's gap to SFT's, each member's score, the truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.judging import Judgement, judge, meta_rows
from tokens.records import Prompt, Rollout

TRUTH = {"yes": 1.0, "no": -1.0, "so": 0.05}


def rollouts(*texts: str) -> list[Rollout]:
    return [
        Rollout(Prompt(f"p{i}", f"Is it {i}?", (5,), "law"), 0, (6, 7), text, (-1.0, -1.0), 0, True)
        for i, text in enumerate(texts)
    ]


def scores(*members: tuple[float, float]) -> Scores:
    mean = tuple(sum(row) / 2 for row in members)
    return Scores((0, 2), members, mean, tuple(abs(a - b) / 2 for a, b in members), mean)


def judged(kind: str, ours: Scores, theirs: Scores) -> tuple[Judgement, Judgement]:
    """SFT's judgement, and that of a round; in the round the scorer says ``theirs`` of SFT's responses."""
    config = RunConfig.model_validate({"name": "judged", "evaluation": {"judge": kind, "tie": 0.1}})
    inputs: Any = SimpleNamespace(gold=lambda prompt, response: TRUTH[response])
    first, second = rollouts("no", "so", "yes"), rollouts("yes", "so", "no")
    learner = SimpleNamespace(statistics=lambda found: ([-2.0] * len(found), [-2.5] * len(found)))

    def score(found: Any) -> Scores:
        return theirs if tuple(r.text for r in found) == ("no", "so", "yes") else ours

    roles: Any = SimpleNamespace(scorer=SimpleNamespace(score=score), learner=learner)
    wait: Any = lambda what, pending, bar=None: pending  # noqa: E731
    sft = judge(config, inputs, roles, wait, 1, None, rollouts=first)
    return sft, judge(config, inputs, roles, wait, 1, sft, rollouts=second)


OURS, THEIRS = scores((1.0, 3.0), (0.0, 0.0), (-1.0, -1.0)), scores((0.0, 0.0), (0.0, 0.1), (1.0, 1.0))


@pytest.mark.parametrize(
    ("kind", "gaps"), [("gold", [2.0, 0.0, -2.0]), ("ensemble", [2.0, -0.05, -2.0])], ids=["gold", "ensemble"]
)
def test_a_round_keeps_what_the_judge_said_of_it_and_of_sft(kind: str, gaps: list[float]) -> None:
    sft, round_ = judged(kind, OURS, THEIRS)
    assert [row.over_sft for row in sft.rows] == [None, None, None]
    assert [row.over_sft for row in round_.rows] == pytest.approx(gaps)
    assert (round_.summary["win"], round_.summary["tie"], round_.summary["lose"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_s_k_keeps_every_members_score_and_the_truth() -> None:
    rows = meta_rows(rollouts("yes", "no", "so"), OURS, vanilla=2, gold=lambda prompt, response: TRUTH[response])
    assert [row.member_scores for row in rows] == list(OURS.members)
    assert {row.members for row in rows} == {(0, 2)}
    assert [(row.score_metarm, row.score_vanilla) for row in rows] == list(OURS.members)
    assert [row.gold for row in rows] == [1.0, -1.0, 0.05]
    assert not any(row.kept_back for row in rows)
    back = meta_rows(rollouts("yes", "no", "so"), OURS, vanilla=2, gold=None, back={1})
    assert [row.kept_back for row in back] == [False, True, False]
    (real, *_) = meta_rows(rollouts("yes", "no", "so"), OURS, vanilla=1, gold=None)
    assert (real.gold, real.score_vanilla) == (None, None)
