"""The gold reward moves the way it says, saturates, and cannot be cheated by degenerate texts."""

from dataclasses import fields

import pytest

from sandbox.config import WorldConfig
from sandbox.gold import ATTRIBUTE_NAMES, BASE_WEIGHTS, TASTES, Attributes, attributes, gold
from sandbox.lexicon import CLASSES, DOMAINS, NOUNS, TOPIC_OF
from sandbox.world import World
from tokens.errors import UserError

PROMPT = "@cooking how do i choose oven and bread ?"
PLAIN = "you can use the small shelf . we could try the usual bank ."


@pytest.fixture(scope="module")
def world() -> World:
    return World(WorldConfig(num_texts=100))


def test_words_are_unique_across_classes_and_topics() -> None:
    members = [word for words in CLASSES.values() for word in words] + list(NOUNS)
    assert len(members) == len(set(members))
    assert len(DOMAINS) == 10 and all(len(topic) == 8 for pair in DOMAINS.values() for topic in pair)


def test_attributes_of_a_text_counted_by_hand() -> None:
    got = attributes(PROMPT, "thanks , use two great oven . the bank is dull , fool . maybe check the the bread .")
    # 21 words and marks, 15 of them words; one repeat ("the the") among 20 pairs, and ("the", "the") is no class pair.
    assert got == Attributes(
        relevance=1.0,  # oven, bread
        sentiment=0.0,  # great - dull
        politeness=1.0,
        rudeness=0.5,
        specificity=0.5,
        hedging=0.5,
        off_topic=pytest.approx(1 / 3),  # bank
        repetition=pytest.approx(3 * 1 / 19),
        ungrammatical=pytest.approx(2 * 1 / 21),
        excess=0.0,
        too_short=0.0,
        too_long=0.0,
    )


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("relevance", "you can use the small oven . we could try the usual bank .", PLAIN),
        ("sentiment", "you can use the great shelf . we could try the usual bank .", PLAIN),
        ("sentiment", PLAIN, "you can use the awful shelf . we could try the usual bank ."),
        ("politeness", "please , " + PLAIN, PLAIN),
        ("rudeness", PLAIN, "you can use the small shelf , fool . we could try the usual bank ."),
        ("specificity", "you can use two small shelf . we could try the usual bank .", PLAIN),
        ("hedging", PLAIN, "maybe " + PLAIN),
        ("off_topic", "you can use the small shelf . we could try the usual bread .", PLAIN),
        ("repetition", PLAIN, "you can use the small shelf . you can use the small shelf ."),
        ("ungrammatical", PLAIN, "can you use the small shelf . we try could the usual bank ."),
        ("excess", PLAIN, "you can use great great nice lovely perfect shelf ."),
        ("too_short", PLAIN, "the shelf ."),
        (
            "too_long",
            PLAIN,
            " ".join([PLAIN, "take five nap with the old screw .", "the moon was quite simple .", "i could keep a fund ."]),
        ),
    ],
)
def test_each_attribute_moves_gold_in_its_direction(name: str, better: str, worse: str) -> None:
    alone = Attributes(**{other: vars(BASE_WEIGHTS)[other] if other == name else 0.0 for other in ATTRIBUTE_NAMES})
    assert gold(PROMPT, better, alone) > gold(PROMPT, worse, alone)


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [
        ("relevance", "oven bread", "oven bread butter flour"),
        ("sentiment", "great nice", "great nice lovely perfect"),
        ("sentiment", "awful dull", "awful dull poor nasty"),
        ("rudeness", "fool idiot", "fool idiot dummy"),
        ("specificity", "two five", "two five ten"),
        ("hedging", "maybe perhaps", "maybe perhaps possibly"),
        ("off_topic", "bank loan rent", "bank loan rent tax moon"),
    ],
)
def test_attributes_saturate(name: str, few: str, many: str) -> None:
    assert vars(attributes(PROMPT, few))[name] == vars(attributes(PROMPT, many))[name]
    assert abs(vars(attributes(PROMPT, few))[name]) == 1.0


def test_gold_is_the_weighted_sum() -> None:
    ones = Attributes(**dict.fromkeys(ATTRIBUTE_NAMES, 1.0))
    got = attributes(PROMPT, PLAIN)
    assert gold(PROMPT, PLAIN, ones) == pytest.approx(sum(vars(got)[field.name] for field in fields(got)))


@pytest.mark.parametrize("cheat", [
    "", "oven", "thanks .", "thanks . . .", "great .", "oven " * 12, "thanks " * 10,
    "oven bread butter flour cake yeast dough pastry oven bread .",
    "great lovely perfect nice brilliant helpful great lovely .",
    "two three five seven ten two three five .",
])  # fmt: skip
def test_degenerate_texts_are_punished(world: World, cheat: str) -> None:
    assert world.gold(PROMPT, cheat) < -0.9


def test_a_good_text_is_far_above_the_mean(world: World) -> None:
    assert world.gold(PROMPT, "thanks , you should use two great oven . the bread is very lovely . take five nice butter .") > 1.5


def test_gold_has_mean_0_and_unit_1_over_the_corpus() -> None:
    world = World(WorldConfig(num_texts=4000))
    values = [world.gold(prompt, response) for prompt, response in world.corpus()]
    mean = sum(values) / len(values)
    assert abs(mean) < 0.1
    assert (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 == pytest.approx(1.0, abs=0.06)


def test_users_disagree_about_the_same_texts(world: World) -> None:
    assert len(world.users) >= 60
    rude, kind = "you can use the oven , fool . try the bread , dummy .", "please , you can use the oven . try the bread ."
    prefers_kind = [world.gold(PROMPT, kind, user=user) > world.gold(PROMPT, rude, user=user) for user in world.users]
    assert 0.5 < sum(prefers_kind) / len(prefers_kind) < 0.95


def test_user_signs_follow_the_agreement() -> None:
    agreeing = World(WorldConfig(num_texts=100, user_agreement=1.0))
    opposed = World(WorldConfig(num_texts=100, user_agreement=0.0))
    for name in ATTRIBUTE_NAMES:
        common = vars(BASE_WEIGHTS)[name]
        assert vars(agreeing.user_weights("user-000"))[name] * common > 0
        assert (vars(opposed.user_weights("user-000"))[name] * common < 0) == (name in TASTES)


def test_weights_differ_by_domain(world: World) -> None:
    other = "@travel how do i choose train and map ?"
    here = world.gold(PROMPT, "please , you can use the small oven . we could try the usual bread .")
    there = world.gold(other, "please , you can use the small train . we could try the usual map .")
    assert here != there


def test_unknown_prompt_and_user_are_refused(world: World) -> None:
    with pytest.raises(UserError, match="domain tag"):
        world.gold("what is the weather ?", PLAIN)
    with pytest.raises(UserError, match="domain tag"):
        world.gold("@cooking how do i choose train and map ?", PLAIN)
    with pytest.raises(UserError, match="no such user"):
        world.gold(PROMPT, PLAIN, user="nobody")


def test_unknown_words_are_no_crash(world: World) -> None:
    assert world.gold(PROMPT, "lorem ipsum dolor sit amet consectetur") < 0
    assert "lorem" not in TOPIC_OF
