"""Members of a strength ensemble: trained, stored, and scoring together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm.batches import Encoded, pair_sequences, score_sequences
from rm.config import ContrastiveConfig, LoraConfig, MemberKind, MetaConfig, RewardConfig, StrengthConfig
from rm.member_settings import member_directories, member_settings
from rm.members import (
    HeadMembers,
    LoraMembers,
    head_members,
    load_members,
    save_heads,
    save_member,
    start_member,
)
from rm.model import RewardModel
from rm.training import fit_reward_model
from tests.rm.conftest import EOS, PAD
from tokens.errors import UserError
from tokens.records import Pair, SequenceBatch

PAIRS = [Pair(str(i), (1, 10 + i % 5), (20 + i % 9, 21, EOS), (30 + i % 7, 31, 32, EOS)) for i in range(24)]
SEQUENCES: list[Encoded] = pair_sequences(PAIRS[:5])
SEEDS = (101, 102, 103)


def settings(kind: MemberKind) -> RewardConfig:
    reward = RewardConfig(pooling="mean", lr=3e-3, batch_size=4, microbatch_size=8)
    return member_settings(reward, StrengthConfig(members=kind, num_members=3, lora_rank=2))


def fitted(base: Path, kind: MemberKind, seed: int) -> RewardModel:
    model = start_member(base, settings(kind), seed, PAD)
    fit_reward_model(model, PAIRS, None, settings(kind), MetaConfig(enabled=False), seed, PAD, lambda step: None)
    return model


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_members_score_after_storage_as_before(language_model: Path, tmp_path: Path, kind: MemberKind) -> None:
    own = []
    for seed, folder in zip(SEEDS, member_directories(kind, tmp_path, 3), strict=True):
        model = fitted(language_model, kind, seed)
        own.append(score_sequences(model, SEQUENCES, 4, PAD))
        save_member(kind, model, folder)
    members = load_members(kind, language_model, tmp_path, 3, "mean", torch.float32, "cpu")
    scores = members.scores(SEQUENCES, 4, PAD)
    assert scores.shape == (10, 3)
    torch.testing.assert_close(scores, torch.stack(own, 1), atol=1e-6, rtol=0)
    assert torch.equal(members.scores(SEQUENCES, 4, PAD), scores), "the second call is the first"
    assert float(scores.std(1).min()) > 1e-4, "members differ"


def test_lora_members_share_one_backbone_and_store_little(language_model: Path, tmp_path: Path) -> None:
    for seed, folder in zip(SEEDS, member_directories("lora", tmp_path, 3), strict=True):
        save_member("lora", fitted(language_model, "lora", seed), folder)
    members = load_members("lora", language_model, tmp_path, 3, "mean", torch.float32, "cpu")
    assert isinstance(members, LoraMembers)
    whole = sum(p.numel() for p in start_member(language_model, settings("full"), 0, PAD).parameters())
    assert sum(p.numel() for p in members.model.parameters()) < 2 * whole
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "0" / "adapter_model.safetensors").values())
    assert stored < 0.5 * whole


def test_adapters_of_another_backbone_are_refused(language_model: Path, tmp_path: Path) -> None:
    save_member("lora", fitted(language_model, "lora", 1), tmp_path / "0")
    model = RewardModel.from_language_model(language_model, pooling="mean", seed=0, dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another backbone"):
        load_members("lora", tmp_path / "other", tmp_path, 1, "mean", torch.float32, "cpu")


def test_heads_cost_one_forward_pass_and_keep_the_trunk(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = fitted(language_model, "heads", 7)
    (folder,) = member_directories("heads", tmp_path, 3)
    heads = head_members(trunk, PAIRS, SEEDS, 8, PAD)
    save_member("heads", trunk, folder)
    save_heads(heads, folder)
    members = load_members("heads", language_model, tmp_path, 3, "mean", torch.float32, "cpu")
    assert isinstance(members, HeadMembers)
    seen = []
    forward = RewardModel.forward

    def counted(self: RewardModel, batch: SequenceBatch, both: bool = False) -> object:
        seen.append(len(batch))
        return forward(self, batch, both)

    monkeypatch.setattr(RewardModel, "forward", counted)
    scores = members.scores(SEQUENCES, 4, PAD)
    assert seen == [4, 4, 2] and scores.shape == (10, 3)
    with torch.no_grad():
        members.model.head.weight.copy_(heads[1:2])
    torch.testing.assert_close(scores[:, 1], score_sequences(members.model, SEQUENCES, 4, PAD), atol=1e-5, rtol=0)
    margins = scores[:5] - scores[5:]
    assert bool((margins.mean(1) > 0).all()), "the trunk learnt these pairs, and its heads say so"


def test_members_learn_from_plain_labels() -> None:
    reward = RewardConfig(
        lr=1e-4,
        contrastive=ContrastiveConfig(method="simcse"),
        lora=LoraConfig(rank=4, alpha=3.0),
        evaluate_every=5,
        patience=2,
    )
    full = member_settings(reward, StrengthConfig(members="full"))
    assert full.contrastive.method == "none" and full.lora.rank == 0
    assert full.evaluate_every is None and full.patience is None and full.lr == 1e-4
    lora = member_settings(reward, StrengthConfig(members="lora", lora_rank=2))
    assert lora.lora == LoraConfig(rank=2, alpha=3.0) and lora.lr == pytest.approx(1e-3)
    assert member_settings(reward, StrengthConfig(members="lora", lora_lr=0.5)).lr == 0.5


def test_equal_seeds_start_equal_members(language_model: Path) -> None:
    heads = [start_member(language_model, settings("full"), seed, PAD).head.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
