"""Reward features: what is computed, that only predictions count, and the directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rm.batches import score_sequences
from rm.features import BACKBONE, RATERS, TENSORS, FeatureModel, fingerprint, scores
from tests.rm.conftest import EOS, PAD, MakeModel
from tests.rm.toy import toy_pairs
from tokens.errors import UserError

D, NAMES = 4, ("ann", "bob", "cy")
SEQUENCES = [((1, 5, 6), (10, 11, EOS)), ((1, 7), (12, EOS)), ((1, 8), (30, 31, 32, EOS))]


@pytest.fixture
def model(make_model: MakeModel) -> FeatureModel:
    generator = torch.Generator().manual_seed(3)
    backbone = make_model()
    projection = torch.randn(D, backbone.head.in_features, generator=generator)
    return FeatureModel(backbone, projection, NAMES, torch.randn(len(NAMES), D, generator=generator))


def test_a_raters_reward_is_that_of_a_reward_model_with_their_head(model: FeatureModel) -> None:
    for name in NAMES:
        weights = model.weights_of(name)
        ours = scores(model.features(SEQUENCES, 2, PAD), weights)
        torch.testing.assert_close(ours, score_sequences(model.reward_model(weights), SEQUENCES, 2, PAD), rtol=1e-4, atol=1e-5)


def test_rewards_do_not_depend_on_the_basis(model: FeatureModel) -> None:
    before = [scores(model.features(SEQUENCES, 3, PAD), w) for w in model.weights.detach()]
    turn = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) + 2 * torch.eye(D)
    moved = FeatureModel(model.backbone, turn @ model.projection.detach(), NAMES, model.weights.detach() @ torch.linalg.inv(turn))
    assert float((moved.weights - model.weights).detach().abs().max()) > 0.1
    for ours, theirs in zip(before, moved.weights.detach(), strict=True):
        torch.testing.assert_close(ours, scores(moved.features(SEQUENCES, 3, PAD), theirs), rtol=1e-4, atol=1e-4)


def test_differences_are_of_features(model: FeatureModel) -> None:
    pairs = toy_pairs(5)
    chosen = model.features([(p.prompt_ids, p.chosen_ids) for p in pairs], 2, PAD)
    rejected = model.features([(p.prompt_ids, p.rejected_ids) for p in pairs], 2, PAD)
    torch.testing.assert_close(model.differences(pairs, 2, PAD), chosen - rejected, rtol=1e-4, atol=1e-5)
    assert model.features([], 2, PAD).shape == (0, D)


def test_what_is_saved_is_loaded_and_scores_as_the_mean_rater_elsewhere(model: FeatureModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m")
    back = FeatureModel.load(tmp_path / "m", torch.float32)
    assert back.raters == NAMES and back.d == D and not back.shared and (back.l2, back.towards) == (model.l2, model.towards)
    torch.testing.assert_close(back.weights, model.weights, rtol=0, atol=0)
    torch.testing.assert_close(back.features(SEQUENCES, 2, PAD), model.features(SEQUENCES, 2, PAD), rtol=0, atol=0)
    mean = scores(back.features(SEQUENCES, 2, PAD), back.mean_weights)
    torch.testing.assert_close(score_sequences(back.backbone, SEQUENCES, 2, PAD), mean, rtol=1e-4, atol=1e-5)


def test_a_fingerprint_is_of_all_that_scores_depend_on(model: FeatureModel, tmp_path: Path) -> None:
    here = tmp_path / "m"
    model.save(here)
    first = fingerprint(here)
    shutil.copytree(here, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    (here / "profiles").mkdir()  # what others put beside it changes nothing
    assert fingerprint(here) == first
    with torch.no_grad():
        model.projection[0, 0] += 1
    model.save(here)
    assert fingerprint(here) != first
    (tmp_path / "copy" / BACKBONE / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") != first


def test_bad_input(model: FeatureModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rater is named 'dan': the model's 3 raters are ann, bob, cy"):
        model.weights_of("dan")
    with pytest.raises(ValueError, match="each named once, got 3 names, 2 of them different"):
        FeatureModel(model.backbone, model.projection.detach(), ("a", "a", "b"), model.weights.detach())
    with pytest.raises(ValueError, match="one reward for all raters has one feature, got 4"):
        FeatureModel(model.backbone, model.projection.detach(), NAMES, model.weights.detach(), shared=True)
    with pytest.raises(ValueError, match=r"weights \[3, d\], got"):
        FeatureModel(model.backbone, model.projection.detach(), NAMES, model.weights.detach()[:, :2])
    with pytest.raises(UserError, match=f"holds no feature model: {RATERS}"):
        fingerprint(tmp_path)
    model.save(tmp_path / "m")
    (tmp_path / "m" / RATERS).write_text(json.dumps({"raters": ["ann"], "shared": False, "l2": 1.0, "towards": "mean"}))
    with pytest.raises(UserError, match=r"is damaged \(need a projection"):
        FeatureModel.load(tmp_path / "m", torch.float32)
    (tmp_path / "m" / TENSORS).write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        FeatureModel.load(tmp_path / "m", torch.float32)
