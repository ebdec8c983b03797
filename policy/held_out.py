"""How well a language model knows texts that it is not trained on.

Letters: N examples, B examples of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tokens.logprobs import response_logprobs
from tokens.records import SequenceBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, examples: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int
) -> float:
    """Mean negative log-likelihood of the responses' tokens.

        loss = -1/L sum_i sum_t log p(y_it | x_i, y_i<t),    perplexity = exp(loss)

    L counts the response tokens of all N examples together, so long responses weigh more than short ones.

    Source: Ouyang et al. 2022 (InstructGPT), section 3.5 (validation loss).

    Args:
        model: a causal language model; left in the mode it was in.
        examples: N (prompt ids, response ids with EOS).
        pad_id: id written at padding.
        batch_size: examples of a forward pass; changes memory, not the result.

    Returns:
        The loss, nats per token.

    Raises:
        ValueError: if there are no examples.

    Padding contract: batches are padded on the right; padding neither is attended to nor counts.
    """
    if not examples:
        raise ValueError("no held-out examples to measure on, got 0, expected at least one")
    training = model.training
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    for start in range(0, len(ordered), batch_size):
        prompts, responses = zip(*ordered[start : start + batch_size], strict=True)
        batch = SequenceBatch.from_ids(prompts, responses, pad_id).to(model.device)
        total -= float(response_logprobs(model, batch).double().sum())
        count += int(batch.response_mask.sum())
    model.train(training)
    return total / count
