"""Which hidden state of a sequence is its feature vector.

Two habits share the word "last" and mean different tokens (the off-by-one trap):

    tokens          w1  w2  w3  EOS  pad
    here, HF, TRL               last            "last" = the last token that is not padding; EOS where the response ended
    DSP             last(w3)    eos(EOS)        its "last" = the token before EOS, its "eos" = the last token that is not padding

So DSP's "eos" is our "last", and DSP's "last", offered by nobody else, is our "before_last". Our "eos" is the response's *first*
EOS, which differs from "last" where text follows it.

Letters: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

import torch
from torch import Tensor

from rm.config import Pooling
from tokens.records import SequenceBatch


def pool(hidden: Tensor, batch: SequenceBatch, pooling: Pooling, eos_ids: Sequence[int]) -> Tensor:
    """One hidden state per sequence.

        last: h at the last attended token
        before_last: h at the token before that one (before EOS, where the response ended); at the only token where there is one
        eos:  h at the first EOS of the response; at the response's last token where it has none
        mean: sum of h over the response's tokens / their number
        max:  elementwise maximum of h over the response's tokens (padding counts as -inf, not as 0)

    Source: Everyone Deserves A Reward (2309.03126), the four poolings of its code; "last" as Hugging Face means it, see above.

    Args:
        hidden: [B, T, H] float, the backbone's last hidden states.
        batch: the B sequences they belong to.
        pooling: one of the five.
        eos_ids: ids that end a response; read by "eos" only.

    Returns:
        [B, H], dtype of ``hidden``; a mean at least float32.

    Raises:
        ValueError: if a sequence has no response token, except with "last" and "before_last".

    Padding contract: equal for a batch with more padding on either side, gradients too.
    """
    if pooling == "last":
        return _at(hidden, _last(batch.attention_mask))
    if pooling == "before_last":
        length = batch.attention_mask.sum(-1)
        return _at(hidden, _last(batch.attention_mask) - (length > 1).long())
    counts = batch.response_mask.sum(-1)  # [B]
    if bool((counts == 0).any()):
        raise ValueError(f"{pooling} pooling: sequence {int((counts == 0).nonzero()[0])} of the batch has no response token")
    inside = batch.response_mask.unsqueeze(-1)  # [B, T, 1]
    match pooling:
        case "eos":
            ends = torch.isin(batch.input_ids, torch.tensor(list(eos_ids), device=hidden.device)) & batch.response_mask
            return _at(hidden, torch.where(ends.any(-1), ends.long().argmax(-1), _last(batch.response_mask)))
        case "mean":
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return hidden.masked_fill(~inside, 0).sum(1, dtype=wide) / counts.unsqueeze(-1)
        case "max":
            return hidden.masked_fill(~inside, -torch.inf).amax(1)
        case _:
            assert_never(pooling)


def left_aligned(batch: SequenceBatch) -> SequenceBatch:
    """The same sequences with all padding on the right, so that position t of a row is the sequence's t-th token.

    Args:
        batch: B sequences.

    Returns:
        [B, T] as well.
    """
    order = batch.attention_mask.long().argsort(dim=-1, descending=True, stable=True)  # [B, T]
    parts = (batch.input_ids, batch.attention_mask, batch.response_mask)
    return SequenceBatch(*(part.gather(-1, order) for part in parts))


def reads_padding(features: Callable[[SequenceBatch], Tensor], tokens: tuple[int, int]) -> bool:
    """Whether padding behind a sequence changes its features, as where a classifier takes the last position whatever is there.

    Args:
        features: [B, H] of a batch on the CPU.
        tokens: two different ids.

    Returns:
        True if they differ by more than rounding.
    """
    a, b = tokens
    mask = torch.tensor([[True, True, True, False, False]])
    padded = SequenceBatch(torch.tensor([[a, b, a, b, b]]), mask, mask)
    one, other = features(padded.rows(torch.tensor([0]))), features(padded)
    return not torch.allclose(one, other, rtol=0, atol=torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max()))


def _last(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)  # [B]


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden[torch.arange(len(index), device=index.device), index]  # not a view, which FSDP2 would warn of
