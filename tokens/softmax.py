"""Reductions of logits over the vocabulary that hold no second float32 tensor of the logits' size.

Letters: n rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Numbers that are float32 at a time: 64 MiB."""


class _Chunked(torch.autograd.Function):
    """A reduction of [n, V] logits to [n], over a few rows at a time in both directions. What is kept is the logits themselves.

    The gradient has the logits' dtype. It is computed once: there is no second derivative.
    """

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (grad,) = gradients
        logits, normalisers, *others = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            logprobs = logits[rows].float() / ctx.temperature - normalisers[rows, None]  # [c, V]
            slope = ctx.slope(logprobs, grad[rows, None], *(x[rows, None] for x in others))
            result[rows] = slope.div_(ctx.temperature)
        return result, None, None


class _Logprobs(_Chunked):
    """log p_y:  d/ds_v = [v = y] - p_v, s the scaled logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        chosen, normalisers = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        for rows in _chunks(logits):
            scaled = logits[rows].float() / temperature
            chosen[rows] = scaled.gather(-1, token_ids[rows, None]).squeeze(-1)
            normalisers[rows] = torch.logsumexp(scaled, dim=-1)
        ctx.save_for_backward(logits, normalisers, token_ids)
        ctx.temperature = temperature
        ctx.slope = lambda logprobs, grad, ids: logprobs.exp_().mul_(-grad).scatter_add_(-1, ids, grad)
        return chosen - normalisers


class _Entropy(_Chunked):
    """H = -sum_v p_v log p_v:  d/ds_v = -p_v (log p_v + H), s the scaled logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: None, temperature: float) -> Tensor:
        entropies, normalisers = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        for rows in _chunks(logits):
            scaled = logits[rows].float() / temperature
            normalisers[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs = scaled.sub_(normalisers[rows, None])
            entropies[rows] = -(logprobs.exp() * logprobs).sum(-1)
        ctx.save_for_backward(logits, normalisers, entropies)
        ctx.temperature = temperature
        ctx.slope = lambda logprobs, grad, entropy: (logprobs + entropy).mul_(logprobs.exp_()).mul_(-grad)
        return entropies


def chosen_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the given ids; bit for bit what plain operations give, gradient included.

    Args:
        logits: [n, V] float.
        token_ids: [n] int64.
        temperature: > 0.

    Returns:
        [n] float32, nats.
    """
    return cast(Tensor, _Logprobs.apply(logits, token_ids, temperature))  # type: ignore[no-untyped-call]


def entropies(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature).

    Args:
        logits: [n, V] float, finite.
        temperature: > 0.

    Returns:
        [n] float32, nats.
    """
    return cast(Tensor, _Entropy.apply(logits, None, temperature))  # type: ignore[no-untyped-call]


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
