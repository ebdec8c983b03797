"""What a directory holds, and which ones are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rm.checkpoints import (
    HEAD_SCALE,
    check_same_vocabulary,
    check_vocabulary,
    check_weights,
    eos_ids_of,
    kind_of,
    read_config,
    score_head,
)
from rm.model import RewardModel
from sandbox.tokenizer import make_tokenizer
from tokens.errors import UserError
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
Backbone = Callable[[str], Path]
PAD, BOS, EOS = 0, 1, 2
BATCH = SequenceBatch.from_ids([(BOS, 5, 6), (BOS, 7)], [(20, EOS), (22, 23, EOS)], PAD)


def tokenizer(words: int) -> PreTrainedTokenizerBase:
    """Padding, BOS, EOS, one more, and so many words."""
    return make_tokenizer([f"w{i}" for i in range(words)])


def copy(source: Path, target: Path, **config: Any) -> Path:
    """A model directory with other entries in its config."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bare bert", "distilbert", "roberta"])
def test_kinds_are_told_by_the_architecture(backbone: Backbone, start: Start, tmp_path: Path, name: str) -> None:
    assert kind_of(backbone(name)) == ("language model" if name in ("llama", "gpt2") else "encoder")
    start(name).save_pretrained(tmp_path)
    assert kind_of(tmp_path) == "reward model"


def test_other_kinds_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    two = copy(backbone("bert"), tmp_path / "two", architectures=["BertForSequenceClassification"])
    with pytest.raises(UserError, match="got BertForSequenceClassification with 2 labels"):
        kind_of(two)
    with pytest.raises(UserError, match="got BertForTokenClassification with 2 labels"):
        kind_of(copy(backbone("bert"), tmp_path / "tokens", architectures=["BertForTokenClassification"]))
    with pytest.raises(UserError, match="got no architecture"):
        kind_of(copy(backbone("bert"), tmp_path / "unknown", architectures=None))
    with pytest.raises(UserError, match="is an encoder-decoder"):
        kind_of(backbone("t5"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter.*merge_and_unload"):
        read_config(tmp_path / "adapter")


def test_a_classifier_that_reads_padding_is_refused(start: Start) -> None:
    with pytest.raises(UserError, match="XLNetForSequenceClassification gives a sequence another score when padding follows it"):
        start("xlnet")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "distilbert", "roberta"])
def test_fresh_heads_depend_on_their_seed_only(start: Start, name: str) -> None:
    before = torch.get_rng_state()
    models = [start(name, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    same, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, again[key]) for key, value in same.items())
    differing = {key for key, value in same.items() if not torch.equal(value, other[key])}
    outside = {key for key in same if not key.startswith(f"model.{models[0].model.base_model_prefix}.") or ".pooler." in key}
    assert differing == {key for key in outside if not key.endswith(".bias")}
    heads = torch.cat([start(name, seed=seed).head.weight.detach() for seed in range(10)])  # 320 numbers
    assert float(heads.std()) == pytest.approx(HEAD_SCALE / 32**0.5, rel=0.2)
    assert models[0].head.bias is None or models[0].head.bias.tolist() == [0]


