"""A backbone with one score on top.

Letters: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rm.checkpoints import eos_ids_of, is_pooled_here, kind_of, load_reward_model, load_with_fresh_head, read_config, score_head
from rm.config import Pooling
from rm.dropout import Dropout
from rm.lora import Adapters
from rm.packing import PackedBatch, sees_neighbours
from rm.pooling import left_aligned, pool, reads_padding
from rm.shared_prompts import SharedBatch, sees_as_it_is_told
from tokens.errors import UserError
from tokens.lora import merged
from tokens.ranks import ALONE, Ranks
from tokens.records import SequenceBatch

Batch = SequenceBatch | PackedBatch | SharedBatch


class RewardModel(nn.Module):
    """r(x, y) = head(features(x, y)): one number for a prompt with its response.

    The wrapped model is an ordinary ``AutoModelForSequenceClassification`` with one label, and so is the saved directory. On a
    decoder (a bias-free head on the hidden states) the features are a pooled hidden state, see ``rm.pooling``. The pooling is
    stored in the config as ``rondo_pooling``; other software (Hugging Face, TRL, vLLM) ignores that key and always reads the last
    token that is not padding, so a directory with another pooling scores differently there, and "last" equally.
    An encoder brings a classification module of its own (BERT's pooler, RoBERTa's dense layer, ...): its features are what feeds
    that module's last linear layer, and its pooling is "last", which means Hugging Face's own; other poolings are refused.

    Dropout is off except within ``dropout``.

    Args:
        model: a sequence classifier with one label.
        pooling: where the features are read.
        eos_ids: ids that end a response, for pooling "eos"; None = the config's.

    Raises:
        UserError: if the head is another, the pooling unknown, or not this model's.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling, eos_ids: Sequence[int] | None = None) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise UserError(f"unknown reward.pooling {pooling!r}: expected one of {', '.join(get_args(Pooling))}")
        self.model = model
        self.pooling: Pooling = pooling
        self.eos_ids = eos_ids_of(model.config, None) if eos_ids is None else tuple(eos_ids)
        self.pooled_here = is_pooled_here(model)
        self._head = next(path for path, module in model.named_modules() if module is score_head(model))
        self.adapters: Adapters | None = None
        self._dropout = Dropout(model)
        self._can_pack = False
        self._can_share: bool | None = None
        self._takes = inspect.signature(model.base_model.forward).parameters.keys() & {"position_ids", "use_cache"}
        if not self.pooled_here and pooling != "last":
            raise UserError(
                f"{type(model).__name__} pools by a module of its own, got reward.pooling {pooling!r}: expected 'last', "
                "which means Hugging Face's own. Use a decoder for other poolings."
            )
        if pooling == "eos" and not self.eos_ids:
            raise UserError(
                "reward.pooling is 'eos', and neither the model's config nor its tokenizer has an EOS: expected eos_token_id"
            )
        model.config.rondo_pooling = pooling
        self.eval()
        if not self.pooled_here:
            self._check_own_pooling()

    @classmethod
    def from_language_model(
        cls, path: str | Path, *, pooling: Pooling, seed: int, dtype: torch.dtype, pad_id: int | None = None
    ) -> RewardModel:
        """The backbone of a language model (or encoder) under a fresh head, see ``rm.checkpoints.load_with_fresh_head``.

        Args:
            path: directory or hub name of the language model; safetensors only, no code of its own is run.
            pooling: where the features are read.
            seed: of the head.
            dtype: of all weights.
            pad_id: written into the config where given; Hugging Face's own forward needs one for batches.

        Returns:
            The model, on the CPU.

        Raises:
            UserError: if there is no such model, or its backbone is incomplete.
        """
        model = load_with_fresh_head(path, dtype, seed)
        return cls._of(model, pooling, path, pad_id)

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
        model = load_reward_model(path, dtype)
        return cls._of(model, _stored_pooling(model.config), path, None)

    @classmethod
    def from_any(
        cls, path: str | Path, *, pooling: Pooling, seed: int, dtype: torch.dtype, pad_id: int | None = None
    ) -> RewardModel:
        """A reward model from whatever a directory holds: a language model or an encoder gets a fresh head, a reward model (ours,
        or another's such as TRL's) continues with its own.

        Args:
            path: directory or hub name; safetensors only, no code of its own is run.
            pooling: where the features are read.
            seed: of a fresh head.
            dtype: of all weights.
            pad_id: written into the config where given.

        Returns:
            The model, on the CPU.

        Raises:
            UserError: if it is none of the three, lacks weights, or is a reward model of another pooling.
        """
        if kind_of(path) != "reward model":
            return cls.from_language_model(path, pooling=pooling, seed=seed, dtype=dtype, pad_id=pad_id)
        stored = _stored_pooling(read_config(path))
        if stored != pooling:
            raise UserError(
                f"the reward model in {path} was trained with pooling {stored!r}, got reward.pooling {pooling!r}: expected "
                f"the same. Set reward.pooling to {stored!r}."
            )
        return cls._of(load_reward_model(path, dtype), pooling, path, pad_id)

    @classmethod
    def _of(cls, model: PreTrainedModel, pooling: Pooling, path: str | Path, pad_id: int | None) -> RewardModel:
        ids = eos_ids_of(model.config, path) if pooling == "eos" else None
        if ids is not None and ids != eos_ids_of(model.config, None):
            model.config.eos_token_id = list(ids)  # the saved directory may be without its tokenizer
        reward_model = cls(model, pooling, ids)
        if pad_id is not None:
            if not reward_model.pooled_here and model.config.pad_token_id not in (None, pad_id):
                raise UserError(  # an encoder may count its positions by it
                    f"{path} pads with id {model.config.pad_token_id}, got a tokenizer that pads with {pad_id}: expected one. "
                    "Use the model's own tokenizer."
                )
            model.config.pad_token_id = pad_id
        return reward_model

    def save_pretrained(self, path: str | Path, ranks: Ranks = ALONE) -> None:
        """Write config.json and safetensors to ``path``, LoRA adapters merged. The tokenizer is the caller's to save.

        Args:
            path: directory, made if needed.
            ranks: that share the model; all must call this, rank 0 writes.
        """
        weights = ranks.full_state(self.model)
        if ranks.rank == 0:
            if self.adapters is not None:
                weights = merged(self.model, self.adapters.active, weights)
            self.model.save_pretrained(path, state_dict=weights)

    @property
    def head(self) -> nn.Linear:
        """The last layer: features to score."""
        return cast(nn.Linear, self.model.get_submodule(self._head))

    def forward(self, batch: Batch, both: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Score every sequence.

        Args:
            batch: B sequences of prompt and response, padded, packed, or behind shared prompts where ``shares_prompts`` says so.
            both: True also returns the features.

        Returns:
            Scores [B] float32 (float64 for a float64 model), or (scores, features [B, H]).

        Raises:
            ValueError: if a sequence has no response token, except with pooling "last" or "before_last".
            UserError: for a packed batch, if this model's sequences would see each other.

        Padding contract: equal for a batch with more padding on either side; equal for the same sequences packed.
        """
        features = self._pooled(batch)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        scores = self.score(features)
        return (scores, features) if both else scores

    def features(self, batch: Batch) -> Tensor:
        """The pooled hidden state that the head is given; see ``forward``, whose scores are ``score(features)``.

        Args:
            batch: B sequences, padded or packed.

        Returns:
            [B, H] float32 (float64 for a float64 model).

        Padding contract: as ``forward``.
        """
        return cast(Tensor, self(batch, both=True)[1])  # through __call__, by which FSDP2 gathers the weights

    def states(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, SequenceBatch]:
        """Scores and the hidden states that they were read from, of one forward pass.

        Args:
            batch: B padded sequences.

        Returns:
            Scores [B], hidden states [B, T, H], and the batch that they belong to, its padding on the right.

        Raises:
            UserError: for a model that pools by a module of its own: its hidden states are not what it scores.

        Padding contract: as ``forward``.
        """
        if not self.pooled_here:
            raise UserError(f"{type(self.model).__name__} pools by a module of its own: a decoder is needed here")
        batch = left_aligned(batch)
        hidden = self._hidden(batch.input_ids, batch.attention_mask.long(), None)
        features = pool(hidden, batch, self.pooling, self.eos_ids)
        return self.score(features.to(torch.promote_types(features.dtype, torch.float32))), hidden, batch

    def shares_prompts(self, longest: int) -> bool:
        """Whether responses may stand in one row behind their prompt (``SharedBatch``): the config allows it, and on a small
        example, tried once, they get the scores that they have alone.

        Args:
            longest: tokens of the longest sequence.
        """
        if not self.pooled_here or "position_ids" not in self._takes or not sees_as_it_is_told(self.model.config, longest):
            return False
        if self._can_share is None:
            a, b = self._two_tokens()
            sequences = [((a, b), response) for response in ((a, a, b), (b,), (b, a))]
            device = next(self.model.parameters()).device
            alone = SequenceBatch.from_ids([prompt for prompt, _ in sequences], [response for _, response in sequences], a)
            with torch.no_grad(), torch.autocast(device.type, enabled=False), self._dropout.at(None):
                got, wanted = (self._pooled(batch.to(device)).float() for batch in (SharedBatch.of([sequences], a), alone))
            close = max(1e-3, 8 * torch.finfo(self.model.dtype).eps) * float(wanted.abs().max())
            self._can_share = torch.allclose(got, wanted, rtol=0, atol=close)
        return self._can_share

    def score(self, features: Tensor) -> Tensor:
        """score = w . features + b, in float32 also where the backbone computes in bfloat16.

        On a model that FSDP2 has cut up, take both from one call, ``model(batch, both=True)``: the head is whole only there.

        Args:
            features: [B, H] float32 or float64.

        Returns:
            [B], dtype of ``features``.
        """
        head = self.head
        with torch.autocast(features.device.type, enabled=False):
            scores = features @ head.weight[0].to(features.dtype)  # not a view, which FSDP2 would warn of
            return scores if head.bias is None else scores + head.bias[0].to(features.dtype)

    def dropout(self, p: float) -> AbstractContextManager[None]:
        """Context in which a forward pass uses dropout ``p`` everywhere, see ``rm.dropout``; outside there is none.

        0 changes nothing, except that LoRA's own dropout is on.

        The backward pass may run outside, also where activations are recomputed.

        Args:
            p: in [0, 1).

        Raises:
            ValueError: if ``p`` is not.
        """
        return self._dropout.at(p)

    def _pooled(self, batch: Batch) -> Tensor:
        if isinstance(batch, PackedBatch):
            self._check_packing(batch.input_ids.device)
            hidden = batch.unpack(self._hidden(batch.input_ids, None, batch.position_ids))
            return pool(hidden, batch.sequences, self.pooling, self.eos_ids)
        if isinstance(batch, SharedBatch):
            hidden = batch.unpack(self._hidden(batch.input_ids, batch.mask(), batch.position_ids))
            return pool(hidden, batch.sequences, self.pooling, self.eos_ids)
        batch = left_aligned(batch)
        if self.pooled_here:
            return pool(self._hidden(batch.input_ids, batch.attention_mask.long(), None), batch, self.pooling, self.eos_ids)
        return self._own(batch)

    def _own(self, batch: SequenceBatch) -> Tensor:
        given: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        try:
            self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        finally:
            hook.remove()
        return given[0]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        named: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
        arguments = {name: value for name, value in named.items() if name in self._takes and value is not None}
        hidden: Tensor = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, **arguments).last_hidden_state
        return hidden  # [B, T, H]

    def _check_packing(self, device: torch.device) -> None:
        if self._can_pack:
            return
        name = type(self.model).__name__
        if not self.pooled_here or "position_ids" not in self._takes:
            raise UserError(f"reward.packing needs a decoder that takes position_ids, got {name}. Set reward.packing to false.")
        with torch.no_grad(), torch.autocast(device.type, enabled=False), self._dropout.at(None):
            if sees_neighbours(lambda ids, positions: self._hidden(ids, None, positions), self._two_tokens(), device):
                raise UserError(
                    f"{name} lets packed sequences see each other: its attention does not tell them apart by their positions. "
                    "Set reward.packing to false."
                )
        self._can_pack = True

    def _check_own_pooling(self) -> None:
        name = type(self.model).__name__
        if "attention_mask" not in inspect.signature(self.model.forward).parameters:
            raise UserError(f"{name} takes no attention_mask, so padding would change scores. Use another backbone.")
        with torch.no_grad():
            if reads_padding(self._own, self._two_tokens()):
                raise UserError(f"{name} gives a sequence another score when padding follows it. Use another backbone.")

    def _two_tokens(self) -> tuple[int, int]:
        one, other = [token for token in range(3) if token != self.model.config.pad_token_id][:2]
        return one, other


def _stored_pooling(config: Any) -> Pooling:
    """``rondo_pooling``; where another program saved the model, what Hugging Face reads."""
    return cast(Pooling, config.rondo_pooling) if "rondo_pooling" in config.to_dict() else "last"
