"""Adapters: what is trained, that the export is an ordinary model, and many of them on one backbone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rm.config import LoraConfig
from rm.lora import add_lora, load_adapter, save_adapter, use_adapter
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.recompute import recompute_layers
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27,)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
NAMES = ["llama", "gpt2", "mixtral", "bert", "distilbert", "roberta"]


def train(model: RewardModel, seed: int = 0) -> Tensor:
    """A few steps towards random targets; the scores then."""
    targets = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        (model(BATCH) - targets).square().sum().backward()
        optimizer.step()
    return scores(model)


def scores(model: RewardModel) -> Tensor:
    with torch.no_grad():
        return model(BATCH)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_head_are_trained_and_nothing_else(start: Start, name: str) -> None:
    model = start(name)
    before = scores(model)
    plain = {key: value.clone() for key, value in model.model.base_model.state_dict().items() if not key.startswith("pooler.")}
    add_lora(model, LoraConfig(rank=4, alpha=8))
    assert torch.equal(scores(model), before)
    assert not any(module.training for module in model.modules())
    after = train(model)
    assert not torch.allclose(after, before, atol=0.01)
    trained = [key for key, p in model.model.base_model.named_parameters() if p.requires_grad]
    assert all(".lora_" in key or key.startswith("pooler.") for key in trained)
    assert model.head.weight.requires_grad and {p.dtype for p in model.parameters()} == {torch.float32}
    now = {key.replace(".base_layer.", "."): value for key, value in model.model.base_model.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in plain.items())
    linear = [key for key, _ in model.named_modules() if key.endswith(".base_layer")]
    assert len(linear) == sum(".lora_A." in key for key in trained) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_an_ordinary_model_and_training_goes_on(start: Start, tmp_path: Path, name: str) -> None:
    model = start(name)
    add_lora(model, LoraConfig(rank=4))
    trained = train(model)
    model.save_pretrained(tmp_path / "merged")
    start(name).save_pretrained(tmp_path / "plain")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {"config.json", "model.safetensors"}
    merged, plain = (load_file(tmp_path / kind / "model.safetensors") for kind in ("merged", "plain"))
    assert merged.keys() == plain.keys()
    torch.testing.assert_close(
        scores(RewardModel.from_pretrained(tmp_path / "merged", torch.float32)), trained, rtol=0, atol=1e-5
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = theirs(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long()).logits[:, 0]
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-5)
    assert torch.equal(scores(model), trained)
    assert not torch.equal(train(model, seed=1), trained)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_agrees_with_pefts(start: Start, tmp_path: Path, name: str) -> None:
    model = start(name)
    add_lora(model, LoraConfig(rank=4, alpha=12))
    train(model)
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged = load_file(tmp_path / "model.safetensors")
    theirs = {key.replace(".base_layer.", "."): value for key, value in model.model.state_dict().items() if ".lora_" not in key}
    assert merged.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_is_the_same_on_a_fresh_backbone_and_in_peft(
    start: Start, backbone: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model = start(name)
    add_lora(model, LoraConfig(rank=4, alpha=12, dropout=0.1))
    trained = train(model)
    save_adapter(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = start(name, seed=9)
    load_adapter(other, tmp_path)
    assert torch.equal(scores(other), trained)
    assert other.adapters is not None and other.adapters.configs["default"] == LoraConfig(rank=4, alpha=12, dropout=0.1)
    base = AutoModelForSequenceClassification.from_pretrained(backbone(name), num_labels=1)
    base.config.pad_token_id = PAD
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        logits = theirs(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long()).logits[:, 0]
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_ensemble_scores_on_one_backbone(start: Start, tmp_path: Path, name: str) -> None:
    wanted = []
    for member in range(3):
        model = start(name, seed=member)
        add_lora(model, LoraConfig(rank=2 + member), seed=member)
        wanted.append(train(model, seed=member))
        save_adapter(model, tmp_path / str(member))
    model = start(name)
    size = sum(p.numel() for p in model.parameters())
    for member in range(3):
        load_adapter(model, tmp_path / str(member), str(member))  # names that are layers' indices too
        assert torch.equal(scores(model), wanted[member])
    for member in (1, 0, 2, 1):
        use_adapter(model, str(member))
        assert torch.equal(scores(model), wanted[member])
    assert sum(p.numel() for p in model.parameters()) < 1.6 * size
    use_adapter(model, "0")
    train(model, seed=5)  # one is trained on; the others stay
    for member in (1, 2):
        use_adapter(model, str(member))
        assert torch.equal(scores(model), wanted[member])
    load_adapter(model, tmp_path / "0", "0")
    assert torch.equal(scores(model), wanted[0])


def test_equal_seeds_give_equal_adapters_and_the_global_generator_is_left_alone(start: Start) -> None:
    before = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        model = start("llama")
        add_lora(model, LoraConfig(rank=4), seed=seed)
        weights.append(torch.cat([p.reshape(-1) for key, p in model.named_parameters() if ".lora_A." in key]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_adapters_of_a_narrow_backbone_are_trained_in_float32(start: Start, tmp_path: Path) -> None:
    model = start("llama", dtype=torch.bfloat16)
    add_lora(model, LoraConfig(rank=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trained = train(model)
    save_adapter(model, tmp_path / "adapter")
    wide = start("llama")
    load_adapter(wide, tmp_path / "adapter")  # the same backbone, in another dtype
    torch.testing.assert_close(scores(wide), trained, rtol=0, atol=0.1)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(RewardModel.from_pretrained(tmp_path / "merged", torch.float32)), trained, rtol=0, atol=0.1)


def test_recomputing_gives_adapters_the_same_gradients(start: Start) -> None:
    slopes = []
    for recompute in (False, True):
        model = start("llama")
        add_lora(model, LoraConfig(rank=4, dropout=0.3))
        if recompute:
            recompute_layers(model)
        torch.manual_seed(0)
        with model.dropout(0.1):
            loss = model(BATCH).sum()
        loss.backward()
        slopes.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(slopes[0]) == len(slopes[1]) > 1
    for got, wanted in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_is_refused(start: Start, tmp_path: Path) -> None:
    model = start("llama")
    with pytest.raises(UserError, match=r"reward\.lora\.rank is 0"):
        add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="no adapter at"):
        load_adapter(model, tmp_path / "nowhere")
    add_lora(model, LoraConfig(rank=4))
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        add_lora(model, LoraConfig(rank=4))
    with pytest.raises(ValueError, match="no adapter 'x': there are default"):
        use_adapter(model, "x")


def test_an_adapter_of_another_backbone_is_refused(start: Start, tmp_path: Path) -> None:
    model = start("llama")
    add_lora(model, LoraConfig(rank=4))
    save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="was trained on another backbone than this Qwen2ForSequenceClassification"):
        load_adapter(start("qwen2"), tmp_path)
    same_shapes = start("llama")
    with torch.no_grad():
        next(p for key, p in same_shapes.named_parameters() if key.endswith("q_proj.weight")).mul_(1.1)
    with pytest.raises(UserError, match="was trained on another backbone"):
        load_adapter(same_shapes, tmp_path)


def test_a_damaged_adapter_is_refused(start: Start, tmp_path: Path) -> None:
    model = start("llama")
    add_lora(model, LoraConfig(rank=4))
    save_adapter(model, tmp_path / "whole")
    for name in ("cut", "less", "other"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_adapter(start("llama"), tmp_path / "cut")
    file = tmp_path / "less" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.model.score.weight"]
    save_file(weights, file, metadata={"backbone": model.adapters.backbone if model.adapters else ""})
    with pytest.raises(UserError, match=r"does not fit this model: score\.weight"):
        load_adapter(start("llama"), tmp_path / "less")
    settings = tmp_path / "other" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 8}))
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(start("llama"), tmp_path / "other")
