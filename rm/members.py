"""The members of a preference-strength ensemble: how each kind is trained and stored, and how all of them score a sequence.

    full    M reward models                           DIR/0/ .. DIR/M-1/      each a Hugging Face directory
    lora    M adapters and heads, one frozen backbone DIR/0/ .. DIR/M-1/      each an adapter's directory
    heads   M heads on one backbone trained once      DIR/trunk/              a Hugging Face directory and heads.safetensors

Letters: B sequences, N pairs, M members, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, assert_never

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rm.batches import Encoded, lay_out, score_passes
from rm.config import MemberKind, Pooling, RewardConfig
from rm.heads import feature_differences, fit_heads, sequence_features
from rm.lora import add_lora, load_adapter, save_adapter, use_adapter
from rm.member_settings import member_directories
from rm.model import RewardModel
from tokens.records import Pair

HEADS_FILE = "heads.safetensors"


class Members(Protocol):
    """M reward models that score together."""

    def scores(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """Scores without gradient.

        Args:
            sequences: B of (prompt ids, response ids).
            batch_size: sequences per forward pass.
            pad_id: id written at padding.

        Returns:
            [B, M] float32 on the CPU.
        """


def start_member(base: Path, reward: RewardConfig, seed: int, pad_id: int) -> RewardModel:
    """A member before its fit: the base's weights under a head of its own seed, with adapters where the settings ask for them.

    A base that is a reward model already keeps its head, and its members differ in the order of the pairs only.

    Args:
        base: model directory.
        reward: as ``member_settings`` gives them.
        seed: of the head, and of the adapters.
        pad_id: written into the config.

    Returns:
        The model in float32, on the CPU.
    """
    model = RewardModel.from_any(base, pooling=reward.pooling, seed=seed, dtype=torch.float32, pad_id=pad_id)
    if reward.lora.rank:
        add_lora(model, reward.lora, seed=seed)
    return model


def save_member(kind: MemberKind, model: RewardModel, directory: Path) -> None:
    """Write a fitted member; for "heads" its trunk, see ``save_heads``.

    Args:
        kind: of the members.
        model: fitted.
        directory: to write to; made if needed.
    """
    if kind == "lora":
        save_adapter(model, directory)
    else:
        model.save_pretrained(directory)


def head_members(
    model: RewardModel,
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    batch_size: int,
    pad_id: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """M heads on a trained backbone; see ``rm.heads``.

    Args:
        model: the trunk, fitted on the same pairs.
        pairs: N.
        seeds: M.
        batch_size: sequences per forward pass.
        pad_id: id written at padding.
        on_progress: called again and again while it works.

    Returns:
        [M, H] float32.
    """
    return fit_heads(feature_differences(model, pairs, batch_size, pad_id, on_progress), seeds, on_progress)


def save_heads(heads: Tensor, directory: Path) -> None:
    """Write heads beside their trunk.

    Args:
        heads: [M, H] float32.
        directory: of the trunk.
    """
    save_file({"heads": heads.contiguous()}, directory / HEADS_FILE)


def load_members(
    kind: MemberKind, base: Path, directory: Path, num_members: int, pooling: Pooling, dtype: torch.dtype, device: str
) -> Members:
    """Members as they were stored, ready to score.

    Args:
        kind: of the members.
        base: model directory that they started from.
        directory: that holds them.
        num_members: M.
        pooling: that they were trained with.
        dtype: of all weights.
        device: to compute on.

    Returns:
        The members.

    Raises:
        UserError: if one is not there, or belongs to another backbone.
    """
    folders = member_directories(kind, directory, num_members)
    match kind:
        case "full":
            return FullMembers([RewardModel.from_pretrained(folder, dtype=dtype) for folder in folders], device)
        case "lora":
            model = RewardModel.from_any(base, pooling=pooling, seed=0, dtype=dtype)
            for member, folder in enumerate(folders):
                load_adapter(model, folder, _adapter(member))
            return LoraMembers(model.to(device), num_members)
        case "heads":
            heads = load_file(folders[0] / HEADS_FILE)["heads"]
            return HeadMembers(RewardModel.from_pretrained(folders[0], dtype=dtype).to(device), heads)
        case _:
            assert_never(kind)


class FullMembers:
    """Whole models. All stay in the machine's memory; the device holds one at a time.

    Args:
        models: M, on the CPU.
        device: to compute on.
    """

    def __init__(self, models: Sequence[RewardModel], device: str) -> None:
        self.models, self.device = models, device

    def scores(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """See ``Members``."""
        first = self.models[0].to(self.device)  # where it is tried whether responses may share a prompt
        passes = [*lay_out(first, sequences, batch_size, pad_id, share=True)]  # once for all
        columns = []
        for model in self.models:
            columns.append(score_passes(model.to(self.device), passes, len(sequences)))
            model.to("cpu")
        return torch.stack(columns, dim=1)


class LoraMembers:
    """Adapters and heads on one backbone.

    Args:
        model: with the adapters of M members, on its device.
        num_members: M.
    """

    def __init__(self, model: RewardModel, num_members: int) -> None:
        self.model, self.num_members = model, num_members

    def scores(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """See ``Members``."""
        passes = [*lay_out(self.model, sequences, batch_size, pad_id, share=True)]
        columns = []
        for member in range(self.num_members):
            use_adapter(self.model, _adapter(member))
            columns.append(score_passes(self.model, passes, len(sequences)))
        return torch.stack(columns, dim=1)


class HeadMembers:
    """Heads on one trained backbone: a sequence costs one forward pass, however many members there are.

    Args:
        model: the trunk, on its device.
        heads: [M, H] float32.
    """

    def __init__(self, model: RewardModel, heads: Tensor) -> None:
        self.model, self.heads = model, heads

    def scores(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """See ``Members``."""
        return sequence_features(self.model, sequences, batch_size, pad_id) @ self.heads.T


def _adapter(member: int) -> str:
    return f"member{member}"  # a bare number would be taken for a layer's
