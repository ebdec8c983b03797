"""Small models for the reward-side tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rm.config import Pooling
from rm.model import RewardModel

PAD, BOS, EOS = 0, 1, 2
MakeModel = Callable[..., RewardModel]


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama as a directory: vocabulary 50, pad 0, bos 1, eos 2."""
    torch.manual_seed(17)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    path = tmp_path_factory.mktemp("language_model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def make_model(language_model: Path) -> MakeModel:
    """A reward model on that backbone: make_model(pooling, seed, dtype)."""

    def make(pooling: Pooling = "last", seed: int = 0, dtype: torch.dtype = torch.float32) -> RewardModel:
        return RewardModel.from_language_model(language_model, pooling=pooling, seed=seed, dtype=dtype)

    return make
