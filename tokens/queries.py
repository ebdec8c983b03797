"""A prompt with several scored responses, as ids of the model that will rank them."""

from __future__ import annotations

import math
from dataclasses import dataclass

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A prompt and responses to it that somebody has scored.

    Args:
        id: unique in its data set.
        prompt_ids: ids of the prompt; not empty.
        responses: k >= 2 responses, EOS included; none empty.
        scores: of each, any finite unit; only their order within the query counts, ties say nothing.
        domain: the domain that the scores are of, or "".

    Raises:
        ValueError: if something is empty, there are not k scores, or one is not finite.
    """

    id: str
    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    scores: tuple[float, ...]
    domain: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_ids or not all(self.responses):
            raise ValueError(f"query {self.id!r}: prompt and responses must all have tokens")
        if len(self.responses) < 2 or len(self.scores) != len(self.responses):
            raise ValueError(
                f"query {self.id!r}: needs at least 2 responses and a score for each, got {len(self.responses)} and "
                f"{len(self.scores)}"
            )
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"query {self.id!r}: a score is not finite")

    @property
    def comparisons(self) -> tuple[tuple[int, int], ...]:
        """(better, worse) indices of all responses whose scores differ; none where all are tied."""
        order = range(len(self.scores))
        return tuple((j, k) for j in order for k in order if self.scores[j] > self.scores[k])

    @property
    def preferred(self) -> tuple[int, ...]:
        """Indices of the responses that are worth imitating: those with s / (max s + 1e-5) > 0.85.

        Scores below 0 are first moved up so that the least is 0. Of a preference pair it is the chosen response.

        Source: Everyone Deserves A Reward (2309.03126), its official code (normalised scores above 0.85).
        """
        least = min(0.0, *self.scores)
        highest = max(self.scores) - least
        return tuple(i for i, score in enumerate(self.scores) if (score - least) / (highest + 1e-5) > PREFERRED)


PREFERRED = 0.85
"""Normalised score above which a response is imitated."""
