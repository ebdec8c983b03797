"""Model directories, good and bad."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from preferences.models import check_context, check_model_directory
from tokens.errors import UserError

CONFIG = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 128}


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


def test_a_good_directory(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = check_model_directory(model, reward=True)
    assert (found.model_type, found.context_length, found.vocab_size) == ("llama", 128, 300)
    assert found.num_tokens == len(tokenizer)
    assert found.has_chat_template
    check_context(found, 64, 64)
    with pytest.raises(UserError, match=r"64 \+ 65 = 129 tokens.*context is 128"):
        check_context(found, 64, 65)


def test_shards_with_an_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    assert check_model_directory(model).vocab_size == 300
    index.write_text(json.dumps({"weight_map": {"w": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: missing"):
        check_model_directory(model)
    index.write_text(json.dumps({"weight_map": {"w": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside the directory"):
        check_model_directory(model)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def rewrite(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def pad_is_eos(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", "pad_token", "<eos>")


def no_pad(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", "pad_token", None)


def no_eos(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", "eos_token", None)


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json", "tokenizer.json"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "no model type": (lambda d: (d / "config.json").write_text("{}"), ["names no model_type"]),
    "own code": (
        lambda d: (d / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.py"}}'),
        ["trust_remote_code", "'mine'"],
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "pickle": (pickled, ["pytorch_model.bin", "refused", "safetensors"]),
    "cut off": (lambda d: cut(d / "model.safetensors"), ["cut off or damaged", "describes"]),
    "huge header": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        ["claims 1152921504606846976 bytes", "has 10"],
    ),
    "broken header": (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), ["header is damaged"]),
    "no bytes": (lambda d: (d / "model.safetensors").write_bytes(b""), ["cut off (0 bytes)"]),
    "no tokenizer": (no_tokenizer, ["without a tokenizer", "tokenizer.json", "save_pretrained"]),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), ["tokenizer cannot be read"]),
    "no eos": (no_eos, ["no eos_token"]),
    "no pad": (no_pad, ["pad_token other than eos_token, got none", "add_special_tokens"]),
    "pad is eos": (pad_is_eos, ["pad_token other than eos_token", "<eos>"]),
    "small embedding": (lambda d: rewrite(d / "config.json", "vocab_size", 100), ["vocab_size is 100", "Resize"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_directory_says_what_to_do(case: str, model: Path) -> None:
    damage, words = BAD[case]
    damage(model)
    with pytest.raises(UserError) as caught:
        check_model_directory(model, reward=True)
    message = str(caught.value)
    assert str(model) in message
    for word in words:
        assert word in message


def test_a_policy_may_do_without_padding(model: Path) -> None:
    no_pad(model)
    assert check_model_directory(model).vocab_size == 300


def test_not_a_directory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        check_model_directory(tmp_path / "nothing")
    with pytest.raises(UserError, match="must be a directory"):
        check_model_directory(model / "config.json")
