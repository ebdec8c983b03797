"""Responses to one prompt in one row behind it: the prompt is computed once, however many responses it has.

    row        p1 p2 p3 | a1 a2 | b1 b2 b3
    position    0  1  2    3  4    3  4  5
    b2 sees    p1 p2 p3 and b1 b2, and nothing of a

so that a row holds P + k R tokens where k rows of their own hold k (P + R).

Letters: B sequences, T positions of the longest, R rows, W positions of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tokens.records import SequenceBatch

Encoded = tuple[tuple[int, ...], tuple[int, ...]]
WORTH = 0.8
"""Rows of shared prompts are used where they hold at most this share of the tokens: below it attention to a mask costs more than
it saves."""
WIDEST = 2048
"""Positions of a row: what a mask holds, and attention computes, grows with their square. A prompt with more comes again."""


@dataclass(frozen=True)
class SharedBatch:
    """B sequences in R <= B rows, each row those of one prompt.

    Args:
        input_ids: [R, W] int64.
        position_ids: [R, W] int64; a response's go on from the prompt's.
        owner: [R, W] int64, whose token it is: 0 the prompt's, 1.. the responses', -1 at padding.
        places: [B, T] int64, where in the flattened rows each position of ``sequences`` lies; 0 at its padding.
        sequences: the same sequences, padded; the poolings read its ids and masks.
    """

    input_ids: Tensor
    position_ids: Tensor
    owner: Tensor
    places: Tensor
    sequences: SequenceBatch

    @classmethod
    def of(cls, rows: Sequence[Sequence[Encoded]], pad_id: int) -> SharedBatch:
        """Lay sequences out.

        Args:
            rows: R of them, each at least one sequence, of one prompt.
            pad_id: id written at padding.

        Returns:
            The batch, its sequences row by row, on the CPU.

        Raises:
            ValueError: if the sequences of a row have several prompts.

        Padding contract: there is no padding to give; what is made is read by nothing.
        """
        together = [sequence for row in rows for sequence in row]
        batch = SequenceBatch.from_ids([prompt for prompt, _ in together], [response for _, response in together], pad_id)
        width = max(row_width(row) for row in rows)
        longest = batch.input_ids.shape[1]
        # Lists first: a tensor operation for each piece takes longer than its numbers.
        ids, positions, owner, places = ([] for _ in range(4))
        for at, row in enumerate(rows):
            prompt = row[0][0]
            # 0 is the prompt, 1.. the responses
            own_ids, own_positions, owners = [*prompt], [*range(len(prompt))], [0] * len(prompt)
            first = at * width
            for index, (own_prompt, response) in enumerate(row, start=1):
                if own_prompt != prompt:
                    raise ValueError(f"row {at} has sequences of several prompts: expected one")
                start, end = first + len(own_ids), first + len(own_ids) + len(response)
                places.append(_filled([*range(first, first + len(prompt)), *range(start, end)], longest, 0))
                own_ids += response
                own_positions += range(len(prompt), len(prompt) + len(response))
                owners += [index] * len(response)
            ids.append(_filled(own_ids, width, pad_id))
            positions.append(_filled(own_positions, width, 0))
            owner.append(_filled(owners, width, -1))
        return cls(torch.tensor(ids), torch.tensor(positions), torch.tensor(owner), torch.tensor(places), batch)

    def mask(self) -> Tensor:
        """[R, 1, W, W] bool, made where the batch is: True where a position (third) sees another (fourth), that is what comes
        before it of the same owner or of the prompt, and itself; padding sees itself.
        """
        width = self.owner.shape[1]
        same = self.owner[:, :, None] == self.owner[:, None, :]
        prompt = (self.owner[:, None, :] == 0) & (self.owner[:, :, None] >= 0)
        earlier = torch.ones(width, width, dtype=torch.bool, device=self.owner.device).tril()
        return (((same | prompt) & earlier) | torch.eye(width, dtype=torch.bool, device=self.owner.device))[:, None]

    def unpack(self, hidden: Tensor) -> Tensor:
        """Hidden states as if every sequence had a row of its own.

        Args:
            hidden: [R, W, H].

        Returns:
            [B, T, H]; at padding, some other position's.
        """
        return hidden.flatten(0, 1)[self.places]

    def to(self, device: torch.device | str) -> SharedBatch:
        """The same batch on ``device``."""
        ids, positions, owner = (x.to(device) for x in (self.input_ids, self.position_ids, self.owner))
        return SharedBatch(ids, positions, owner, self.places.to(device), self.sequences.to(device))

    def __len__(self) -> int:
        return len(self.sequences)


def _filled(numbers: list[int], length: int, fill: int) -> list[int]:
    return numbers + [fill] * (length - len(numbers))


def row_width(row: Sequence[Encoded]) -> int:
    """Tokens of a prompt and all its responses."""
    return len(row[0][0]) + sum(len(response) for _, response in row)


def shared_passes(
    sequences: Sequence[Encoded], batch_size: int, kinds: Sequence[int] | None = None
) -> list[list[list[int]]] | None:
    """Which sequences share a row, and which rows a forward pass; rows of like widths go together.

    Args:
        sequences: B of (prompt ids, response ids).
        batch_size: sequences of a pass, >= 1.
        kinds: of each sequence; those of unlike kinds share no row. None = all are alike.

    Returns:
        Passes of rows of indices, every index once; None where that saves too little against a row for each sequence.
    """
    by_prompt: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault((0 if kinds is None else kinds[index], prompt), []).append(index)
    if len(by_prompt) == len(sequences):
        return None
    rows = [row for (_, prompt), own in by_prompt.items() for row in _cut(prompt, own, sequences, batch_size)]
    widths = {id(row): row_width([sequences[i] for i in row]) for row in rows}
    rows.sort(key=lambda row: -widths[id(row)])
    passes: list[list[list[int]]] = []
    room = 0
    for row in rows:
        if not passes or len(row) > room:
            passes.append([])
            room = batch_size
        passes[-1].append(row)
        room -= len(row)
    lengths = sorted((len(prompt) + len(response) for prompt, response in sequences), reverse=True)
    alone = sum(lengths[start] * len(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size))
    shared = sum(widths[id(each[0])] * len(each) for each in passes)
    return passes if shared <= WORTH * alone else None


def _cut(prompt: tuple[int, ...], own: Sequence[int], sequences: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """A prompt's sequences in rows that are neither too wide nor too many for a pass."""
    rows: list[list[int]] = []
    width = 0
    for index in own:
        length = len(sequences[index][1])
        if not rows or len(rows[-1]) == batch_size or width + length > WIDEST:
            rows.append([])
            width = len(prompt)
        rows[-1].append(index)
        width += length
    return rows


def sees_as_it_is_told(config: PreTrainedConfig, longest: int) -> bool:
    """Whether a model's attention can be given by a mask alone, as far as its config says.

    Args:
        config: of the backbone.
        longest: tokens of the longest sequence; a window that is not shorter plays no part.

    Returns:
        False for other attention than PyTorch's, for layers that are not attention, and for shorter windows.
    """
    if config._attn_implementation != "sdpa":
        return False
    settings = config.get_text_config().to_dict()
    kinds = set(settings["layer_types"] or ()) if "layer_types" in settings else set()
    window = settings["sliding_window"] if "sliding_window" in settings else None
    return kinds <= {"full_attention", "sliding_attention"} and (window is None or longest <= window)
