"""The world follows from its recipe, and its splits share nothing."""

import pytest

from sandbox.config import WorldConfig
from sandbox.lexicon import TOPICS
from sandbox.texts import topic_of
from sandbox.world import SPLITS, World
from tokens.errors import UserError


def test_equal_recipes_make_equal_worlds() -> None:
    first, second = World(WorldConfig(num_texts=300)), World(WorldConfig(num_texts=300))
    assert first.corpus() == second.corpus()
    assert all(first.prompts(split) == second.prompts(split) for split in SPLITS)
    text = first.corpus()[7]
    assert first.gold(*text) == second.gold(*text)
    assert first.gold(*text, user="user-005") == second.gold(*text, user="user-005")


def test_another_seed_makes_another_world() -> None:
    first, second = World(WorldConfig(num_texts=300)), World(WorldConfig(num_texts=300, seed=1))
    assert first.corpus() != second.corpus()
    assert first.prompts("train") != second.prompts("train")
    assert first.gold(*first.corpus()[7]) != second.gold(*first.corpus()[7])


def test_gold_does_not_depend_on_the_size_of_the_corpus() -> None:
    small, large = World(WorldConfig(num_texts=100)), World(WorldConfig(num_texts=5000))
    assert small.gold(*large.corpus()[3]) == large.gold(*large.corpus()[3])


def test_splits_share_no_text_and_cover_every_domain() -> None:
    world = World(WorldConfig(num_texts=100))
    texts = [{prompt.text for prompt in world.prompts(split)} for split in SPLITS]
    assert [len(split) for split in texts] == [2000, 256, 256]
    assert len(set.union(*texts)) == 2512
    assert all({prompt.domain for prompt in world.prompts(split)} == set(world.domains) for split in SPLITS)
    ids = [prompt.id for split in SPLITS for prompt in world.prompts(split)]
    assert len(ids) == len(set(ids))


def test_domains_are_divided() -> None:
    world = World(WorldConfig(num_texts=100, held_out_domains=2))
    assert len(world.train_domains) >= 8 and len(world.held_out_domains) == 2
    assert (*world.train_domains, *world.held_out_domains) == world.domains
    assert World(WorldConfig(num_texts=100, held_out_domains=0)).train_domains == world.domains


def test_domain_and_topic_are_read_from_the_text() -> None:
    for prompt in World(WorldConfig(num_texts=100)).prompts("test"):
        assert topic_of(prompt.text) == TOPICS[prompt.topic]
        assert topic_of(prompt.text).domain == prompt.domain


def test_corpus_uses_training_prompts_and_known_words_and_has_short_texts() -> None:
    world = World(WorldConfig(num_texts=3000))
    corpus, train = world.corpus(), {prompt.text for prompt in world.prompts("train")}
    assert all(prompt in train for prompt, _ in corpus)
    assert {word for texts in corpus for text in texts for word in text.split()} <= set(world.vocabulary)
    short = sum(len(response.split()) <= 5 for _, response in corpus) / len(corpus)
    assert 0.05 < short < 0.25
    assert max(len(response.split()) for _, response in corpus) <= 60


def test_corpus_covers_the_range_of_each_attribute() -> None:
    world = World(WorldConfig(num_texts=2000))
    measured = [vars(world.attributes(*text)) for text in world.corpus()]
    for name in ("relevance", "sentiment", "politeness", "rudeness", "specificity", "hedging", "too_short", "off_topic"):
        values = [row[name] for row in measured]
        assert min(values) in (0.0, -1.0) and max(values) == 1.0, name


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="at most 8960"):
        World(WorldConfig(num_prompts=9000))
