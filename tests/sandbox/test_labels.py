"""Pairs: how many flips, how many near-ties, what the annotator says."""

from random import Random

import pytest

from sandbox.config import WorldConfig
from sandbox.labels import Candidate, annotate, judge, match, truth
from sandbox.world import World, WorldPrompt
from tokens.errors import UserError


def _candidates(prompts: int = 300, each: int = 4, seed: int = 0) -> list[Candidate]:
    rng = Random(seed)
    return [
        Candidate(WorldPrompt(f"p{p}", f"prompt {p}", "cooking", 0), f"text {p} {i}", rng.gauss(0, 1))
        for p in range(prompts)
        for i in range(each)
    ]


def test_pairs_are_of_one_prompt_and_the_near_tie_share_is_exact() -> None:
    config = WorldConfig(near_tie_share=0.3, near_tie_gap=0.2)
    pairs = match(_candidates(), 400, config, Random(1))
    assert len(pairs) == 400
    assert all(first.prompt == second.prompt and first.text != second.text for first, second in pairs)
    assert sum(abs(first.gold - second.gold) <= 0.2 for first, second in pairs) == 120
    assert len({(first.text, second.text) for first, second in pairs}) == 400


def test_equal_texts_never_make_a_pair() -> None:
    prompt = WorldPrompt("p", "prompt", "cooking", 0)
    same = [Candidate(prompt, "thanks .", 0.0)] * 3
    with pytest.raises(UserError, match="are asked for"):
        match(same, 1, WorldConfig(near_tie_share=0.0), Random(0))


def test_the_closest_pairs_stand_in_for_missing_near_ties() -> None:
    prompt = WorldPrompt("p", "prompt", "cooking", 0)
    far = [Candidate(prompt, name, value) for name, value in (("a", 0.0), ("b", 1.0), ("c", 5.0))]
    pairs = match(far, 2, WorldConfig(near_tie_share=0.5, near_tie_gap=0.1), Random(0))
    assert {frozenset((first.text, second.text)) for first, second in pairs} >= {frozenset("ab")}


def test_exactly_the_stated_share_is_flipped() -> None:
    pairs = match(_candidates(), 400, WorldConfig(), Random(1))
    sure = WorldConfig(flip_rate=0.25, annotator_beta=1e6)
    labelled = annotate(pairs, sure, Random(2))
    assert sum(pair.flipped for pair in labelled) == 100
    # An annotator without doubt is wrong exactly where the answer was turned round.
    assert all((pair.gold_chosen < pair.gold_rejected) == pair.flipped for pair in labelled)


def test_the_annotator_is_bradley_terry() -> None:
    prompt = WorldPrompt("p", "prompt", "cooking", 0)
    pair = (Candidate(prompt, "good", 0.5), Candidate(prompt, "bad", 0.0))
    labelled = annotate([pair] * 4000, WorldConfig(flip_rate=0.0, annotator_beta=2.0), Random(0))
    share = sum(row.chosen == "good" for row in labelled) / 4000
    assert share == pytest.approx(0.7311, abs=0.025)  # sigmoid(2 * 0.5)


def test_true_labels_follow_gold() -> None:
    pairs = truth(match(_candidates(), 200, WorldConfig(), Random(1)), "validation")
    assert all(pair.gold_chosen >= pair.gold_rejected and not pair.flipped and pair.split == "validation" for pair in pairs)
    assert len({pair.id for pair in pairs}) == 200


def test_labels_follow_from_the_seed() -> None:
    once = annotate(match(_candidates(), 100, WorldConfig(), Random(1)), WorldConfig(), Random(2))
    again = annotate(match(_candidates(), 100, WorldConfig(), Random(1)), WorldConfig(), Random(2))
    assert once == again
    assert once != annotate(match(_candidates(), 100, WorldConfig(), Random(1)), WorldConfig(), Random(3))


def test_judge_leaves_empty_texts_out() -> None:
    world = World(WorldConfig(num_texts=100))
    prompt = world.prompts("train")[0]
    judged = judge(world, [prompt, prompt], ["", "thanks ."])
    assert [candidate.text for candidate in judged] == ["thanks ."]
    assert judged[0].gold == world.gold(prompt.text, "thanks .")
