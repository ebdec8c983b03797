"""Directories that a reward model can start from: what they hold, and whether it is whole.

Nothing is guessed: a checkpoint whose kind its config does not tell, that lacks weights, or has another backbone's is refused.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from tokens.errors import UserError
from tokens.weights import check_finite

Kind = Literal["language model", "encoder", "reward model"]
HEAD_SCALE = 0.3
"""A fresh head's weights have standard deviation HEAD_SCALE / sqrt(H): scores start with a spread of about HEAD_SCALE."""
LAYERS_SEED_OFFSET = 86_028_121
"""Layers that a checkpoint lacks (an encoder's pooler) are drawn from a seed of their own: from the head's, the head would be a
multiple of their first row."""
_LANGUAGE_MODELS = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_ENCODERS = {
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.values(),
    *(name for names in modeling_auto.MODEL_MAPPING_NAMES.values() for name in ((names,) if isinstance(names, str) else names)),
}
TRAINABLE = ("F32", "BF16", "F16", "F64")
"""Types, as safetensors names them, that weights are given in."""
_T = TypeVar("_T")


def read_config(path: str | Path) -> PreTrainedConfig:
    """A model's config.

    Args:
        path: directory or hub name.

    Raises:
        UserError: if there is none, or it is that of an adapter without its backbone, or of an encoder-decoder.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter, not a model: expected config.json and all weights. Load it with its backbone and save "
            "the two merged (peft: model.merge_and_unload().save_pretrained), then give that directory."
        )
    config: PreTrainedConfig = _read(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), path)
    if config.is_encoder_decoder:
        raise UserError(
            f"{path} is an encoder-decoder ({config.model_type}): expected a decoder or an encoder. Use another backbone."
        )
    return config


def kind_of(path: str | Path) -> Kind:
    """What a directory holds, by the architecture that its config names.

    Args:
        path: directory or hub name.

    Returns:
        "reward model" for a sequence classifier with one label, "language model", or "encoder" (a masked language model, or a
        backbone without a head).

    Raises:
        UserError: if it is none of the three, a classifier with other than one label included.
    """
    config = read_config(path)
    names = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        if config.num_labels == 1:
            return "reward model"
    elif any(name in _LANGUAGE_MODELS for name in names):
        return "language model"
    elif any(name in _ENCODERS for name in names):
        return "encoder"
    raise UserError(
        f"cannot start a reward model from {path}: expected a causal language model, an encoder (masked language model or bare), "
        f"or a sequence classifier with 1 label, got {', '.join(names) or 'no architecture'} with {config.num_labels} labels. "
        "Give another directory."
    )


def is_part_of_model(file: Path) -> bool:
    """Whether what a model says depends on a file of its directory: its config, its weights, its tokenizer's.

    Args:
        file: by its name alone.
    """
    return file.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")


def load_reward_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A sequence classifier with one label, its head as saved.

    Args:
        path: directory or hub name; safetensors only, no code of its own is run.
        dtype: of all weights.

    Raises:
        UserError: if there is no such model, it has other than one label, or lacks weights.
    """
    config = read_config(path)
    if config.num_labels != 1:
        raise UserError(
            f"{path} is not a reward model: expected a sequence classifier with 1 label, got "
            f"{', '.join(config.architectures or ['no architecture'])} with {config.num_labels} labels. "
            "Give a reward model's directory."
        )
    model, missing = _load(path, dtype)
    if missing:
        raise UserError(f"the reward model in {path} lacks weights: {', '.join(sorted(missing)[:5])}. Train and save it again.")
    return model


