"""Sequences in batches: who sees which pair when, and how many are scored in one forward pass.

Letters: B sequences.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rm.model import RewardModel
from rm.packing import PackedBatch
from rm.shared_prompts import SharedBatch, shared_passes
from tokens.ranks import ALONE, Ranks
from tokens.records import Pair, SequenceBatch

TokenIds = tuple[int, ...]
_Row = TypeVar("_Row")
Encoded = tuple[TokenIds, TokenIds]
"""Prompt ids and response ids of one sequence."""
Shared = list[list[int]]
"""Of a forward pass: the sequences of each row, by their indices."""
Pass = tuple[list[int], SequenceBatch | PackedBatch | SharedBatch]
"""Indices of a forward pass's sequences, and their batch."""


def by_length(rows: Sequence[_Row], length: Callable[[_Row], int], size: int) -> list[list[_Row]]:
    """Rows in parts of at most ``size``, those of like length together."""
    order = sorted(rows, key=length)
    return [order[start : start + size] for start in range(0, len(order), size)]


def pair_length(pair: Pair) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def score_sequences(
    model: RewardModel,
    sequences: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    ranks: Ranks = ALONE,
    packing: bool = False,
) -> Tensor:
    """Scores without gradient, in batches of similar length; responses to one prompt in one row behind it, where that saves work.

    Args:
        model: on its device.
        sequences: B of (prompt ids, response ids); may be none.
        batch_size: sequences per forward pass, >= 1.
        pad_id: id written at padding.
        ranks: that share the model; all must call this, with the same sequences.
        packing: True puts a batch's sequences one after another instead, see ``rm.packing``; lengths are then left mixed.

    Returns:
        [B] on the CPU, in the order given; scores of the model, unnormalised.

    Raises:
        ValueError: if ``batch_size`` is below 1.

    Padding contract: a sequence's score does not depend on those beside it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if ranks.size == 1:
        return score_passes(model, lay_out(model, sequences, batch_size, pad_id, packing, share=True), len(sequences))
    order = list(range(len(sequences)))
    if not packing:
        order.sort(key=lambda i: -(len(sequences[i][0]) + len(sequences[i][1])))
    scores = torch.zeros(len(sequences))
    if not order:
        return scores
    own = share_rows(order, ranks)
    with torch.no_grad():
        parts = [
            scores_of(model, [sequences[i] for i in own[start : start + batch_size]], pad_id, batch_size, packing)
            for start in range(0, len(own), batch_size)
        ]
    scores[order] = ranks.gather(torch.cat(parts), len(order)).to("cpu", scores.dtype)
    return scores


def score_passes(model: RewardModel, passes: Iterable[Pass], number: int) -> Tensor:
    """Scores without gradient of what ``lay_out`` laid out, for this model or another of its architecture.

    Args:
        model: on its device.
        passes: of all sequences.
        number: B.

    Returns:
        [B] on the CPU, in the order that the sequences were given in.
    """
    device = next(model.parameters()).device
    scores, taken, parts = torch.zeros(number), list[int](), list[Tensor]()
    with torch.no_grad():
        for rows, batch in passes:
            taken += rows
            parts.append(model(batch.to(device)))
    if parts:
        scores[taken] = torch.cat(parts).to("cpu", scores.dtype)  # at the end: a device is not waited for between passes
    return scores


def share_rows(rows: Sequence[_Row], ranks: Ranks) -> list[_Row]:
    """The rows that this rank works on; see ``Ranks.share``."""
    return [rows[i] for i in ranks.share(torch.arange(len(rows))).tolist()]


def scores_of(
    model: RewardModel, sequences: Sequence[Encoded], pad_id: int, microbatch: int, packing: bool = False, share: bool = False
) -> Tensor:
    """[B] scores in the order given, with gradient; like lengths share a forward pass, so that little is spent on padding.

    With ``packing`` unlike lengths do, which fill rows better. The number of forward passes depends on B and ``microbatch``
    only, so that ranks with equally many sequences make equally many. Not so with ``share``, which lets responses stand behind
    their common prompt (``rm.shared_prompts``) where the model allows it and it saves work: for one rank, without ``packing``.
    """
    return scores_and_features_of(model, sequences, pad_id, microbatch, packing, share)[0]


def features_of(model: RewardModel, sequences: Sequence[Encoded], pad_id: int, microbatch: int, packing: bool = False) -> Tensor:
    """[B, H] features in the order given, with gradient; batched as ``scores_of``."""
    return scores_and_features_of(model, sequences, pad_id, microbatch, packing)[1]


def scores_and_features_of(
    model: RewardModel, sequences: Sequence[Encoded], pad_id: int, microbatch: int, packing: bool = False, share: bool = False
) -> tuple[Tensor, Tensor]:
    """[B] scores and [B, H] features of the same forward passes, in the order given, with gradient; batched as ``scores_of``."""
    device = next(model.parameters()).device
    taken, parts = [], []
    for rows, batch in lay_out(model, sequences, microbatch, pad_id, packing, share):
        taken += rows
        parts.append(model(batch.to(device), both=True))
    back = torch.tensor(taken).argsort().to(device)
    scores, features = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    return scores, features


def lay_out(
    model: RewardModel, sequences: Sequence[Encoded], size: int, pad_id: int, packing: bool = False, share: bool = False
) -> Iterator[Pass]:
    """The forward passes that compute all sequences, laid out one by one as they are asked for.

    Args:
        model: that computes them; decides whether responses may stand behind their prompt.
        sequences: B of (prompt ids, response ids); may be none.
        size: sequences of a pass, >= 1.
        pad_id: id written at padding.
        packing: True puts a pass's sequences one after another, and unlike lengths together, which fill rows better.
        share: True lets responses stand behind their common prompt, without ``packing``, where it saves work.

    Returns:
        Of each pass, the sequences' indices and their batch, on the CPU.
    """
    shared = passes_behind_prompts(model, sequences, size) if share and not packing else None
    if shared is not None:
        for together in shared:
            yield [i for row in together for i in row], SharedBatch.of([[sequences[i] for i in row] for row in together], pad_id)
        return
    # the longest first: what is too much for the memory shows at once
    order = sorted(range(len(sequences)), key=lambda i: -(len(sequences[i][0]) + len(sequences[i][1])))
    passes = -(-len(order) // size)
    for number in range(passes):
        rows = order[number::passes] if packing else order[number * size :][:size]
        batch = SequenceBatch.from_ids([sequences[i][0] for i in rows], [sequences[i][1] for i in rows], pad_id)
        yield rows, PackedBatch.of(batch) if packing else batch


def passes_behind_prompts(model: RewardModel, sequences: Sequence[Encoded], batch_size: int) -> list[Shared] | None:
    """Passes of rows behind common prompts; None where the model does not allow it, or it saves too little."""
    passes = shared_passes(sequences, batch_size)
    longest = max((len(prompt) + len(response) for prompt, response in sequences), default=0)
    return passes if passes is not None and model.shares_prompts(longest) else None


def pair_sequences(pairs: Sequence[Pair]) -> list[Encoded]:
    """All chosen, then all rejected."""
    return [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]


def pair_batches(pairs: Sequence[Pair], size: int, epochs: int, seed: int) -> Iterator[list[Pair]]:
    """Every pair once an epoch, ``size`` at a time, in an order that the seed decides; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [pairs[i] for i in order[start : start + size]]


def draw_groups(groups: Sequence[Sequence[Encoded]], size: int, seed: int) -> Iterator[list[Sequence[Encoded]]]:
    """Endless batches of min(size, all) prompts' groups; every prompt comes up once before any comes up again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < min(size, len(groups)):
            queue += torch.randperm(len(groups), generator=generator).tolist()
        taken, queue = queue[:size], queue[size:]
        yield [groups[i] for i in taken]
