"""The critic: a reward model read at every position.

Letters: B rollouts, T positions (prompt + response + padding), D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tokens.errors import UserError
from tokens.logprobs import position_ids
from tokens.packing import PackedRow, is_packed
from tokens.ranks import ALONE, Ranks
from tokens.records import SequenceBatch


class Critic(nn.Module):
    """Expected return from the state before each response token.

        value_t = head(h_(t-1)),   h = last hidden states of the backbone

    Source: Secrets of RLHF I (arXiv:2307.04964): the critic starts from the reward model.

    Args:
        model: a sequence classification model of transformers with one label, whose linear head is called ``score``.

    Raises:
        UserError: if the model has not one label, or no head called ``score``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        name = type(model).__name__
        heads = [module for path, module in model.named_modules() if path == "score"]
        if not heads:
            raise UserError(f"the critic needs a sequence classification model with a head called 'score', got {name}")
        if model.config.num_labels != 1:
            raise UserError(f"the critic needs a model with one label, got {name} with {model.config.num_labels}")
        self.model = model

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype, attention: str | None = None) -> Critic:
        """Load a saved reward model (or a saved critic) as the critic.

        Args:
            path: a Hugging Face directory with safetensors weights.
            dtype: dtype of the weights.
            attention: transformers' attn_implementation; ``tokens.packing.PACKED`` packs sequences, None = its default.

        Returns:
            The critic, in evaluation mode (no dropout), on the CPU.

        Raises:
            UserError: if the directory holds no score head, so that values would come from random weights.
        """
        model, missing = _loaded(path, dtype, attention)
        if missing:
            raise UserError(
                f"{path} is not a reward model: it has no weights for {', '.join(missing)}. "
                "Expected a directory that a reward model or a critic was saved to."
            )
        return cls(model).train(False)

    @classmethod
    def from_language_model(cls, path: str | Path, dtype: torch.dtype, attention: str | None = None) -> Critic:
        """A critic on the backbone of a language model, with a head of zeros: it expects nothing until it is fitted.

        Args:
            path: a Hugging Face directory with safetensors weights.
            dtype: dtype of the weights.
            attention: transformers' attn_implementation; ``tokens.packing.PACKED`` packs sequences, None = its default.

        Returns:
            The critic, in evaluation mode (no dropout), on the CPU.

        Raises:
            UserError: if weights other than the head's are missing.
        """
        model, absent = _loaded(path, dtype, attention)
        missing = [name for name in absent if not name.startswith("score.")]
        if missing:
            raise UserError(f"{path} has no weights for {', '.join(missing)}: expected the directory of a language model")
        critic = cls(model).train(False)
        head = model.get_submodule("score")
        assert isinstance(head, nn.Linear)
        nn.init.zeros_(head.weight)
        return critic

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Values of every response token.

        Args:
            batch: B sequences, on the critic's device.

        Returns:
            [B, T] float32, units of the normalised score; entry t does not depend on token t or later ones;
            0 where the response mask is False.

        Padding contract: equal for a batch with more padding; where the model was loaded with the attention for it, the
        sequences are packed, with equal results.
        """
        if is_packed(self.model):
            row = PackedRow.of(batch)
            hidden = self._hidden(**row.inputs())[0]  # [N, D]
            packed = torch.where(row.position_ids[0] > 0, nn.functional.pad(self._values(hidden[:-1]), (1, 0)), 0.0)
            values = packed.new_zeros(batch.input_ids.numel()).index_copy(0, row.places, packed).view(batch.input_ids.shape)
            return torch.where(batch.response_mask, values, 0.0)
        hidden = self._hidden(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=position_ids(batch.attention_mask),
            use_cache=False,
        )  # [B, T, D]
        values = self._values(hidden[:, :-1])  # [B, T - 1]
        return torch.where(batch.response_mask, nn.functional.pad(values, (1, 0)), 0.0)

    def _hidden(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.model.base_model(**inputs).last_hidden_state
        return hidden

    def _values(self, hidden: Tensor) -> Tensor:
        """The head on hidden states, in float32 also where the backbone computes in bfloat16, as the reward model has it."""
        head = self.model.get_submodule("score")
        assert isinstance(head, nn.Linear)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)

    def save_pretrained(self, path: str | Path, ranks: Ranks = ALONE) -> None:
        """Save as a Hugging Face directory that ``from_pretrained`` reads.

        Args:
            path: the directory, made if missing.
            ranks: that share the critic; all must call this, rank 0 writes.
        """
        weights = ranks.full_state(self.model)
        if ranks.rank == 0:
            self.model.save_pretrained(path, state_dict=weights)


def _loaded(path: str | Path, dtype: torch.dtype, attention: str | None) -> tuple[PreTrainedModel, list[str]]:
    """A classifier with one label, and the names of weights that the directory does not hold."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model, sorted(info["missing_keys"])
