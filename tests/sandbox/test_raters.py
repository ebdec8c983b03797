"""The sandbox's users as raters."""

from __future__ import annotations

from random import Random

from sandbox.config import WorldConfig
from sandbox.labels import LabelledPair
from sandbox.lexicon import TOPICS
from sandbox.raters import rate, some
from sandbox.texts import Style, respond
from sandbox.world import World


def pairs(world: World, number: int) -> list[LabelledPair]:
    rng, found = Random(1), []
    for i, prompt in enumerate(world.prompts("train")[:number]):
        a, b = (respond(TOPICS[prompt.topic], Style.draw(rng), rng) for _ in range(2))
        found.append(LabelledPair(f"t{i}", prompt.text, a, b, prompt.domain, 0.0, 0.0, False, "train"))
    return found


def test_users_label_by_their_own_taste() -> None:
    world = World(WorldConfig(num_prompts=200, num_users=4, user_agreement=0.5, num_texts=100))
    given = pairs(world, 150)
    labels = {user: rate(world, given, user, None) for user in world.users}
    for user, rated in labels.items():
        assert all(world.gold(r.prompt, r.chosen, user=user) > world.gold(r.prompt, r.rejected, user=user) for r in rated)
        assert {r.rater for r in rated} == {user} and all(r.id.endswith(user) for r in rated)
    one, other = ({r.id.rpartition("-user")[0]: r.chosen for r in labels[user]} for user in world.users[:2])
    differing = sum(one[key] != other[key] for key in one.keys() & other.keys())
    assert 0.05 < differing / len(one) < 0.7


def test_errors_are_the_annotators_and_follow_the_seed() -> None:
    world = World(WorldConfig(num_prompts=200, num_users=2, flip_rate=0.3, annotator_beta=50.0, num_texts=100))
    given = pairs(world, 200)
    shown, rng = some(given, 120, "user-000", 7, "labels")
    again, rng_again = some(given, 120, "user-000", 7, "labels")
    first = rate(world, shown, "user-000", rng)
    assert shown == again and first == rate(world, again, "user-000", rng_again) and len(first) == 120
    wrong = sum(
        world.gold(r.prompt, r.chosen, user="user-000") < world.gold(r.prompt, r.rejected, user="user-000") for r in first
    )
    assert 0.15 < wrong / 120 < 0.45  # three in ten are turned round
    assert some(given, 120, "user-001", 7, "labels")[0] != shown
    assert len(some(given, 999, "user-000", 7, "labels")[0]) == 200
