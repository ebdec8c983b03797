"""What a reference policy thinks of responses, and responses that it draws.

Letters: B sequences, P prompts, n samples of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tokens.logprobs import response_logprobs
from tokens.records import SequenceBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenIds = tuple[int, ...]
SAMPLED_AT_ONCE = 256
"""Responses that are drawn side by side."""


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    pad_id: int,
    batch_size: int,
    length_normalised: bool = False,
) -> list[float]:
    """log pi(y | x) of whole responses.

        sum over t of log pi(y_t | x, y_<t), or its mean

    Source: none needed.

    Args:
        model: a causal language model, in evaluation mode.
        sequences: B of (prompt ids, response ids with EOS).
        pad_id: id written at padding.
        batch_size: of a forward pass; changes memory, not the result.
        length_normalised: True divides by the number of response tokens.

    Returns:
        [B] nats, in the order given.

    Padding contract: a sequence's value does not depend on those beside it.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    found = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = SequenceBatch.from_ids([sequences[i][0] for i in rows], [sequences[i][1] for i in rows], pad_id)
        sums = response_logprobs(model, batch.to(model.device)).double().sum(-1).tolist()
        for i, value in zip(rows, sums, strict=True):
            found[i] = value / len(sequences[i][1]) if length_normalised else value
    return found


@torch.no_grad()
def draw_responses(
    model: PreTrainedModel, prompts: Sequence[TokenIds], num_samples: int, max_tokens: int, temperature: float, seed: int
) -> list[tuple[TokenIds, ...]]:
    """n responses to each prompt, drawn by transformers' own ``generate``.

    Source: none; ancestral sampling over the whole vocabulary.

    Args:
        model: a causal language model whose generation config has pad and EOS, in evaluation mode.
        prompts: P of ids.
        num_samples: n.
        max_tokens: longest response; longer ones are cut.
        temperature: of the sampling; 0 takes the likeliest token each time.
        seed: of it; the caller's generator is left as it was.

    Returns:
        P of n responses, EOS included where a response ended by itself; none empty.

    Padding contract: prompts are padded on the left, where nothing is attended to.
    """
    generator: Any = model
    config = generator.generation_config
    ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
    chance: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    drawn: list[TokenIds] = []
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(rows), SAMPLED_AT_ONCE):
            taken = rows[start : start + SAMPLED_AT_ONCE]
            width = max(map(len, taken))
            ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + list(row) for row in taken], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in taken], device=model.device)
            made = generator.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                **(chance if temperature else {"do_sample": False}),
            )
            drawn += [_until_end(row, ends) for row in made[:, width:].tolist()]
    return [tuple(drawn[start : start + num_samples]) for start in range(0, len(drawn), num_samples)]


def _until_end(ids: list[int], ends: set[int]) -> TokenIds:
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)
