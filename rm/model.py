"""A language model's backbone with one score on top.

Letters: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rm.config import Pooling
from tokens.errors import UserError
from tokens.logprobs import position_ids
from tokens.ranks import ALONE, Ranks
from tokens.records import SequenceBatch

HEAD_SCALE = 0.3
"""A fresh head's weights have standard deviation HEAD_SCALE / sqrt(H): scores start with a spread of about HEAD_SCALE."""


class RewardModel(nn.Module):
    """r(x, y): one number for a prompt with its response.

    The wrapped model is an ordinary ``AutoModelForSequenceClassification`` with one label, and so is the saved directory.
    The pooling is stored in its config as ``rondo_pooling``; other software ignores that key and always reads the last
    token that is not padding, so a directory with pooling "mean" scores differently there. Dropout is off from the start.

    Args:
        model: one label, and a bias-free linear layer ``score`` on the backbone's hidden states.
        pooling: "last" reads the score at the last attended token (EOS where the response has one); "mean" averages the
            scores of the response's tokens: the score of their mean hidden state, since the head is linear.

    Raises:
        UserError: if the head is another, or the pooling unknown.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise UserError(f"unknown reward.pooling {pooling!r}: expected one of {', '.join(get_args(Pooling))}")
        self.model = model
        self.pooling: Pooling = pooling
        _head(model)
        model.config.rondo_pooling = pooling
        self.eval()

    @classmethod
    def from_language_model(
        cls, path: str | Path, *, pooling: Pooling, seed: int, dtype: torch.dtype, pad_id: int | None = None
    ) -> RewardModel:
        """The backbone of a causal language model under a fresh head ~ N(0, (HEAD_SCALE / sqrt(H))^2).

        The head comes from a generator of its own: the global one is not touched, and equal seeds give equal heads.

        Args:
            path: directory or hub name of the language model; safetensors only, no code of its own is run.
            pooling: where the score is read.
            seed: of the head.
            dtype: of all weights.
            pad_id: written into the config where given; Hugging Face's own forward needs one for batches.

        Returns:
            The model, on the CPU.

        Raises:
            UserError: if there is no such model, or its backbone is incomplete.
        """
        language_model, missing = _load(AutoModelForCausalLM, path, dtype)
        if any(name.startswith(f"{language_model.base_model_prefix}.") for name in missing):
            raise UserError(f"the language model in {path} lacks weights: {', '.join(sorted(missing)[:5])}. Save it again.")
        config = language_model.config
        config.num_labels = 1
        if pad_id is not None:
            config.pad_token_id = pad_id
        with torch.device("meta"):  # shapes only: the backbone is taken over, not copied
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        setattr(model, model.base_model_prefix, language_model.base_model)
        hidden = _head(model).in_features
        weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed)) * (HEAD_SCALE / math.sqrt(hidden))
        _head(model).weight = nn.Parameter(weight.to(dtype))
        return cls(model, pooling)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype) -> RewardModel:
        """A saved reward model, ours or another's; pooling as stored, "last" where none is.

        Args:
            path: directory or hub name; safetensors only, no code of its own is run.
            dtype: of all weights.

        Returns:
            The model, on the CPU.

        Raises:
            UserError: if there is no such model, or it is not a reward model (other than one label, weights missing).
        """
        config = _read(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), path)
        if config.num_labels != 1:
            raise UserError(
                f"{path} is not a reward model: expected a sequence classifier with 1 label, got "
                f"{', '.join(config.architectures or ['no architecture'])} with {config.num_labels} labels. "
                "Give a reward model's directory."
            )
        model, missing = _load(AutoModelForSequenceClassification, path, dtype)
        if missing:
            raise UserError(
                f"the reward model in {path} lacks weights: {', '.join(sorted(missing)[:5])}. Train and save it again."
            )
        return cls(model, config.rondo_pooling if "rondo_pooling" in config.to_dict() else "last")

    def save_pretrained(self, path: str | Path, ranks: Ranks = ALONE) -> None:
        """Write config.json and safetensors to ``path``. The tokenizer is the caller's to save.

        Args:
            path: directory, made if needed.
            ranks: that share the model; all must call this, rank 0 writes.
        """
        weights = ranks.full_state(self.model)
        if ranks.rank == 0:
            self.model.save_pretrained(path, state_dict=weights)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Score every sequence.

        Args:
            batch: B sequences of prompt and response.

        Returns:
            [B] float32 (float64 for a float64 model).

        Raises:
            ValueError: with pooling "mean", if a sequence has no response token.

        Padding contract: equal for a batch with more padding on either side.
        """
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=position_ids(batch.attention_mask),
            use_cache=False,
        ).last_hidden_state  # [B, T, H]
        scores = _head(self.model)(hidden).squeeze(-1)  # [B, T]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.pooling == "last":
            last = batch.attention_mask.shape[1] - 1 - batch.attention_mask.flip(-1).long().argmax(-1)  # [B]
            pooled: Tensor = scores[torch.arange(len(batch), device=last.device), last]  # not a view, which FSDP2 would warn of
            return pooled
        counts = batch.response_mask.sum(-1)  # [B]
        if bool((counts == 0).any()):
            raise ValueError(f"mean pooling: sequence {int((counts == 0).nonzero()[0])} of the batch has no response token")
        kept = torch.where(batch.response_mask, scores, torch.zeros((), dtype=scores.dtype, device=scores.device))
        return kept.sum(-1) / counts


def _head(model: PreTrainedModel) -> nn.Linear:
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise UserError(
            f"{type(model).__name__} cannot serve as a reward model: expected a bias-free linear layer 'score' with one output, "
            f"got {head}. Use a decoder-only architecture (Llama, Qwen, Mistral, ...) with one label."
        )
    return head


def _load(auto: Any, path: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that its files lack (those are random now)."""
    model, report = _read(
        lambda: auto.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True),
        path,
    )
    return model, set(report["missing_keys"])


def _read(load: Any, path: str | Path) -> Any:
    if isinstance(path, Path) and not path.is_dir():
        raise UserError(f"no model directory at {path}: expected config.json and *.safetensors there. Check the path.")
    try:
        return load()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {path}: {error}") from error