def load_with_fresh_head(path: str | Path, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A sequence classifier with one label: any model's backbone under a fresh head ~ N(0, (HEAD_SCALE / sqrt(H))^2), bias 0.

    Layers that an architecture puts between backbone and head, and that the checkpoint lacks, are drawn as transformers draws
    them. All draws come from ``seed``: the global generator is not touched, and equal seeds give equal heads.

    Args:
        path: directory or hub name; safetensors only, no code of its own is run.
        dtype: of all weights.
        seed: of the head and, apart from it, of the layers under it that the checkpoint lacks.

    Raises:
        UserError: if there is no such model, or its backbone is incomplete.
    """
    read_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + LAYERS_SEED_OFFSET)
        model, missing = _load(path, dtype)
    backbone = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict() if not name.startswith("pooler.")}
    lost = sorted(missing & backbone)
    if lost:
        raise UserError(
            f"the {type(model.base_model).__name__} in {path} lacks {len(lost)} of {len(backbone)} weights: "
            f"{', '.join(lost[:5])}. "
            "Either they are those of another backbone than config.json names, or it was not saved whole. Save it again."
        )
    head = score_head(model)
    scale = HEAD_SCALE / math.sqrt(head.in_features)
    weight = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(seed)) * scale
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
    return model


def check_weights(model: PreTrainedModel, path: Path) -> None:
    """Refuse weights of another backbone by the headers of their files, without reading a weight.

    Args:
        model: what the directory should become; may be on the meta device.
        path: a directory with safetensors files.

    Raises:
        UserError: if a file cannot be read, no weight of the backbone stands under its name, or one has another shape. Some that
            are missing may be renamed while loading: that is seen then.
    """
    there: dict[str, list[int]] = {}
    types: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with _read(partial(safe_open, file, "pt"), path) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            there |= {name: part.get_shape() for name, part in slices.items()}
            types |= {name: part.get_dtype() for name, part in slices.items()}
    prefix = f"{model.base_model_prefix}."
    backbone = {name: list(weight.shape) for name, weight in model.base_model.state_dict().items()}
    found = {name: there[key] for name in backbone for key in (name, prefix + name) if key in there}
    kind = type(model.base_model).__name__
    remedy = "Either they are those of another backbone than config.json names, or config.json was changed. Save the model again."
    if not found:
        raise UserError(
            f"the weights in {path} are not a {kind}'s: none of its {len(backbone)} is there, expected {next(iter(backbone))!r} "
            f"and others, got {', '.join(sorted(there)[:3])} and others. {remedy}"
        )
    for name, shape in found.items():
        if shape != backbone[name]:
            raise UserError(
                f"the weights in {path} do not fit its config.json: {name!r} has shape {shape}, a {kind} of that config "
                f"{backbone[name]}. {remedy}"
            )
    named = {name: key for name in backbone for key in (name, prefix + name) if key in there}
    whole = [key for key in named.values() if types[key] not in TRAINABLE]
    if whole:
        raise UserError(
            f"the weights in {path} cannot be trained: {whole[0]!r} is of type {types[whole[0]]}, expected one of "
            f"{', '.join(TRAINABLE)}. Give the model as it was before it was quantised"
        )


def check_language_model(path: Path) -> None:
    """Refuse a directory that holds no language model, or weights of another one, by its config and the files' headers.

    Args:
        path: a directory with config.json and safetensors files.

    Raises:
        UserError: if the architecture is another kind, or the weights do not fit the config.
    """
    kind = kind_of(path)
    if kind != "language model":
        raise UserError(f"{path} holds a {kind}, expected a causal language model. Give another directory")
    config = read_config(path)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    check_weights(model, path)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives the score: the one linear layer with one output outside the backbone.

    Args:
        model: a sequence classifier.

    Raises:
        UserError: if there is none, or several.
    """
    backbone = set(model.base_model.modules())
    heads = [m for m in model.modules() if m not in backbone and isinstance(m, nn.Linear) and m.out_features == 1]
    if len(heads) != 1:
        raise UserError(
            f"{type(model).__name__} cannot serve as a reward model: expected one linear layer with one output on top "
            f"of its backbone, got {len(heads)}. Use a sequence classifier with one label."
        )
    return heads[0]


def is_pooled_here(model: PreTrainedModel) -> bool:
    """Whether the head stands on the backbone's hidden states themselves, as on a decoder's, so that any pooling can be chosen.

    Args:
        model: a sequence classifier.
    """
    head = score_head(model)
    backbone = {id(p) for p in model.base_model.parameters()}
    return head.bias is None and all(id(p) in backbone or p is head.weight for p in model.parameters())


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for, or whose padding would be read as text.

    Args:
        model: the sequence classifier.
        tokenizer: what texts are encoded with.
        path: the model's, for the message.

    Raises:
        UserError: if an id lies beyond the embeddings, there is no padding token, it is EOS, or the model's config names another.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise UserError(
            f"the tokenizer does not belong to the model in {path}: its token {token!r} has id {highest}, and the model has "
            f"{rows} embeddings. Use the tokenizer that the model was trained with, or resize its embeddings."
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise UserError(
            f"the tokenizer for {path} has pad_token {tokenizer.pad_token!r} and eos_token {tokenizer.eos_token!r}: expected "
            "a padding token of its own, or the score of a response's EOS could not be told from padding's. Add one."
        )
    if model.config.pad_token_id not in (None, tokenizer.pad_token_id):
        raise UserError(
            f"the model in {path} pads with id {model.config.pad_token_id} and the tokenizer with {tokenizer.pad_token_id}: "
            "expected one. Use the tokenizer that the model was trained with."
        )


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: tuple[str, str]) -> None:
    """Refuse two tokenizers that do not give equal ids to equal tokens, where one's ids are handed to the other's model.

    Args:
        tokenizer: one.
        other: the other.
        names: of the two, for the message.

    Raises:
        UserError: naming the first token that differs.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    differing = sorted(
        token for token in {*ours, *theirs} if token not in ours or token not in theirs or ours[token] != theirs[token]
    )
    if differing:
        token = differing[0]
        ids = [vocabulary[token] if token in vocabulary else "none" for vocabulary in (ours, theirs)]
        raise UserError(
            f"{names[0]} and {names[1]} have different vocabularies ({len(ours)} and {len(theirs)} tokens, {len(differing)} "
            f"differ; {token!r} has id {ids[0]} and {ids[1]}). Expected one tokenizer, as token ids go from one to the other."
        )


def eos_ids_of(config: PreTrainedConfig, path: str | Path | None) -> tuple[int, ...]:
    """Ids that end a response: the config's, and the EOS of the tokenizer beside it.

    Args:
        config: of the model.
        path: its directory; None = the config's only.

    Returns:
        Ascending; may be none.
    """
    named = config.get_text_config().eos_token_id
    ids = set(named if isinstance(named, list) else [] if named is None else [named])
    tokenizer_config = Path(path or "") / "tokenizer_config.json"
    if path is not None and tokenizer_config.is_file():
        from transformers import AutoTokenizer

        tokenizer = _read(lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _load(path: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that its files lack (those are random now)."""
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_is_no_report)
    try:
        model, report = _read(
            lambda: AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            ),
            path,
        )
    finally:
        reporter.removeFilter(_is_no_report)
    check_finite(model, path)
    return model, set(report["missing_keys"])


def _is_no_report(record: logging.LogRecord) -> bool:
    """Whether a line is other than transformers' table of missing weights, which we judge ourselves."""
    return "LOAD REPORT" not in record.getMessage()


def _read(load: Callable[[], _T], path: str | Path) -> _T:
    if isinstance(path, Path) and not path.is_dir():
        raise UserError(f"no model directory at {path}: expected config.json and *.safetensors there. Check the path.")
    try:
        return load()
    except (OSError, ValueError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"cannot load a model from {path}: {error}") from error