def test_loading_says_nothing_about_heads_that_we_draw_ourselves(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    start("bert")
    assert "REPORT" not in caplog.text and caplog.records == []


def test_another_backbones_weights_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    mixed = copy(backbone("llama"), tmp_path / "mixed")
    shutil.copy(backbone("gpt2") / "model.safetensors", mixed / "model.safetensors")
    with pytest.raises(UserError, match=r"the LlamaModel in .* lacks 20 of 20 weights: .*another backbone"):
        RewardModel.from_any(mixed, pooling="last", seed=0, dtype=torch.float32)
    wider = copy(backbone("llama"), tmp_path / "wider", hidden_size=64)
    with pytest.raises(UserError, match=r"cannot load a model from .*wider"):
        RewardModel.from_any(wider, pooling="last", seed=0, dtype=torch.float32)


def test_weights_that_do_not_fit_are_seen_in_the_headers_of_their_files(backbone: Backbone, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(read_config(backbone("llama")))
    check_weights(model, backbone("llama"))
    for name in ("bert", "roberta", "gpt2"):
        with torch.device("meta"):
            check_weights(AutoModelForSequenceClassification.from_config(read_config(backbone(name))), backbone(name))
    with pytest.raises(UserError, match=r"are not a LlamaModel's: none of its 20 is there, .* got .*transformer"):
        check_weights(model, backbone("gpt2"))
    wider = copy(backbone("llama"), tmp_path / "wider", hidden_size=64)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(read_config(wider))
    with pytest.raises(
        UserError, match=r"do not fit its config.json: .* has shape \[.*32\], a LlamaModel of that config \[.*64\]"
    ):
        check_weights(model, wider)
    (wider / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot load a model from"):
        check_weights(model, wider)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_fresh_head_is_no_multiple_of_a_row_of_the_fresh_layer_beneath_it(start: Start, name: str) -> None:
    model = start(name).model
    beneath = model.bert.pooler.dense if name == "bert" else model.classifier.dense
    likeness = torch.cosine_similarity(score_head(model).weight.detach()[0], beneath.weight.detach(), dim=1)
    assert float(likeness.abs().max()) < 0.7, "32 numbers at random: 0.18 each"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_incomplete_weights_are_refused(backbone: Backbone, start: Start, tmp_path: Path, name: str) -> None:
    for kind in ("fresh", "reward"):
        if kind == "reward":
            start(name).save_pretrained(tmp_path / kind)
        else:
            shutil.copytree(backbone(name), tmp_path / kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        lost = next(key for key in weights if ".layers.1." in key or ".layer.1." in key)
        del weights[lost]
        save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"lacks .*weights.*: .*\.1\."):
            RewardModel.from_any(tmp_path / kind, pooling="last", seed=0, dtype=torch.float32)


def test_vocabularies_that_do_not_fit_are_refused(start: Start) -> None:
    model = start("llama").model
    check_vocabulary(model, tokenizer(46), "m")
    with pytest.raises(UserError, match=r"does not belong to the model in m: its token 'w49' has id 53, .* 50 embeddings"):
        check_vocabulary(model, tokenizer(50), "m")
    ends = tokenizer(46)
    ends.pad_token = ends.eos_token
    with pytest.raises(UserError, match="a padding token of its own"):
        check_vocabulary(model, ends, "m")
    model.config.pad_token_id = 3
    with pytest.raises(UserError, match="pads with id 3 and the tokenizer with 0"):
        check_vocabulary(model, tokenizer(46), "m")


def test_two_vocabularies_are_compared_token_by_token() -> None:
    check_same_vocabulary(tokenizer(5), tokenizer(5), ("a", "b"))
    with pytest.raises(UserError, match=r"a and b have .* \(9 and 10 tokens, 1 differ; 'w5' has id none and 9\)"):
        check_same_vocabulary(tokenizer(5), tokenizer(6), ("a", "b"))
    with pytest.raises(UserError, match=r"2 differ; 'w0' has id 4 and 5"):
        check_same_vocabulary(tokenizer(2), make_tokenizer(["w1", "w0"]), ("a", "b"))


def test_eos_ids_are_the_configs_and_the_tokenizers(backbone: Backbone, tmp_path: Path) -> None:
    several = copy(backbone("llama"), tmp_path / "several", eos_token_id=[7, 5])
    assert eos_ids_of(read_config(several), several) == (5, 7)
    tokenizer(46).save_pretrained(several)
    assert eos_ids_of(read_config(several), several) == (EOS, 5, 7)
    assert eos_ids_of(read_config(several), None) == (5, 7)
    model = RewardModel.from_any(several, pooling="eos", seed=0, dtype=torch.float32)
    assert model.eos_ids == (EOS, 5, 7)
    model.save_pretrained(tmp_path / "saved")  # without its tokenizer
    assert RewardModel.from_pretrained(tmp_path / "saved", torch.float32).eos_ids == (EOS, 5, 7)
    none = copy(backbone("llama"), tmp_path / "none", eos_token_id=None)
    with pytest.raises(UserError, match=r"reward\.pooling is 'eos'"):
        RewardModel.from_any(none, pooling="eos", seed=0, dtype=torch.float32)
    RewardModel.from_any(none, pooling="last", seed=0, dtype=torch.float32)


def test_padding_that_contradicts_an_encoders_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="pads with id 0, got a tokenizer that pads with 3"):
        RewardModel.from_any(backbone("roberta"), pooling="last", seed=0, dtype=torch.float32, pad_id=3)
