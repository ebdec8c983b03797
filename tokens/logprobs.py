"""Log-probabilities of the tokens that were sampled.

Letters: B sequences, T positions, V vocabulary; b rows and K places of the logits that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokens.packing import PackedRow, is_packed
from tokens.records import SequenceBatch
from tokens.softmax import chosen_logprobs, entropies


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted over real tokens only, so that padding on either side shifts nothing.

    Args:
        attention_mask: [B, T] bool.

    Returns:
        [B, T] int64; at padding on the left 0, on the right the last real token's position. No loss reads either.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given ids.

    Args:
        logits: [B, T, V] float; logits[:, t] predict token_ids[:, t].
        token_ids: [B, T] int64.
        temperature: the sampler's; > 0.

    Returns:
        [B, T] float32, nats.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return chosen_logprobs(logits.flatten(0, -2), token_ids.flatten(), temperature).view(token_ids.shape)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature): -sum_v p_v log p_v.

    Args:
        logits: [B, T, V] float.
        temperature: the sampler's; > 0.

    Returns:
        [B, T] float32, nats.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return entropies(logits.flatten(0, -2), temperature).view(logits.shape[:-1])


def response_logprobs(model: nn.Module, batch: SequenceBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability that ``model`` gives to each response token.

    Args:
        model: a causal language model of transformers that takes ``logits_to_keep``; the sequences are packed where it was loaded
            with the attention for it (``tokens.packing``).
        batch: B sequences.
        temperature: the sampler's.

    Returns:
        [B, T] float32, nats; entry t belongs to token t; 0 where the response mask is False.

    Padding contract: equal for a batch with more padding.
    """
    found = _predictions(model, batch)
    return found.at_responses(token_logprobs(found.logits, found.token_ids, temperature))


def response_logprobs_and_entropy(model: nn.Module, batch: SequenceBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, and the entropy of the distribution it was drawn from.

    Args:
        model: a causal language model of transformers.
        batch: B sequences.
        temperature: the sampler's.

    Returns:
        Two of [B, T] float32, nats; entry t belongs to token t; 0 where the response mask is False.

    Padding contract: equal for a batch with more padding.
    """
    found = _predictions(model, batch)
    logprobs = token_logprobs(found.logits, found.token_ids, temperature)
    return found.at_responses(logprobs), found.at_responses(token_entropy(found.logits, temperature))


@dataclass(frozen=True)
class _Predictions:
    """Logits of the places that predict a response token; no others are computed, since a vocabulary is large.

    Args:
        logits: [b, K, V]: of a packed row (b = 1) those of the response tokens, of a padded batch (b = B) those of the columns
            in which some row has a response token.
        token_ids: [b, K] int64, what is predicted.
        places: [b, K] int64, where in the flattened [B, T] batch these tokens lie.
        batch: the sequences.
    """

    logits: Tensor
    token_ids: Tensor
    places: Tensor
    batch: SequenceBatch

    def at_responses(self, values: Tensor) -> Tensor:
        """[B, T] from [b, K]: each value at the token that it belongs to, 0 outside the response."""
        mask = self.batch.response_mask
        zeros = values.new_zeros(mask.numel())
        spread = zeros.index_copy(0, self.places.flatten(), values.flatten()).view(mask.shape)
        return torch.where(mask, spread, torch.zeros((), device=values.device))


def _predictions(model: nn.Module, batch: SequenceBatch) -> _Predictions:
    if is_packed(model):
        row = PackedRow.of(batch)
        own = batch.response_mask.flatten()[row.places] & (row.position_ids[0] > 0)  # nothing predicts a first token
        targets, inputs = own.nonzero().squeeze(-1), row.inputs()
        token_ids, places = row.input_ids[:, targets], row.places[None, targets]
    else:
        targets = batch.response_mask[:, 1:].any(0).nonzero().squeeze(-1) + 1
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
            "position_ids": position_ids(batch.attention_mask),
            "use_cache": False,
        }
        token_ids = batch.input_ids[:, targets]
        places = torch.arange(batch.input_ids.numel(), device=targets.device).view(batch.input_ids.shape)[:, targets]
    logits: Tensor = model(**inputs, logits_to_keep=targets - 1).logits
    return _Predictions(logits, token_ids, places, batch)
