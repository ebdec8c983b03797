"""Models of random weights and made-up sequences that several comparisons share."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from rm.batches import Encoded
from rm.model import RewardModel
from tokens.records import Pair

VOCABULARY, PAD = 512, 0
SIZES = {False: (256, 704, 4), True: (16, 32, 1)}
"""Hidden size, MLP width and layers, by whether it is to be small: 3.3 million weights, or next to none."""


def classifier(small: bool, seed: int = 0) -> LlamaForSequenceClassification:
    """A Llama with one score, float32, without dropout."""
    hidden, inner, layers = SIZES[small]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=1, initializer_range=hidden**-0.5,
    )  # fmt: skip
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config).eval()


def reward_model(small: bool, seed: int = 0) -> RewardModel:
    """The same as a reward model."""
    return RewardModel(classifier(small, seed), "last", (1,))


def weights_of(model: torch.nn.Module) -> int:
    """How many it has."""
    return sum(parameter.numel() for parameter in model.parameters())


def tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    """Random ids."""
    return tuple(rng.randrange(2, VOCABULARY) for _ in range(length))


def sequences(number: int, shortest: int, longest: int, seed: int = 0) -> list[Encoded]:
    """Prompts of 16 tokens with responses of evenly drawn lengths, so that together they have ``shortest`` to ``longest``."""
    rng = random.Random(seed)
    return [(tokens(rng, 16), tokens(rng, rng.randint(shortest, longest) - 16)) for _ in range(number)]


def pairs(number: int, length: int, seed: int = 0) -> list[Pair]:
    """Pairs whose sequences all have so many tokens, a quarter of them the prompt's."""
    rng, prompt = random.Random(seed), length // 4
    return [Pair(f"p{i}", tokens(rng, prompt), tokens(rng, length - prompt), tokens(rng, length - prompt)) for i in range(number)]


@torch.no_grad()
def plain_scores(model: PreTrainedModel, given: Sequence[Encoded], batch_size: int, by_length: bool) -> Tensor:
    """Scores as one gets them from transformers by hand: batches padded to their longest, its own forward.

    Args:
        model: a sequence classifier with one label.
        given: B of (prompt ids, response ids).
        batch_size: sequences per forward pass.
        by_length: sorted by length first; else as they come.

    Returns:
        [B] float32, in the order given.
    """
    rows = [[*prompt, *response] for prompt, response in given]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i])) if by_length else list(range(len(rows)))
    scores = torch.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        taken = order[start : start + batch_size]
        width = max(len(rows[i]) for i in taken)
        ids = torch.tensor([rows[i] + [PAD] * (width - len(rows[i])) for i in taken])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in taken])
        scores[taken] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
    return scores
