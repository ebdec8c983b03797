"""A tiny world for the policy's tests: Llamas of 32 hidden units over 24 tokens, sampled with plain multinomials."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from policy.config import PolicyConfig
from policy.critic import Critic
from policy.ppo import PPO
from tokens.records import Prompt, Rollout

VOCAB, PAD, EOS = 24, 0, 1


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        num_labels=1,
        initializer_range=0.2,
    )


@pytest.fixture
def language_model() -> Callable[[int], LlamaForCausalLM]:
    """Make a random language model from a seed."""

    def make(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(_config()).eval()

    return make


@pytest.fixture
def critic() -> Callable[[int], Critic]:
    """Make a random critic from a seed."""

    def make(seed: int) -> Critic:
        torch.manual_seed(seed)
        return Critic(LlamaForSequenceClassification(_config()).eval())

    return make


@pytest.fixture
def learner(language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic]) -> Callable[[PolicyConfig], PPO]:
    """Make a learner whose policy equals its reference."""

    def make(config: PolicyConfig) -> PPO:
        return PPO(language_model(0), critic(1), language_model(0), config, temperature=0.8, pad_id=PAD, seed=3)

    return make


@pytest.fixture
def sample() -> Callable[..., list[Rollout]]:
    """Sample rollouts with responses of at most 6 tokens for prompts of 2 to 4 tokens."""

    @torch.no_grad()
    def draw(model: LlamaForCausalLM, seed: int, num_prompts: int = 8) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)
        rollouts: list[Rollout] = []
        for length in (2, 3, 4):  # prompts of one length together: no padding, no cache
            count = num_prompts // 3 + (length - 2 < num_prompts % 3)
            prompts = torch.randint(2, VOCAB, (count, length), generator=generator)
            tokens, logprobs = _continue(model, prompts, generator)
            for prompt, ids, theirs in zip(prompts.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
                end = ids.index(EOS) + 1 if EOS in ids else len(ids)
                record = Prompt(f"p{len(rollouts)}", "", tuple(prompt))
                rollouts.append(Rollout(record, 0, tuple(ids[:end]), "", tuple(theirs[:end]), 0, EOS in ids))
        return rollouts

    return draw


def _continue(model: LlamaForCausalLM, prompts: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Six more tokens for each prompt at temperature 0.8, and their log-probabilities."""
    ids, drawn = prompts, []
    for _ in range(6):
        logprobs = (model(input_ids=ids, use_cache=False).logits[:, -1] / 0.8).log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)
        drawn.append(logprobs.gather(-1, token))
        ids = torch.cat([ids, token], -1)
    return ids[:, prompts.shape[1] :], torch.cat(drawn, -1)
