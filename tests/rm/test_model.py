"""The reward model: padding, pooling, and Hugging Face's own reading of the saved directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rm.checkpoints import HEAD_SCALE
from rm.config import Pooling
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.records import SequenceBatch

MakeModel = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27,)]
POOLINGS = ["last", "before_last", "eos", "mean", "max"]


def padded(batch: SequenceBatch, left: int, right: int, pad: int) -> SequenceBatch:
    def wide(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (left, right), value=value)

    return SequenceBatch(wide(batch.input_ids, pad), wide(batch.attention_mask, 0), wide(batch.response_mask, 0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_read_where_the_pooling_says(make_model: MakeModel, pooling: Pooling) -> None:
    model = make_model(pooling)
    responses = [*RESPONSES[:2], (27, EOS, 28)]
    batch = SequenceBatch.from_ids(PROMPTS, responses, PAD)
    scores, features = model(batch), model.features(batch)
    assert scores.shape == (3,) and features.shape == (3, 32)
    assert scores.dtype == features.dtype == torch.float32
    assert torch.equal(model.score(features), scores)
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        hidden = model.model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        own = hidden[len(prompt) :]
        states = {
            "last": hidden[-1],
            "before_last": hidden[-2],
            "eos": own[response.index(EOS)],
            "mean": own.mean(0),
            "max": own.amax(0),
        }
        torch.testing.assert_close(features[row], states[pooling], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[row], states[pooling] @ model.state_dict()["model.score.weight"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("left", "right"), [(0, 4), (3, 0), (2, 5)])
def test_padding_changes_neither_scores_nor_gradients(make_model: MakeModel, pooling: Pooling, left: int, right: int) -> None:
    results = []
    for pad_left, pad_right, pad in [(0, 0, PAD), (left, right, 33)]:
        model = make_model(pooling, dtype=torch.float64)
        scores = model(padded(SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD), pad_left, pad_right, pad))
        scores.square().sum().backward()
        results.append((scores.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])))
    assert results[0][0].dtype == torch.float64
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-8)


def test_the_saved_directory_is_an_ordinary_reward_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("last", seed=3)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits[:, 0], model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "distilbert", "roberta", "modernbert"])
def test_padding_changes_nothing_under_any_backbone(start: MakeModel, name: str) -> None:
    results = []
    for left, right, pad in [(0, 0, PAD), (2, 3, 33)]:
        model = start(name, dtype=torch.float64)
        scores = model(padded(SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD), left, right, pad))
        scores.square().sum().backward()
        results.append((scores.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])))
    assert len(set(results[0][0].tolist())) == 3
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-8)


def test_an_encoder_pools_by_its_own_module(start: MakeModel) -> None:
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    model = start("bert")
    features = model.features(batch)
    torch.testing.assert_close(model.score(features), model(batch), rtol=0, atol=0)
    pooled = model.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).pooler_output
    torch.testing.assert_close(features, pooled, rtol=0, atol=1e-6)
    for pooling in ("before_last", "eos", "mean", "max"):
        with pytest.raises(UserError, match=f"BertForSequenceClassification pools by a module of its own, got .*'{pooling}'"):
            start("bert", pooling)


def test_the_head_computes_in_float32_under_autocast(make_model: MakeModel) -> None:
    model, batch = make_model("mean"), SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    with torch.autocast("cpu", torch.bfloat16):
        scores, features = model(batch, both=True)
    assert scores.dtype == features.dtype == torch.float32
    assert torch.equal(scores, features @ model.head.weight[0])
    assert not torch.equal(scores.bfloat16().float(), scores)
    torch.testing.assert_close(scores, model(batch), rtol=0, atol=0.05)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_save_and_load_give_equal_scores(make_model: MakeModel, tmp_path: Path, pooling: Pooling) -> None:
    model = make_model(pooling)
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path, torch.float32)
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    assert again.pooling == pooling
    assert json.loads((tmp_path / "config.json").read_text())["rondo_pooling"] == pooling
    assert torch.equal(again(batch), model(batch))


def test_a_reward_model_from_elsewhere_reads_the_last_token(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("mean").model
    del model.config.rondo_pooling
    model.save_pretrained(tmp_path)
    assert RewardModel.from_pretrained(tmp_path, torch.float32).pooling == "last"


@pytest.mark.parametrize("tied", [False, True])
def test_backbone_comes_from_the_language_model(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, tie_word_embeddings=tied
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    model = RewardModel.from_language_model(tmp_path / "lm", pooling="last", seed=0, dtype=torch.float32, pad_id=7)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").base_model.state_dict()
    got = model.model.base_model.state_dict()
    assert got.keys() == backbone.keys()
    assert all(torch.equal(got[name], backbone[name]) for name in got)
    model.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm", torch.float32)
    assert again.model.config.pad_token_id == 7
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_head_depends_on_its_seed_only(make_model: MakeModel, language_model: Path) -> None:
    before = torch.get_rng_state()
    heads = [make_model("last", seed=seed).state_dict()["model.score.weight"] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    many = torch.cat([make_model("last", seed=seed).state_dict()["model.score.weight"] for seed in range(40)])  # 1,280 numbers
    scale = HEAD_SCALE / 32**0.5
    assert float(many.std()) == pytest.approx(scale, rel=0.1)
    assert abs(float(many.mean())) < 4 * scale / 1280**0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_have_the_dtype_asked_for(make_model: MakeModel, dtype: Literal["bfloat16", "float64"]) -> None:
    wanted = {"bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
    model = make_model("mean", dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {wanted}
    scores = model(SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD))
    assert scores.dtype == (torch.float64 if dtype == "float64" else torch.float32)


def test_dropout_is_off(make_model: MakeModel) -> None:
    assert not any(module.training for module in make_model("last").modules())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_any_directory_is_continued_as_what_it_is(
    start: MakeModel, backbone: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    fresh = start(name)
    with torch.no_grad():
        fresh.head.weight.mul_(3)
    fresh.save_pretrained(tmp_path)
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    continued = RewardModel.from_any(tmp_path, pooling="last", seed=99, dtype=torch.float32)
    torch.testing.assert_close(continued(batch), fresh(batch), rtol=0, atol=1e-6)
    again = RewardModel.from_language_model(backbone(name), pooling="last", seed=3, dtype=torch.float32, pad_id=PAD)
    torch.testing.assert_close(3 * again(batch), fresh(batch), rtol=0, atol=1e-5)


def test_a_reward_model_of_another_pooling_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("mean").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"was trained with pooling 'mean', got reward\.pooling 'last'"):
        RewardModel.from_any(tmp_path, pooling="last", seed=0, dtype=torch.float32)
    assert RewardModel.from_any(tmp_path, pooling="mean", seed=0, dtype=torch.float32).pooling == "mean"


def test_wrong_directories_are_refused(language_model: Path, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model directory at"):
        RewardModel.from_pretrained(tmp_path / "nowhere", torch.float32)
    with pytest.raises(UserError, match=r"not a reward model: .* LlamaForCausalLM with 2 labels"):
        RewardModel.from_pretrained(language_model, torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load a model"):
        RewardModel.from_language_model(tmp_path / "empty", pooling="last", seed=0, dtype=torch.float32)
    make_model("last").save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot load a model"):
        RewardModel.from_pretrained(tmp_path / "cut", torch.float32)


def test_pickled_weights_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("last")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        RewardModel.from_pretrained(tmp_path, torch.float32)


def test_missing_weights_are_refused_not_made_up(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("last").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score\.weight"):
        RewardModel.from_pretrained(tmp_path, torch.float32)


def test_other_heads_and_poolings_are_refused(make_model: MakeModel) -> None:
    model = make_model("last").model
    with pytest.raises(UserError, match=r"unknown reward\.pooling 'first'"):
        RewardModel(model, "first")  # type: ignore[arg-type]
    two = AutoModelForSequenceClassification.from_config(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, num_labels=2)
    )
    with pytest.raises(UserError, match="one label"):
        RewardModel(two, "last")
