"""Llamas of random weights, what of them multiplies, and sequences whose lengths are like those of HH-RLHF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.gpu.device import Kind
from policy.critic import Critic
from rm.model import RewardModel
from tokens.recompute import recompute_layers
from tokens.records import Pair, Prompt, Rollout

PAD, EOS = 0, 1
CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Args:
        hidden: width of the residual stream.
        inner: width of the MLP.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
        vocabulary: ids.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000

    @property
    def backbone(self) -> int:
        """Weights that take part in products, but for the head's:

        N = L (2 h^2 + 2 h h_kv + 3 h i + 2 h) + h,   h_kv = h * kv_heads / heads

        The norms' vectors are in it, the embedding is not.
        """
        kv = self.hidden * self.kv_heads // self.heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * layer + self.hidden

    @property
    def with_score(self) -> int:
        """N of a reward model or a critic."""
        return self.backbone + self.hidden

    @property
    def with_logits(self) -> int:
        """N of a language model with an output head of its own."""
        return self.backbone + self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(64, 96, 2, 2, 1, 512),
    "0.1B": Shape(768, 2048, 12, 12, 12),
    "0.5B": Shape(1280, 3584, 24, 20, 4),
    "1B": Shape(2048, 8192, 16, 32, 8),
    "3B": Shape(3072, 8192, 28, 24, 8),
    "8B": Shape(4096, 14336, 32, 32, 8),
}


def training_flops(weights: int, tokens: float, frozen: bool = False) -> float:
    """A forward and a backward pass: 6 N T; 4 N T where only adapters learn, since no gradient of the weights is taken.

    Args:
        weights: N, those that multiply.
        tokens: T, the real ones; what is padded or recomputed is no use, and attention's own products are left out.
        frozen: whether the weights are.
    """
    return (4 if frozen else 6) * weights * tokens


def forward_flops(weights: int, tokens: float) -> float:
    """A forward pass: 2 N T."""
    return 2 * weights * tokens


def make(kind: type, size: str, device: Kind, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A model of random weights on the device; equal each time.

    Args:
        kind: class of transformers.
        size: of ``SHAPES``.
        device: where it is made.
        dtype: of its weights.
        attention: transformers' name of one.
    """
    shape = SHAPES[size]
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary, max_position_embeddings=CONTEXT, pad_token_id=PAD,
        bos_token_id=None, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    config.num_labels = 1
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def language_model(size: str, device: Kind, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> LlamaForCausalLM:
    """A policy."""
    model: LlamaForCausalLM = make(LlamaForCausalLM, size, device, dtype, attention)
    return model


def reward_model(size: str, device: Kind, dtype: torch.dtype = torch.float32, recompute: bool = False) -> RewardModel:
    """A reward model that reads the last token."""
    model = RewardModel(make(LlamaForSequenceClassification, size, device, dtype), "last", (EOS,))
    if recompute:
        recompute_layers(model)
    return model


def critic(size: str, device: Kind, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Critic:
    """A critic."""
    return Critic(make(LlamaForSequenceClassification, size, device, dtype, attention))


def multiplying(model: nn.Module) -> int:
    """Weights that take part in products, counted on the model: all but embeddings and adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lora_" not in name)


@dataclass(frozen=True)
class Lengths:
    """How long sequences are.

    Args:
        prompt: prompts have half of it to all of it.
        response: the longest; lengths are log-normal about two fifths of it.
        vocabulary: ids that are drawn.
    """

    prompt: int = 256
    response: int = 512
    vocabulary: int = 32_000


SMALL = Lengths(8, 16, 512)


def rollouts(number: int, lengths: Lengths, seed: int = 0) -> list[Rollout]:
    """Made-up responses of a policy, each to a prompt of its own."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(max(1, lengths.prompt // 2), lengths.prompt + 1, (number,), generator=generator).tolist()
    spread = torch.randn(number, generator=generator).mul(0.6).exp() * (200 / 512 * lengths.response)
    found = []
    responses = spread.clamp(min(8, lengths.response), lengths.response).int().tolist()
    for index, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.randint(2, lengths.vocabulary, (p + r,), generator=generator).tolist()
        prompt = Prompt(f"{seed}-{index}", "", tuple(ids[:p]))
        found.append(Rollout(prompt, 0, tuple(ids[p:]), "", (-10.4,) * r, 0, r < lengths.response))
    return found


def pairs(number: int, lengths: Lengths, seed: int = 0) -> list[Pair]:
    """Pairs whose two responses have unlike lengths."""
    drawn = rollouts(2 * number, lengths, seed)
    return [
        Pair(f"{seed}-{i}", a.prompt.token_ids, (*a.response_ids, EOS), (*b.response_ids, EOS))
        for i, (a, b) in enumerate(zip(drawn[::2], drawn[1::2], strict=True))
    ]


def equal_pairs(number: int, length: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Pairs whose sequences all have so many tokens, a quarter of them the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    prompt = length // 4
    found = []
    for i in range(number):
        ids = torch.randint(2, vocabulary, (2 * length - prompt,), generator=generator).tolist()
        found.append(Pair(f"{seed}-{i}", tuple(ids[:prompt]), tuple(ids[prompt:length]), tuple(ids[length:])))
    return found


def tokens_of(given: list[Pair]) -> int:
    """Of both sequences of all pairs."""
    return sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in given)
