"""Many pairs in little room: all token ids lie in one array, and a pair is made of them when it is asked for.

Letters: N pairs, n of them in view, L token ids in all.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from tokens.records import Pair


@dataclass(frozen=True, eq=False)
class PairStore(Sequence[Pair]):
    """Pairs as a few arrays, which processes of one machine can share without a copy; views of it share them too.

    Args:
        tokens: [L] int32, of each pair its prompt, its chosen and its rejected response, one after another.
        edges: [3 N + 1] int64, where in ``tokens`` each of these begins, and the end.
        names: UTF-8 of all ids, uint8.
        name_edges: [N + 1] int64, where in ``names`` each id begins, and the end.
        domains: the domains there are.
        domain: [N] int32, which of them each pair is of.
        margin: [N] float64.
        smoothing: [N] float64.
        rows: [n] int64, the pairs in view, in their order.
    """

    tokens: np.ndarray
    edges: np.ndarray
    names: np.ndarray
    name_edges: np.ndarray
    domains: tuple[str, ...]
    domain: np.ndarray
    margin: np.ndarray
    smoothing: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> PairStore:
        """Put pairs into a store, one after another."""
        builder = PairStoreBuilder()
        for pair in pairs:
            builder.add(pair)
        return builder.build()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairStore: ...
    def __getitem__(self, index: int | slice) -> Pair | PairStore:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(self.rows[index])
        edges = self.edges[3 * row : 3 * row + 4].tolist()
        prompt, chosen, rejected = (tuple(self.tokens[a:b].tolist()) for a, b in zip(edges[:-1], edges[1:], strict=True))
        domain, margin, smoothing = self.domains[self.domain[row]], float(self.margin[row]), float(self.smoothing[row])
        return Pair(self._id(row), prompt, chosen, rejected, domain, margin, smoothing)

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Equal pairs in equal order."""
        if not isinstance(other, PairStore):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the pairs in view."""
        return (self._id(row) for row in self.rows.tolist())

    def take(self, index: np.ndarray) -> PairStore:
        """A view of some of the pairs in view.

        Args:
            index: [m] int64 of them, in the order wanted.
        """
        return replace(self, rows=self.rows[index])

    def plain(self) -> PairStore:
        """The same pairs, without margins and smoothing."""
        return replace(self, margin=np.zeros_like(self.margin), smoothing=np.zeros_like(self.smoothing))

    def _id(self, row: int) -> str:
        return self.names[self.name_edges[row] : self.name_edges[row + 1]].tobytes().decode()


class PairStoreBuilder:
    """A store that is not full yet."""

    def __init__(self) -> None:
        self._tokens, self._edges = array("i"), array("q", [0])
        self._names, self._name_edges = bytearray(), array("q", [0])
        self._domains: dict[str, int] = {}
        self._domain, self._margin, self._smoothing = array("i"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._domain)

    def add(self, pair: Pair) -> None:
        """Add one pair."""
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            self._tokens.extend(ids)
            self._edges.append(len(self._tokens))
        self._names += pair.id.encode()
        self._name_edges.append(len(self._names))
        self._domain.append(self._domains.setdefault(pair.domain, len(self._domains)))
        self._margin.append(pair.margin)
        self._smoothing.append(pair.smoothing)

    def build(self) -> PairStore:
        """The store; it takes the builder's memory as it is, and nothing can be added any more."""
        return PairStore(
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._edges, np.int64),
            np.frombuffer(self._names, np.uint8),
            np.frombuffer(self._name_edges, np.int64),
            tuple(self._domains),
            np.frombuffer(self._domain, np.int32),
            np.frombuffer(self._margin, np.float64),
            np.frombuffer(self._smoothing, np.float64),
            np.arange(len(self)),
        )
