"""Which samples of a round are compared, and what the labels are put beside."""

from __future__ import annotations

from collections import Counter

import pytest

from preferences.fresh import carried, choose_twos
from tokens.records import Pair, Prompt, Rollout


def sample(prompt: str, number: int, text: str) -> Rollout:
    return Rollout(Prompt(prompt, prompt, (1,)), number, (number + 2,), text, (-1.0,), 0, True)


def group(prompt: str, *texts: str) -> list[Rollout]:
    return [sample(prompt, number, text) for number, text in enumerate(texts)]


def pairs(name: str, number: int) -> list[Pair]:
    return [Pair(f"{name}-{index}", (1,), (2,), (3,)) for index in range(number)]


def test_two_of_a_prompt_meet_and_no_sample_meets_two() -> None:
    rollouts = [one for prompt in "abc" for one in group(prompt, *(f"{prompt}{index}" for index in range(5)))]
    twos = choose_twos(rollouts, 100, seed=1)
    assert len(twos) == 6, "two pairs of five samples, for each of three prompts"
    assert all(first.prompt.id == second.prompt.id and first.text != second.text for first, second in twos)
    assert max(Counter((one.prompt.id, one.sample) for two in twos for one in two).values()) == 1
    assert Counter(first.prompt.id for first, _ in twos[:3]) == Counter("abc"), "each prompt once before one comes again"
    assert choose_twos(rollouts, 4, seed=1) == twos[:4]
    assert choose_twos(rollouts, 100, seed=1) == twos and choose_twos(rollouts, 100, seed=2) != twos


def test_samples_that_say_the_same_or_nothing_are_not_compared() -> None:
    assert choose_twos(group("a", "same", "same", "same"), 5, seed=0) == []
    assert choose_twos(group("a", "one", " ", ""), 5, seed=0) == []
    ((first, second),) = choose_twos(group("a", "same", "same", "other", "same"), 5, seed=0)
    assert {first.text, second.text} == {"same", "other"}, "the only two that differ find each other"
    assert len(choose_twos([*group("a", "x", "x"), *group("b", "x", "y")], 5, seed=0)) == 1, "other prompts go on"


def test_what_a_reward_model_learns_from() -> None:
    given, rounds = pairs("d", 20), [pairs("r0", 3), pairs("r1", 4)]
    assert carried(given, rounds, "all", seed=0) == (*given, *rounds[0], *rounds[1])
    assert carried(given, rounds, "latest", seed=0) == tuple(rounds[1])
    drawn = carried(given, rounds, "sample", seed=0)
    names = [pair.id for pair in drawn]
    assert len(drawn) == 20 and len(set(names)) == 20, "as many as D has, none twice"
    assert set(names) <= {pair.id for pair in carried(given, rounds, "all", seed=0)}
    assert drawn == carried(given, rounds, "sample", seed=0) != carried(given, rounds, "sample", seed=1)


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_holds_old_and_new_alike(seed: int) -> None:
    drawn = carried(pairs("d", 400), [pairs("r0", 400)], "sample", seed)
    assert 150 < sum(pair.id.startswith("r0") for pair in drawn) < 250
