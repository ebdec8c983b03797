"""The sandbox's users as raters: each labels pairs by their own taste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from sandbox.labels import LabelledPair, answers
from sandbox.world import World


@dataclass(frozen=True)
class RatedPair:
    """A preference, and whose it is.

    Args:
        id: of the pair and the user.
        prompt: as text.
        chosen: what the user prefers, as text.
        rejected: the other.
        domain: of the prompt.
        rater: the user.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    domain: str
    rater: str


def rate(world: World, pairs: Sequence[LabelledPair], user: str, rng: Random | None) -> list[RatedPair]:
    """A user's labels of pairs.

    p(a before b) = sigma(beta * (gold_u(a) - gold_u(b))), then ``flip_rate`` of the answers are turned round

    Source: Bradley and Terry 1952, as the sandbox's annotator.

    Args:
        world: whose ``annotator_beta`` and ``flip_rate`` are used.
        pairs: what is judged; the order of a pair's responses has no part in the answer.
        user: who judges.
        rng: of the user's errors; None = the user makes none, and pairs that are all one to them are left out.

    Returns:
        A label for each pair.
    """
    rated = []
    for pair in pairs:
        first, second = sorted((pair.chosen, pair.rejected))
        gap = world.gold(pair.prompt, first, user=user) - world.gold(pair.prompt, second, user=user)
        if rng is None:
            if gap == 0:
                continue
            prefers_first = gap > 0
        else:
            prefers_first = answers(gap, world.config, rng)
        chosen, rejected = (first, second) if prefers_first else (second, first)
        rated.append(RatedPair(f"{pair.id}-{user}", pair.prompt, chosen, rejected, pair.domain, user))
    return rated


def some(pairs: Sequence[LabelledPair], number: int, user: str, seed: int, stream: str) -> tuple[list[LabelledPair], Random]:
    """Pairs that a user is shown, and the generator of the user's errors.

    Args:
        pairs: all there are.
        number: shown; all of them where there are fewer.
        user: who is asked.
        seed: of the draw.
        stream: keeps draws for different purposes apart.
    """
    rng = Random(f"{seed} {stream} {user}")
    return rng.sample(list(pairs), min(number, len(pairs))), rng
