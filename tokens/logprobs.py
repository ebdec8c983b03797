"""Log-probabilities of the tokens that were sampled.

Letters: B sequences, T positions, V vocabulary.
"""

import torch
from torch import Tensor, nn

from tokens.records import SequenceBatch


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
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


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
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def response_logprobs(model: nn.Module, batch: SequenceBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability that ``model`` gives to each response token.

    Args:
        model: a causal language model of transformers (called with input_ids, attention_mask, position_ids, use_cache).
        batch: B sequences.
        temperature: the sampler's.

    Returns:
        [B, T] float32, nats; entry t belongs to token t; 0 where the response mask is False.

    Padding contract: equal for a batch with more padding.
    """
    return _at_responses(token_logprobs(_logits(model, batch), batch.input_ids[:, 1:], temperature), batch)


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
    logits = _logits(model, batch)
    logprobs = token_logprobs(logits, batch.input_ids[:, 1:], temperature)
    return _at_responses(logprobs, batch), _at_responses(token_entropy(logits, temperature), batch)


def _logits(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """[B, T - 1, V]: entry t predicts token t + 1."""
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=position_ids(batch.attention_mask),
        use_cache=False,
    ).logits
    return logits[:, :-1]


def _at_responses(values: Tensor, batch: SequenceBatch) -> Tensor:
    """[B, T] from [B, T - 1]: each value at the token that it belongs to, 0 outside the response."""
    return torch.where(batch.response_mask, nn.functional.pad(values, (1, 0)), torch.zeros((), device=values.device))
