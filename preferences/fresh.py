"""Fresh pairs: which of a round's samples are compared, and what a reward model learns from beside D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from random import Random

from preferences.config import Carry
from tokens.records import Pair, Rollout


def choose_twos(rollouts: Sequence[Rollout], number: int, seed: int) -> list[tuple[Rollout, Rollout]]:
    """Samples to compare: two of one prompt each, no sample twice, and no prompt a second time before all have had their first.

    Two samples with the same text, or of which one has none, say nothing and are not compared.

    Args:
        rollouts: k samples of each prompt.
        number: of comparisons wanted.
        seed: decides which samples of a prompt meet, and the order of the prompts.

    Returns:
        As many as there are, ``number`` at most.
    """
    rng, groups = Random(seed), dict[str, list[Rollout]]()
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    prompts = list(groups.values())
    rng.shuffle(prompts)
    laps = zip_longest(*(_twos(rng.sample(group, len(group))) for group in prompts))
    return [two for two in chain.from_iterable(laps) if two is not None][:number]


def _twos(samples: Sequence[Rollout]) -> list[tuple[Rollout, Rollout]]:
    left, twos = [sample for sample in samples if sample.text.strip()], []
    while left:
        first = left.pop()
        other = next((place for place in reversed(range(len(left))) if left[place].text != first.text), None)
        if other is not None:
            twos.append((first, left.pop(other)))
    return twos


def carried(pairs: Sequence[Pair], rounds: Sequence[Sequence[Pair]], carry: Carry, seed: int) -> tuple[Pair, ...]:
    """What a round's reward model learns from.

    Source: Wolf et al. 2025 compare the three for labels that come with every iteration.

    Args:
        pairs: D.
        rounds: fresh pairs of each round so far; at least one round.
        carry: which of them count; see ``FreshConfig``.
        seed: of the sample.

    Returns:
        Pairs.
    """
    if carry == "latest":
        return tuple(rounds[-1])
    everything = (*pairs, *chain.from_iterable(rounds))
    return everything if carry == "all" else tuple(Random(seed).sample(everything, len(pairs)))
