"""Which prompts a data set goes without, so that nothing is measured on a prompt that was trained on by way of another set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from preferences.sets import prompt_id


@dataclass(frozen=True)
class Apart:
    """What a set goes without, by the prompts' ids.

    Args:
        train: training prompts that another set holds out.
        test: held-out prompts that a set which was there before this one trains on.
    """

    train: frozenset[str] = frozenset()
    test: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prompts:
    """Ids of a set's prompts, as it was split by itself.

    Args:
        train: to train on.
        test: held out.
    """

    train: frozenset[str]
    test: frozenset[str]

    @classmethod
    def of(cls, train: Iterable[str], test: Iterable[str]) -> Prompts:
        """Of the prompts' texts."""
        return cls(*(frozenset(map(prompt_id, prompts)) for prompts in (train, test)))


NOTHING: Mapping[str, Apart] = MappingProxyType({})
"""Of a customisation that is not there yet."""


def keep_apart(sets: Mapping[str, Prompts], settled: Mapping[str, Apart] = NOTHING) -> dict[str, Apart]:
    """What each set goes without.

    No set trains on what any set holds out. A set that models were fitted on before stays as it was, so that a further one finds
    them trained: what they were trained on is then left out of what the further set measures.

    Args:
        sets: by name.
        settled: of those that models were fitted on before; others than ``sets`` may be among them.

    Returns:
        By name, for every one of ``sets``.
    """
    there = {name: settled[name] for name in sets if name in settled}
    trained = frozenset().union(*(sets[name].train - apart.train for name, apart in there.items()))
    tests = {name: prompts.test - (there[name].test if name in there else trained) for name, prompts in sets.items()}
    held_out = frozenset().union(*tests.values())
    new = {name: Apart(prompts.train & held_out, prompts.test & trained) for name, prompts in sets.items() if name not in there}
    return {name: there[name] if name in there else new[name] for name in sets}
