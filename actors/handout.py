"""Sharing out prompts over engines that come and go: which piece is taken next, what is done, what must be done again.

Plain bookkeeping, without Ray. Every prompt of a batch is in exactly one place: not taken yet, out with one engine, or answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.rollout import CHUNK, occurrences
from tokens.records import Prompt, Rollout

LEAST_SAMPLES = 16
"""Of a piece, where so many are left: an engine is slow on a few sequences at a time."""
MOST_TRIES = 3
"""Engines that may die over one piece; after that the piece is what kills them."""


@dataclass(frozen=True)
class Piece:
    """Prompts that one engine is given at once.

    Args:
        batch: number of the batch.
        start: place of the first prompt in the batch.
        prompts: in the batch's order.
        occurrences: how often each came before in the batch.
        samples_per_prompt: k.
        seed: of the batch.
        version: the oldest policy version that may answer.
        lost: engines that died over it.
    """

    batch: int
    start: int
    prompts: tuple[Prompt, ...]
    occurrences: tuple[int, ...]
    samples_per_prompt: int
    seed: int
    version: int
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"prompts {self.start} to {self.start + len(self.prompts) - 1} of batch {self.batch}"


@dataclass
class _Batch:
    whole: Piece
    taken: int
    answers: dict[int, list[Rollout]]

    @property
    def done(self) -> int:
        """Samples."""
        return sum(len(answer) for answer in self.answers.values())


class HandOut:
    """The batches under way, oldest first.

    Pieces are large at first and small at the end, so that engines finish together and one that joins late finds work: each is
    an equal share of half of what is left of its batch.

    Args:
        most_engines: that may share the work.
    """

    def __init__(self, most_engines: int) -> None:
        self.most_engines = most_engines
        self._batches: dict[int, _Batch] = {}
        self._again: deque[Piece] = deque()
        self._out: set[tuple[int, int]] = set()
        self._number = 0

    @property
    def waiting(self) -> bool:
        """Whether there is a piece to take."""
        return bool(self._again) or any(batch.taken < len(batch.whole.prompts) for batch in self._batches.values())

    @property
    def samples(self) -> tuple[int, int, int]:
        """Of the batches under way: samples done, samples asked for, tokens of those done."""
        batches = self._batches.values()
        rollouts = [rollout for batch in batches for answer in batch.answers.values() for rollout in answer]
        total = sum(len(batch.whole.prompts) * batch.whole.samples_per_prompt for batch in batches)
        return len(rollouts), total, sum(len(rollout.response_ids) for rollout in rollouts)

    def add(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> int:
        """A batch that is asked for; its number."""
        self._number += 1
        whole = Piece(self._number, 0, tuple(prompts), occurrences(prompts), samples_per_prompt, seed, version)
        self._batches[self._number] = _Batch(whole, 0, {})
        return self._number

    def take(self) -> Piece:
        """The next piece: what a dead engine left, else the next prompts of the oldest batch that has some."""
        if self._again:
            piece = self._again.popleft()
        else:
            batch = next(batch for batch in self._batches.values() if batch.taken < len(batch.whole.prompts))
            here = slice(batch.taken, batch.taken + self._size(batch))
            prompts = batch.whole.prompts[here]
            piece = replace(batch.whole, start=batch.taken, prompts=prompts, occurrences=batch.whole.occurrences[here])
            batch.taken += len(prompts)
        self._out.add((piece.batch, piece.start))
        return piece

    def _size(self, batch: _Batch) -> int:
        left = len(batch.whole.prompts) - batch.taken
        least = -(-LEAST_SAMPLES // batch.whole.samples_per_prompt)
        return min(max(-(-left // (2 * self.most_engines)), least), CHUNK)

    def again(self, piece: Piece, engine: str) -> Piece:
        """An engine died over a piece: it is the next one to be taken, if its batch is still wanted.

        Returns:
            The piece, with the engine among those that it was lost with.
        """
        lost = replace(piece, lost=(*piece.lost, engine))
        if piece.batch in self._batches:
            self._out.remove((piece.batch, piece.start))
            self._again.append(lost)
        return lost

    def done(self, piece: Piece, rollouts: list[Rollout]) -> list[Rollout] | None:
        """An engine has answered a piece.

        Returns:
            The whole batch, prompt by prompt, once nothing of it is missing; else None.

        Raises:
            KeyError: if the piece is not out: its answer is here already, or another engine has it now.
            RuntimeError: if the answer is not k samples of each prompt, in order.
        """
        if piece.batch not in self._batches:
            return None
        self._out.remove((piece.batch, piece.start))
        asked = [(prompt.id, sample) for prompt in piece.prompts for sample in range(piece.samples_per_prompt)]
        if [(rollout.prompt.id, rollout.sample) for rollout in rollouts] != asked:
            raise RuntimeError(
                f"{piece} came back with {len(rollouts)} rollouts, or in another order: {piece.samples_per_prompt} of each of "
                f"the {len(piece.prompts)} were asked for"
            )
        batch = self._batches[piece.batch]
        batch.answers[piece.start] = rollouts
        if batch.done < len(batch.whole.prompts) * batch.whole.samples_per_prompt:
            return None
        del self._batches[piece.batch]
        return [rollout for start in sorted(batch.answers) for rollout in batch.answers[start]]

    def drop(self, number: int) -> None:
        """A batch has failed; what is out of it comes back for nothing."""
        del self._batches[number]
        self._again = deque(piece for piece in self._again if piece.batch != number)
        self._out = {(batch, start) for batch, start in self._out if batch != number}
