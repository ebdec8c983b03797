"""Sequences one after another in one row, without padding, each seeing only itself.

Letters: B sequences, T positions of the padded batch, N tokens of all sequences together, H heads, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tokens.errors import UserError
from tokens.records import SequenceBatch

PACKED = "rondo_packed"
"""Name of our attention in transformers (``attn_implementation``). Transformers knows no mask of that name, and makes none."""
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures hand to their attention and ours cannot do."""


@dataclass(frozen=True)
class PackedRow:
    """B sequences in one row.

    Args:
        input_ids: [1, N] int64.
        position_ids: [1, N] int64, from 0 again where a sequence begins.
        bounds: [B + 1] int32, where in the row each sequence begins, and N.
        longest: tokens of the longest sequence.
        places: [N] int64, where in the flattened [B, T] batch each token of the row lies.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: int
    places: Tensor

    @classmethod
    def of(cls, batch: SequenceBatch) -> PackedRow:
        """Lay the rows of a batch one after another.

        Args:
            batch: B sequences.

        Returns:
            The row, on the same device.

        Padding contract: equal for a batch with more padding on either side, except in ``places``.
        """
        mask, lengths = batch.attention_mask, batch.lengths()
        bounds = nn.functional.pad(lengths.cumsum(0), (1, 0))
        places = mask.flatten().nonzero().squeeze(-1)
        positions = torch.arange(len(places), device=mask.device) - bounds[:-1].repeat_interleave(lengths)
        return cls(batch.input_ids.flatten()[places][None], positions[None], bounds.to(torch.int32), int(lengths.max()), places)

    def inputs(self) -> dict[str, Any]:
        """What a model with our attention is called with; the names are transformers' (FlashAttentionKwargs)."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "use_cache": False,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def is_packed(model: nn.Module) -> bool:
    """Whether a model of transformers was loaded with our attention, and so wants its sequences packed.

    Args:
        model: of transformers.
    """
    return getattr(model, "config")._attn_implementation == PACKED  # type: ignore[no-any-return]  # noqa: B009


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence of a packed row to itself; transformers calls it by the name ``PACKED``.

        o_t = sum_s softmax_s(scaling * q_t . k_s) v_s   over s <= t in t's own sequence (and s > t - sliding_window)

    In bfloat16 and float16 on a GPU it is one call of FlashAttention's kernel for lengths that vary
    (``torch.nn.attention.varlen``); else one of PyTorch's attention per sequence, which is exact and wastes nothing.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, heads of keys, N, D]; fewer than H where heads share one (GQA).
        value: like ``key``.
        attention_mask: None.
        scaling: None = 1 / sqrt(D).
        dropout: 0; the learner trains without.
        sliding_window: how far back a token sees; None = to the beginning.
        is_causal: None = the layer's.
        cu_seq_lens_q: [B + 1] int32, where each sequence begins, and N.
        max_length_q: the longest sequence's tokens.
        others: what else the architecture hands over.

    Returns:
        [1, N, H, D], and None for the weights.

    Raises:
        UserError: if the row comes without its bounds, or the architecture wants of its attention what this one cannot do.
    """
    name = type(module).__name__
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise UserError(
            f"{name} was called without the bounds of its sequences: either the batch was not packed, or this architecture does "
            "not hand them on to its attention. Set policy.packing to false"
        )
    asked = [key for key in _UNKNOWN if key in others and others[key] is not None]
    causal = is_causal if is_causal is not None else module.__dict__.get("is_causal", True)
    if asked or dropout or not causal:
        what = asked[0] if asked else f"dropout {dropout:g}" if dropout else "attention to later tokens"
        raise UserError(f"{name} asks for {what}, which attention to packed sequences cannot do. Set policy.packing to false")
    dtype = _kernel_dtype(query)
    if query.is_cuda and dtype in (torch.bfloat16, torch.float16):
        query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [N, H, D]
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q.tolist())]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    parts = [_alone(q, k, v, scaling, sliding_window) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse an architecture whose packed sequences would see each other, or anything else than they see alone.

    Args:
        model: loaded with our attention, whole, on the CPU.

    Raises:
        UserError: if packed hidden states differ from those of PyTorch's own attention on each sequence alone.
    """
    backbone, name = model.base_model, type(model).__name__
    settings = model.config.get_text_config().to_dict()
    kinds = set(settings["layer_types"] or ()) if "layer_types" in settings else set()
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{name} has layers of {', '.join(unknown)}, which packed attention does not know. Set policy.packing to false"
        )
    a, b = [token for token in range(3) if token != model.config.pad_token_id][:2]
    sequences = ([a, b, a, a], [b, a, b], [a])
    together = PackedRow.of(SequenceBatch.from_ids([x[:1] for x in sequences], [x[1:] for x in sequences], a))
    tolerance = max(1e-3, 8 * torch.finfo(model.dtype).eps)
    packed = backbone(**together.inputs()).last_hidden_state[0].split([len(x) for x in sequences])
    model.set_attn_implementation("sdpa")
    try:
        for got, sequence in zip(packed, sequences, strict=True):
            wanted = backbone(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
            if not torch.allclose(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max())):
                raise UserError(
                    f"{name} gives packed sequences other states than each by itself: its attention does not keep them apart, or "
                    "is not a plain causal one. Set policy.packing to false"
                )
    finally:
        model.set_attn_implementation(PACKED)


def _kernel_dtype(query: Tensor) -> torch.dtype:
    """Under autocast queries and keys come out of the rotation in float32, and values in its dtype."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _alone(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One sequence: [1, H, length, D]."""
    length = query.shape[2]
    band = None
    if window is not None and length > window:
        at = torch.arange(length, device=query.device)
        band = (at[:, None] >= at) & (at[:, None] - at < window)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, band, is_causal=band is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """[N, H, D] by the GPU's kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UserError(
            f"torch {torch.__version__} has no torch.nn.attention.varlen, which packed sequences need on a GPU in half "
            "precision: install torch 2.11 or newer, or set policy.packing to false"
        ) from error
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] and _asks_for_gqa(varlen_attn) else {}
    output = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return cast(Tensor, output)  # the sums of exponentials come with it only where they are asked for


@cache
def _asks_for_gqa(kernel: Callable[..., Any]) -> bool:
    """Torch 2.11's kernel takes fewer heads of keys without a word; since 2.12 one must say that it is meant."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def token_groups(lengths: Sequence[int], limit: int, at_least: int = 1, padded: bool = False) -> list[list[int]]:
    """Sequences in groups of at most ``limit`` tokens, like lengths together; a longer sequence is alone in its group.

    Args:
        lengths: of the sequences, at least one.
        limit: tokens.
        at_least: how many groups to make, at most as many as there are sequences; the largest are halved until there are.
        padded: True counts every sequence of a group as long as its longest, which is what it takes without packing.

    Returns:
        Indices of each group; every index once.

    Raises:
        ValueError: if more groups are asked for than there are sequences.
    """
    if at_least > len(lengths):
        raise ValueError(f"{len(lengths)} sequences do not make {at_least} groups")
    groups: list[list[int]] = []
    size = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # i is the longest of its group so far
        size = lengths[i] * (len(groups[-1]) + 1) if groups and padded else size + lengths[i]
        if not groups or size > limit:
            groups.append([])
            size = lengths[i]
        groups[-1].append(i)
    while len(groups) < at_least:
        largest = max((g for g in range(len(groups)) if len(groups[g]) > 1), key=lambda g: sum(lengths[i] for i in groups[g]))
        group = groups[largest]
        groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups
