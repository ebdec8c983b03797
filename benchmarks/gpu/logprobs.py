"""G4: log-probs and entropies over a vocabulary of 151,936, a few rows at a time, against full float32 log-softmax.

Both are given the same bfloat16 logits and make a gradient of them. Peak memory is beyond the logits. The least time is
that of reading the logits once forward, and once more backward to write a gradient of their size: three passes of their
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device import GIB, measured
from benchmarks.gpu.rows import Row, Scene, row
from tokens.logprobs import token_entropy, token_logprobs

VOCABULARY, TOKENS = 151_936, 4096
PASSES = 3
"""Times that the logits' bytes must move."""


def full(logits: Tensor, ids: Tensor) -> Tensor:
    """[1, n] log-probs by a float32 tensor of the logits' size.

    Args:
        logits: [1, n, V].
        ids: [1, n].

    Returns:
        [1, n] float32, nats.
    """
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def full_entropy(logits: Tensor) -> Tensor:
    """[1, n] entropies likewise.

    Args:
        logits: [1, n, V].

    Returns:
        [1, n] float32, nats.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def chunked(scene: Scene) -> Iterator[Row]:
    """Log-probs, then entropies.

    Args:
        scene: of the measurement.
    """
    kind, small = scene.device.kind, scene.settings.small
    tokens, vocabulary = (64, 512) if small else (TOKENS, VOCABULARY)
    generator = torch.Generator(kind).manual_seed(0)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    logits = torch.randn(1, tokens, vocabulary, device=kind, dtype=dtype, generator=generator).requires_grad_()
    ids = torch.randint(vocabulary, (1, tokens), device=kind, generator=generator)
    functions: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "log-probs": (partial(token_logprobs, logits, ids), partial(full, logits, ids)),
        "entropies": (partial(token_entropy, logits), partial(full_entropy, logits)),
    }
    for name, (ours, theirs) in functions.items():
        with torch.no_grad():
            differing = float((ours() - theirs()).abs().max())
        ways = {"chunked": partial(_with_gradient, ours, logits), "full": partial(_with_gradient, theirs, logits)}
        found = measured(kind, ways, scene.settings.repetitions)
        least = PASSES * logits.nbytes / scene.device.roofs.bandwidth
        beyond = {f"{way}_gib_beyond_logits": peak - logits.nbytes / GIB for way, peak in found.peaks.items() if peak is not None}
        figures = {"tokens": tokens, "to_nats": differing, "least_seconds": least, **beyond}
        limit = least / found.turns.seconds("full")
        yield row(("G4", f"{name} over 151,936 ids"), found, "chunked", "full", limit, **figures)


def _with_gradient(work: Callable[[], Tensor], logits: Tensor) -> None:
    torch.autograd.backward(work().sum())
    logits.grad = None
