"""Asking one person: which pair comes next, what an answer does, what undo takes back. Page and terminal both show this.

Letters: N pairs of the pool, d reward features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cluster.seeds import derive
from preferences.pool import PoolPair
from rm.asking import choose, expected_accuracy
from rm.features_config import By
from rm.person import Person

Side = Literal["a", "b"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, eq=False)
class Pool:
    """Pairs that may be asked about.

    Args:
        pairs: N of them.
        differences: [N, d] float64, phi(prompt, a) - phi(prompt, b).

    Raises:
        ValueError: if there are none, or not as many differences.
    """

    pairs: tuple[PoolPair, ...]
    differences: Tensor

    def __post_init__(self) -> None:
        if not self.pairs or len(self.differences) != len(self.pairs):
            raise ValueError(f"a pool needs pairs and a difference for each, got {len(self.pairs)} and {len(self.differences)}")


@dataclass(frozen=True)
class Given:
    """An answer that was given.

    Args:
        pair: its place in the pool.
        preferred: which of the pool's two responses is better; None = the person could not say.
    """

    pair: int
    preferred: Side | None


@dataclass(frozen=True)
class Question:
    """A pair as it is shown.

    Args:
        number: from 1, of this interview; skipped ones count.
        pair: its place in the pool.
        prompt: of both responses.
        a: the response that is shown first, whichever the pool has first.
        b: the other.
        swapped: True where ``a`` is the pool's b.
    """

    number: int
    pair: int
    prompt: str
    a: str
    b: str
    swapped: bool


class Interview:
    """One person's answers as they come, and what is known of them after each.

    Which question comes, and which of its responses stands first, follows from the seed, the person and the answers before it
    alone: after an undo the same question comes again.

    Args:
        pool: to ask about.
        asked: [N] bool, the pairs that were asked earlier.
        fit: the person, of the differences [n, d] (preferred - other) of the answers given here.
        by: the way to choose the next pair.
        seed: of the draws.
        earlier: number of answers before this interview.
        keep: is handed the person and the answers after each change, to write them.
    """

    def __init__(
        self,
        pool: Pool,
        asked: Tensor,
        fit: Callable[[Tensor], Person],
        by: By,
        seed: int,
        earlier: int,
        keep: Callable[[Person, Sequence[Given]], None],
    ) -> None:
        self.pool, self.by, self.seed, self.earlier = pool, by, seed, earlier
        self._before, self._fit, self._keep = asked, fit, keep
        self.given: tuple[Given, ...] = ()
        self.person = fit(pool.differences[:0])
        self.accuracies = [self._expected()]
        """After each answer, the first before any: the share of the answers left that the profile expects to foretell."""

    @property
    def num_answers(self) -> int:
        """Of this interview and before."""
        return self.earlier + sum(given.preferred is not None for given in self.given)

    @property
    def left(self) -> int:
        """Pairs that were not asked yet."""
        return int((~self._asked()).sum())

    def question(self) -> Question | None:
        """What to ask now; None = the pool is used up."""
        asked = self._asked()
        if bool(asked.all()):
            return None
        generator = torch.Generator().manual_seed(derive(self.seed, "question", self.earlier, len(self.given)))
        place = choose(self.pool.differences, asked, self.person, self.by, generator)
        pair, swapped = self.pool.pairs[place], bool(derive(self.seed, "order", place) % 2)
        first, second = (pair.b, pair.a) if swapped else (pair.a, pair.b)
        return Question(len(self.given) + 1, place, pair.prompt, first, second, swapped)

    def answer(self, question: Question, better: Side | None) -> None:
        """Take an answer, fit the person again, and have it kept.

        Args:
            question: that was answered.
            better: of the responses as they were shown; None = skip.
        """
        preferred: Side | None = better
        if better is not None and question.swapped:
            preferred = "b" if better == "a" else "a"
        self._become((*self.given, Given(question.pair, preferred)), changed=preferred is not None)
        if preferred is not None:
            self.accuracies.append(self._expected())

    def undo(self) -> None:
        """Take back the last answer, or skip, of this interview; there must be one."""
        last = self.given[-1]
        self._become(self.given[:-1], changed=last.preferred is not None)
        if last.preferred is not None:
            self.accuracies.pop()

    def _expected(self) -> float:
        """Of the pairs that were not asked yet; of all of them where none is left."""
        asked = self._asked()
        return expected_accuracy(self.pool.differences[asked if asked.all() else ~asked], self.person)

    def _asked(self) -> Tensor:
        asked = self._before.clone()
        asked[[given.pair for given in self.given]] = True
        return asked

    def _become(self, given: tuple[Given, ...], changed: bool) -> None:
        """Take over what was given, once it is kept: an error on the way leaves everything as it was."""
        if changed:
            person = self._fit(signed(self.pool, given))
            self._keep(person, given)
            self.person = person
        self.given = given


def signed(pool: Pool, given: Sequence[Given]) -> Tensor:
    """Of the answers that say something, the features of the preferred response - those of the other.

    Args:
        pool: that was asked about.
        given: answers and skips.

    Returns:
        [n, d] float64.
    """
    rows = [pool.differences[each.pair] * (1 if each.preferred == "a" else -1) for each in given if each.preferred is not None]
    return torch.stack(rows) if rows else pool.differences[:0]
