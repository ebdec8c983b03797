"""Sequences one after another in rows, instead of each in a row of its own with padding behind it.

Letters: B sequences, T positions of the longest, R rows, W positions of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokens.logprobs import position_ids
from tokens.records import SequenceBatch


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in R <= B rows; positions start at 0 again with each, and by that the backbone knows where one ends.

    Args:
        input_ids: [R, W] int64.
        position_ids: [R, W] int64; a place that no sequence takes has position 0, so it is a sequence by itself.
        places: [B, T] int64, where in the flattened rows each position of ``sequences`` lies; 0 at its padding.
        sequences: the same sequences, padded; the poolings read its ids and masks.

    Raises:
        ValueError: if shapes differ.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    sequences: SequenceBatch

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.position_ids.shape or self.places.shape != self.sequences.input_ids.shape:
            raise ValueError(
                f"a packed batch needs ids and positions [R, W] and places [B, T], got {tuple(self.input_ids.shape)}, "
                f"{tuple(self.position_ids.shape)}, {tuple(self.places.shape)} for {tuple(self.sequences.input_ids.shape)}"
            )

    @classmethod
    def of(cls, sequences: SequenceBatch) -> PackedBatch:
        """Pack a batch into as few rows as first-fit-decreasing finds, none longer than its longest sequence.

        So attention, whose cost grows with a row's length squared, never costs more than it does with padding.

        Args:
            sequences: B sequences, each with at least one token.

        Returns:
            The packed batch, on the same device.

        Padding contract: equal for a batch with more padding on either side, except in the shape of ``places``.
        """
        mask = sequences.attention_mask
        lengths: list[int] = sequences.lengths().tolist()
        rows = fill_rows(lengths, max(lengths))
        width = max(sum(lengths[i] for i in row) for row in rows)
        starts = torch.zeros(len(lengths), 1, dtype=torch.int64)
        for number, row in enumerate(rows):
            start = number * width
            for i in row:
                starts[i] = start
                start += lengths[i]
        places = position_ids(mask) + starts.to(mask.device)  # [B, T]
        positions = mask.new_zeros(len(rows) * width, dtype=torch.int64)
        ids = positions + sequences.input_ids[mask][0]  # any token: transformers warns of padding without an attention mask
        ids[places[mask]] = sequences.input_ids[mask]
        positions[places[mask]] = position_ids(mask)[mask]
        return cls(ids.view(-1, width), positions.view(-1, width), places.masked_fill(~mask, 0), sequences)

    def unpack(self, hidden: Tensor) -> Tensor:
        """Hidden states as if the sequences had been padded.

        Args:
            hidden: [R, W, H].

        Returns:
            [B, T, H]; at padding, some other position's.
        """
        return hidden.flatten(0, 1)[self.places]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on ``device``."""
        return PackedBatch(
            self.input_ids.to(device), self.position_ids.to(device), self.places.to(device), self.sequences.to(device)
        )

    def __len__(self) -> int:
        return len(self.sequences)


def sees_neighbours(hidden: Callable[[Tensor, Tensor], Tensor], tokens: tuple[int, int], device: torch.device) -> bool:
    """Whether in packed rows the second sequence's states depend on the first one's tokens.

    Transformers reads from positions that start again where a sequence ends, but not under every attention and architecture.

    Args:
        hidden: ([R, W] ids, [R, W] positions) -> [R, W, H].
        tokens: two different ids.
        device: of the model.

    Returns:
        True if they differ by more than rounding.
    """
    a, b = tokens
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=device)
    one, other = (
        hidden(torch.tensor([[*first, a, b, a]] * 2, device=device), positions)[:, 3:] for first in ((a, a, a), (b, b, b))
    )  # equal shapes: only a mixture of experts, which sorts by token, rounds differently
    return not torch.allclose(one, other, rtol=0, atol=8 * torch.finfo(one.dtype).eps * float(one.abs().max()))


def fill_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing: each length, longest first, goes to the first row that still has room for it.

    Args:
        lengths: of the sequences, each in 1..width.
        width: most that the lengths of a row may add up to.

    Returns:
        Indices of the sequences of each row; every index once.

    Raises:
        ValueError: if a length is not in 1..width.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 1 <= lengths[i] <= width:
            raise ValueError(f"sequence {i} has {lengths[i]} tokens: expected 1 to {width}")
        row = next((row for row, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
