"""Small models for the reward-side tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

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


SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 66, "initializer_range": 0.2, "pad_token_id": PAD,
}  # fmt: skip
DECODER = {**ENCODER, **SPECIAL, "num_key_value_heads": 2}
BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, initializer_range=0.2, **SPECIAL)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=4)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, max_position_embeddings=64,
            word_embed_proj_dim=32, init_std=0.2, **SPECIAL,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)),
    "bare bert": lambda: transformers.BertModel(transformers.BertConfig(**ENCODER)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(
            dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=50, max_position_embeddings=64, initializer_range=0.2,
            pad_token_id=PAD,
        )
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**ENCODER, bos_token_id=BOS, eos_token_id=EOS, cls_token_id=BOS, sep_token_id=EOS)
    ),
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=50, **SPECIAL)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=PAD)
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models of two layers as directories: backbone(name) for a name of BACKBONES; vocabulary 50."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("backbone")
            state = torch.get_rng_state()
            torch.manual_seed(5)
            BACKBONES[name]().save_pretrained(made[name])
            torch.set_rng_state(state)
        return made[name]

    return get


@pytest.fixture
def start(backbone: Callable[[str], Path]) -> MakeModel:
    """A reward model on one of them: start(name, pooling, seed, dtype)."""

    def make(name: str, pooling: Pooling = "last", seed: int = 3, dtype: torch.dtype = torch.float32) -> RewardModel:
        return RewardModel.from_any(backbone(name), pooling=pooling, seed=seed, dtype=dtype, pad_id=PAD)

    return make
