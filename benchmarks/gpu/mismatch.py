"""G9: how far the trainer's log-probs lie from the sampler's, and what it would cost to make batches not matter.

The sampler is transformers' decoding in bfloat16 weights, a token at a time over a cache; the trainer computes whole
sequences with float32 weights under autocast: eight at a time and padded, packed, or one at a time, which no neighbour can
change. KL(sampler || trainer) is the mean over the sampled tokens of k1 = log p - log q and of k3 = q / p - 1 - log(q / p),
nats. A vLLM engine is another sampler: a run reports its k3 as `policy/sampler_kl` (docs/metrics.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.gpu.device import computing, measured
from benchmarks.gpu.models import PAD, SHAPES, language_model
from benchmarks.gpu.rows import Row, Scene, row
from policy.kl import kl_estimate
from tokens.logprobs import response_logprobs
from tokens.packing import PACKED
from tokens.records import Prompt, Rollout, SequenceBatch

SHARPER = 4.0
"""The head's weights are multiplied by it: a random model's own logits are so alike that nothing could differ much."""
BATCH = 8
LAYOUTS = {"padded": ("sdpa", BATCH), "packed": (PACKED, BATCH), "one at a time": ("sdpa", 1)}
"""Attention, and sequences of a forward pass."""


@torch.no_grad()
def sample(model: LlamaForCausalLM, number: int, prompt: int, response: int) -> list[Rollout]:
    """Responses by decoding with a cache, the i-th of them cut so that lengths differ; log-probs are those that it drew from.

    Args:
        model: the sampler, on its device.
        number: of prompts, one response to each.
        prompt: tokens of each.
        response: tokens of the longest response.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (number, prompt), device=device, generator=generator)
    found, logprobs, cache, given = [], [], None, ids
    for _ in range(response):
        out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        every, cache = torch.log_softmax(out.logits[:, -1].float(), dim=-1), out.past_key_values
        given = torch.multinomial(every.exp(), 1, generator=generator)
        found.append(given)
        logprobs.append(every.gather(-1, given))
    drawn, values = torch.cat(found, 1).tolist(), torch.cat(logprobs, 1).tolist()
    rollouts = []
    for i, (prompt_ids, own, sampled) in enumerate(zip(ids.tolist(), drawn, values, strict=True)):
        length = max(1, response - i * response // (2 * number))
        rollouts.append(
            Rollout(Prompt(f"p{i}", "", tuple(prompt_ids)), 0, tuple(own[:length]), "", tuple(sampled[:length]), 0, False)
        )
    return rollouts


@torch.no_grad()
def trainer_logprobs(model: LlamaForCausalLM, rollouts: Sequence[Rollout], size: int) -> Tensor:
    """[n] float32: of all response tokens, sequence by sequence.

    Args:
        model: on its device.
        rollouts: to read.
        size: sequences of a forward pass.
    """
    parts = []
    for start in range(0, len(rollouts), size):
        part = rollouts[start : start + size]
        batch = SequenceBatch.from_ids([r.prompt.token_ids for r in part], [r.response_ids for r in part], PAD).to(model.device)
        parts.append(response_logprobs(model, batch)[batch.response_mask])
    return torch.cat(parts)


def compared(sampled: Tensor, found: Tensor, alone: Tensor) -> dict[str, float]:
    """How far a view lies from the sampler, and from what each sequence has alone.

    Args:
        sampled: [n] nats, the sampler's.
        found: [n] nats, the trainer's.
        alone: [n] nats, the trainer's of one sequence at a time.
    """
    return {
        "kl_k1": float(kl_estimate(sampled, found, "k1").mean()),
        "kl_k3": float(kl_estimate(sampled, found, "k3").mean()),
        "largest_gap": float((sampled - found).abs().max()),
        "as_alone": float((found == alone).float().mean()),
    }


def views(size: str, scene: Scene) -> Iterator[Row]:
    """Each layout of the trainer, and float32 throughout.

    Args:
        size: of the model.
        scene: of the measurement.
    """
    kind, small = scene.device.kind, scene.settings.small
    number, prompt, response = (4, 6, 8) if small else (32, 128, 128)
    model = language_model("tiny" if small else size, kind)
    model.lm_head.weight.data.mul_(SHARPER)
    rollouts = sample(copy.deepcopy(model).bfloat16(), number, prompt, response)
    sampled = torch.tensor([x for r in rollouts for x in r.sampler_logprobs], device=kind)
    found: dict[str, Tensor] = {}

    def view(layout: str, exact: bool = False) -> None:
        attention, at_once = LAYOUTS[layout]
        model.set_attn_implementation(attention)
        with nullcontext() if exact else computing(kind):
            found["exact" if exact else layout] = trainer_logprobs(model, rollouts, at_once)

    view("padded", exact=True)
    ways: dict[str, Callable[[], object]] = {layout: partial(view, layout) for layout in LAYOUTS}
    took = measured(kind, ways, scene.settings.repetitions)
    alone, exact = found["one at a time"], found["exact"]
    figures = {"tokens": len(sampled), "vocabulary": SHAPES["tiny" if small else size].vocabulary}
    for layout in LAYOUTS:
        other = None if layout == "padded" else "padded"
        beside = {"kl_k3_of_float32": float(kl_estimate(sampled, exact, "k3").mean())} if layout == "padded" else {}
        place = ("G9", f"trainer's log-probs, {size}, {layout}")
        limit = None if other is None else 1.0
        yield row(place, took, layout, other, limit, **figures, **compared(sampled, found[layout], alone), **beside)
