"""A small feature model, and pairs to ask about, for the tests of people."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from policy.sft import train_tokenizer
from rm.features import BACKBONE, FeatureModel
from rm.model import RewardModel

PROMPTS = ("how do i bake bread ?", "what can i do in the rain ?", "why is the sea salt ?")
SIDES = (
    ("use an oven .", "thanks , that is a good question . use an oven at 230 degrees for 40 minutes ."),
    ("perhaps read a book .", "read a book , or two .\n\nthen cook ."),
    ("rivers carry salt .", "you fool , it just is ."),
    ("maybe , i do not know .", "no ."),
)


def write_pool(path: Path, rows: list[tuple[str, str, str]] | None = None) -> Path:
    """Pairs to ask about: every prompt with every two sides, where no others are given."""
    rows = [(prompt, *sides) for prompt in PROMPTS for sides in SIDES] if rows is None else rows
    path.write_text("".join(json.dumps(dict(zip(("prompt", "a", "b"), row, strict=True))) + "\n" for row in rows), "utf-8")
    return path


def write_feature_model(path: Path, d: int = 3, seed: int = 5) -> Path:
    """A random feature model with a tokenizer of its own."""
    train_tokenizer([*PROMPTS, *(side for sides in SIDES for side in sides)], 300, path / BACKBONE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=2048, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "language_model")
    backbone = RewardModel.from_language_model(path / "language_model", pooling="mean", seed=seed, dtype=torch.float32)
    FeatureModel(backbone, torch.randn(d, 32), ("ann", "bob"), torch.randn(2, d)).save(path)
    return path
