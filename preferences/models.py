"""Is a directory a model that can be trained here? Answered from its files, before any process starts and without torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preferences.sources import shorten
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("spiece.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones too

LARGEST = {"num_hidden_layers": 1000, "hidden_size": 1_000_000, "vocab_size": 100_000_000, "num_attention_heads": 10_000}
"""Counts of a config.json beyond which it is damaged: a model of that size would be made before its weights are looked at."""


@dataclass(frozen=True)
class ModelDirectory:
    """What a model directory says about itself.

    Args:
        path: the directory.
        model_type: transformers' name of the architecture.
        context_length: longest sequence in tokens, None where the config does not say.
        vocab_size: rows of the embedding, None where the config does not say.
        num_tokens: entries of the tokenizer.
        has_chat_template: whether conversational data can be rendered.
    """

    path: Path
    model_type: str
    context_length: int | None
    vocab_size: int | None
    num_tokens: int
    has_chat_template: bool


def check_model_directory(path: str | Path, reward: bool = False) -> ModelDirectory:
    """Check config, weights and tokenizer of a local Hugging Face directory.

    Args:
        path: the directory.
        reward: True also asks for a padding token other than EOS, which batches of whole texts need.

    Returns:
        What the rest of the set-up needs to know.

    Raises:
        UserError: naming the file that is missing or wrong, and what to do.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{path}: no such model directory (looked for {folder.absolute()})")
    if not folder.is_dir():
        raise UserError(
            f"{path}: a model must be a directory with config.json, safetensors weights and a tokenizer; this is a file"
        )
    config = _read_config(folder)
    _check_weights(folder)
    tokenizer = read_tokenizer(folder)
    context_length, vocab_size = _count(config, "max_position_embeddings"), _count(config, "vocab_size")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no eos_token, so no response could end. Set one in tokenizer_config.json")
    if reward and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        got = "none" if tokenizer.pad_token_id is None else f"the same as eos_token ({tokenizer.eos_token})"
        raise UserError(
            f"{folder}: a reward model needs a pad_token other than eos_token, got {got}. Add one with "
            "tokenizer.add_special_tokens({'pad_token': '<pad>'}), resize the model's embeddings, and save both here again"
        )
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries and the model's vocab_size is {vocab_size}; ids past it would "
            "have no embedding. Resize the embeddings, or use the tokenizer that belongs to the model"
        )
    return ModelDirectory(folder, config["model_type"], context_length, vocab_size, len(tokenizer), bool(tokenizer.chat_template))


def check_context(model: ModelDirectory, max_prompt_tokens: int, max_response_tokens: int) -> None:
    """Refuse prompts and responses that together exceed the model's context.

    Raises:
        UserError: with the three numbers.
    """
    needed = max_prompt_tokens + max_response_tokens
    if model.context_length is not None and needed > model.context_length:
        raise UserError(
            f"{model.path}: prompt and response may take {max_prompt_tokens} + {max_response_tokens} = {needed} tokens, "
            f"the model's context is {model.context_length}. Lower data.max_prompt_tokens or data.max_response_tokens"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {shorten(value)}")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model directory: it has no config.json ({_listing(folder)})")
    config = _read_json(folder / "config.json")
    if "model_type" not in config or not isinstance(config["model_type"], str):
        raise UserError(f"{folder / 'config.json'}: names no model_type, so transformers cannot tell what it is")
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise UserError(
                f"{folder}: the model type {config['model_type']!r} needs code of its own (trust_remote_code), "
                "which is never run here. Use an architecture that transformers knows"
            )
        raise UserError(f"{folder}: transformers does not know the model type {shorten(config['model_type'])}. Use one it knows")
    for key, most in LARGEST.items():
        if key in config and not (isinstance(config[key], int) and 1 <= config[key] <= most):
            raise UserError(f"{folder / 'config.json'}: {key} must be from 1 to {most:,}, got {shorten(config[key])}")
    return config


def _count(config: dict[str, Any], key: str) -> int | None:
    return config[key] if key in config and isinstance(config[key], int) else None


def _listing(folder: Path) -> str:
    names = sorted(item.name for item in folder.iterdir())
    return f"it holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        content = _read_json(index)
        if "weight_map" not in content or not isinstance(content["weight_map"], dict) or not content["weight_map"]:
            raise UserError(f"{index}: has no weight_map")
        names = sorted({str(name) for name in content["weight_map"].values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{index}: names a file outside the directory: {shorten(outside[0])}")
        files = [folder / name for name in names]
    else:
        pickled = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLED)
        if pickled:
            raise UserError(
                f"{folder}: its weights are pickled ({', '.join(pickled[:3])}), which can run code when loaded and is refused. "
                "Convert them to safetensors: load the model where you trust it, then save_pretrained"
            )
        raise UserError(f"{folder}: no weights: expected model.safetensors or its shards with an index ({_listing(folder)})")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Header length, header, and file size must agree; no tensor is read."""
    if not file.is_file():
        raise UserError(f"{file}: missing, but model.safetensors.index.json names it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise UserError(f"{file}: cut off ({size} bytes)")
        length = struct.unpack("<Q", start)[0]
        if length > min(size - 8, MAX_HEADER):
            raise UserError(f"{file}: cut off or no safetensors file: its header claims {length} bytes, the file has {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its safetensors header is damaged ({type(error).__name__}: {error})") from error
    if end != size:
        raise UserError(f"{file}: cut off or damaged: its header describes {end} bytes, the file has {size}. Copy it again")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; where it names no EOS or BOS, as BERT's, its SEP and CLS serve as these.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise UserError(
            f"{folder}: a model without a tokenizer: expected tokenizer.json (or another kind's files) beside the weights "
            f"({_listing(folder)}). Save the tokenizer there with tokenizer.save_pretrained"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare Exception for a damaged file
        raise UserError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {shorten(str(error), 200)})") from error
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    return tokenizer
