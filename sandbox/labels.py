"""Makes preference pairs of candidate responses: which two meet, and what a noisy annotator says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from sandbox.config import WorldConfig
from sandbox.world import World, WorldPrompt
from tokens.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A response to a prompt, and its gold reward."""

    prompt: WorldPrompt
    text: str
    gold: float


@dataclass(frozen=True)
class LabelledPair:
    """A preference. ``flipped`` = the answer of the annotator was turned round; the annotator itself errs too."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    domain: str
    gold_chosen: float
    gold_rejected: float
    flipped: bool
    split: str


def judge(world: World, prompts: Sequence[WorldPrompt], texts: Sequence[str]) -> list[Candidate]:
    """Candidates with their gold reward; empty texts are left out."""
    return [
        Candidate(prompt, text, world.gold(prompt.text, text))
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip()
    ]


def match(candidates: Sequence[Candidate], number: int, config: WorldConfig, rng: Random) -> list[tuple[Candidate, Candidate]]:
    """Choose ``number`` pairs of different responses to one prompt, a share of them near-ties.

    Args:
        candidates: several to a prompt.
        number: pairs wanted.
        config: ``near_tie_share`` and ``near_tie_gap``; where too few pairs are that close, the closest count as near-ties.
        rng: decides which pairs, their order, and which response comes first.

    Raises:
        UserError: if the candidates do not make so many pairs.
    """
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_prompt.setdefault(candidate.prompt.id, []).append(candidate)
    pool = [pair for group in by_prompt.values() for pair in combinations(group, 2) if pair[0].text != pair[1].text]
    num_near = round(config.near_tie_share * number)
    closest = sorted(pool, key=_gap)
    num_close = max(num_near, sum(_gap(pair) <= config.near_tie_gap for pair in pool))
    near, wide = closest[:num_close], closest[num_close:]
    if len(near) < num_near or len(wide) < number - num_near:
        raise UserError(
            f"the candidates make {len(near)} near-ties and {len(wide)} other pairs, "
            f"but {num_near} and {number - num_near} are asked for; lower world.num_pairs, raise world.num_prompts, "
            "or change world.near_tie_share or world.near_tie_gap"
        )
    pairs = rng.sample(near, num_near) + rng.sample(wide, number - num_near)
    rng.shuffle(pairs)
    return [(first, second) if rng.random() < 0.5 else (second, first) for first, second in pairs]


def annotate(pairs: Sequence[tuple[Candidate, Candidate]], config: WorldConfig, rng: Random) -> list[LabelledPair]:
    """Training labels: a Bradley-Terry annotator answers, then exactly ``flip_rate`` of the answers are turned round.

    Source: Bradley and Terry 1952, P(a preferred to b) = sigmoid(beta * (gold(a) - gold(b))).
    """
    flips = set(rng.sample(range(len(pairs)), round(config.flip_rate * len(pairs))))
    labelled = []
    for index, (first, second) in enumerate(pairs):
        prefers_first = prefers(first.gold - second.gold, config, rng)
        flipped = index in flips
        chosen, rejected = (first, second) if prefers_first != flipped else (second, first)
        labelled.append(_pair(f"train-{index:05d}", chosen, rejected, flipped, "train"))
    return labelled


def prefers(gap: float, config: WorldConfig, rng: Random) -> bool:
    """What an annotator answers, before anything is turned round: P(True) = sigmoid(beta * gap).

    Source: Bradley and Terry 1952.

    Args:
        gap: gold reward of the first response less that of the second.
        config: has beta.
        rng: of the answer.

    Returns:
        True = the first is better.
    """
    return rng.random() < _sigmoid(config.annotator_beta * gap)


def answers(gap: float, config: WorldConfig, rng: Random) -> bool:
    """What becomes of one answer by itself: ``prefers``, turned round with probability ``flip_rate``.

    Args:
        gap: as in ``prefers``.
        config: has beta and the rate.
        rng: of the answer.

    Returns:
        True = the label says that the first is better.
    """
    return prefers(gap, config, rng) != (rng.random() < config.flip_rate)


def truth(pairs: Sequence[tuple[Candidate, Candidate]], split: str) -> list[LabelledPair]:
    """Labels without error: chosen is the response with the higher gold reward."""
    ordered = [(first, second) if first.gold >= second.gold else (second, first) for first, second in pairs]
    return [_pair(f"{split}-{index:05d}", chosen, rejected, False, split) for index, (chosen, rejected) in enumerate(ordered)]


def _pair(name: str, chosen: Candidate, rejected: Candidate, flipped: bool, split: str) -> LabelledPair:
    return LabelledPair(
        id=name,
        prompt=chosen.prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        domain=chosen.prompt.domain,
        gold_chosen=chosen.gold,
        gold_rejected=rejected.gold,
        flipped=flipped,
        split=split,
    )


def _gap(pair: tuple[Candidate, Candidate]) -> float:
    return abs(pair[0].gold - pair[1].gold)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
