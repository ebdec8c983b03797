"""How large the models of a run are, from their directories' config.json or from the shapes that stand in for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from tokens.errors import UserError
from tokens.shape import ModelShape

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose weights are an embedding, layers of four attention and three MLP matrices, and a head that may be tied."""


@dataclass(frozen=True)
class ModelSize:
    """What memory and time depend on.

    Args:
        parameters: in all; a tied embedding is counted once.
        num_layers: L.
        hidden_size: h.
        vocab_size: V.
        intermediate_size: i, width of the MLP.
        num_heads: of attention.
        num_kv_heads: heads of keys and values.
        head_size: width of one.
        num_embeddings: matrices of V x h: 2 for a language model, 1 where its head is tied to its embedding or it has no head.
        logits: True where hidden states are multiplied by a head of V rows; False for reward models and critics.
    """

    parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_embeddings: int
    logits: bool = True

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, head and last norm; FSDP2 gathers them as one unit."""
        return self.num_embeddings * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return (self.parameters - self.root) // self.num_layers

    @property
    def products(self) -> int:
        """Parameters that every token is multiplied by: all but the embedding's, which are looked up."""
        vocabulary = self.vocab_size * self.hidden_size
        return self.parameters - self.num_embeddings * vocabulary + (vocabulary if self.logits else 0)

    def without_head(self) -> ModelSize:
        """The size of a reward model or critic made from this language model: one number in place of a vocabulary."""
        if not self.logits:
            return self
        removed = (self.num_embeddings - 1) * self.vocab_size * self.hidden_size
        return replace(self, parameters=self.parameters - removed, num_embeddings=1, logits=False)


def size_of_shape(shape: ModelShape, tied: bool) -> ModelSize:
    """The size of a Llama-shaped language model.

        parameters = V h (1 or 2) + L (2 h (q + kv) + 3 h i + 2 h) + h,   q, kv = head size * (num_heads, num_kv_heads)

    Args:
        shape: of it.
        tied: whether its head is its embedding.

    Returns:
        The size.
    """
    heads = (shape.num_heads, shape.key_value_heads)
    return _decoder_size(shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_layers, *heads, tied)


def model_size(config: RunConfig) -> ModelSize:
    """The size of the policy model, from its directory or from the shape it will be made with.

    Args:
        config: of the run.

    Returns:
        The size; a tied embedding is counted once.
    """
    directory = None if config.sft.model is None else Path(config.sft.model).expanduser()
    if directory is None or not directory.is_dir():
        return size_of_shape(config.sft.shape, tied=directory is None)
    return _stored_size(directory)


def reward_size(config: RunConfig, size: ModelSize) -> ModelSize:
    """The size of a reward model: of ``reward.base`` where it is a directory, else of ``reward.shape``, else the policy's.

    Args:
        config: of the run.
        size: of the policy.

    Returns:
        The size, without a head of vocabulary size.
    """
    base, shape = config.reward.base, config.reward.shape
    if base is not None and Path(base).expanduser().is_dir():
        return _backbone_size(Path(base).expanduser())
    return (size if shape is None else size_of_shape(shape, tied=True)).without_head()


def _stored_size(directory: Path) -> ModelSize:
    """The size of the language model in a directory. Usual ones are read without importing transformers, which takes seconds."""
    try:
        stored: dict[str, Any] = json.loads((directory / "config.json").read_text())
        if stored["model_type"] in LLAMA_LIKE:
            return _decoder_size(**{key: stored[key] for key in _FIELDS}, head_dim=stored.get("head_dim"))
    except (OSError, ValueError, KeyError):
        pass  # transformers knows the defaults of what is left out, and says what is wrong
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(directory)
    try:
        return _decoder_size(**{key: getattr(loaded, key) for key in _FIELDS})
    except AttributeError as error:
        raise UserError(f"{directory}: the config of a decoder-only model is expected, and {error}") from error


_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings",
)  # fmt: skip


def _decoder_size(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
    head_dim: int | None = None,
) -> ModelSize:
    head_size = hidden_size // num_attention_heads if head_dim is None else head_dim
    queries, keys, matrices = head_size * num_attention_heads, head_size * num_key_value_heads, 1 if tie_word_embeddings else 2
    per_layer = 2 * hidden_size * (queries + keys) + 3 * hidden_size * intermediate_size + 2 * hidden_size
    return ModelSize(
        matrices * vocab_size * hidden_size + num_hidden_layers * per_layer + hidden_size,
        num_hidden_layers,
        hidden_size,
        vocab_size,
        intermediate_size,
        num_attention_heads,
        num_key_value_heads,
        head_size,
        matrices,
    )


def _backbone_size(directory: Path) -> ModelSize:
    """The size of whatever a reward model may start from; an encoder's weights are counted by making it without memory."""
    try:
        if json.loads((directory / "config.json").read_text())["model_type"] in LLAMA_LIKE:
            return _stored_size(directory).without_head()
    except (OSError, ValueError, KeyError):
        pass
    import torch
    from transformers import AutoConfig, AutoModel

    stored = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModel.from_config(stored)
    text = stored.get_text_config()
    heads = text.num_attention_heads
    inner = text.intermediate_size if hasattr(text, "intermediate_size") else 4 * text.hidden_size
    parameters = sum(p.numel() for p in model.parameters())
    width, layers = text.hidden_size, text.num_hidden_layers
    return ModelSize(parameters, layers, width, text.vocab_size, inner, heads, heads, width // heads, 1, logits=False)
