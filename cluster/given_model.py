"""A model directory that the config names, checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from preferences.config import DataConfig
from preferences.models import ModelDirectory, check_context, check_model_directory, read_tokenizer
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GivenModel:
    """A directory with a model and its tokenizer."""

    path: Path
    tokenizer: Any


def given_model(key: str, name: str, data: DataConfig, max_response_tokens: int) -> GivenModel:
    """Check a model of the user's, and fetch it from the hub where that is allowed.

    Args:
        key: of the config, for messages.
        name: a directory, or a name on the hub.
        data: longest prompt, and whether the hub may be asked.
        max_response_tokens: longest response that the model will see.

    Returns:
        The model.

    Raises:
        UserError: if it is not there, cannot be trained here, or its context is too short.
    """
    found = model_directory(key, name, data)
    if key == "sft.model":
        from rm.checkpoints import check_language_model

        check_language_model(found.path)
    check_context(found, data.max_prompt_tokens, max_response_tokens)
    return GivenModel(found.path, read_tokenizer(found.path))


def model_directory(key: str, name: str, data: DataConfig) -> ModelDirectory:
    """The same, whatever the length of its context; arguments and errors as there."""
    if not Path(name).expanduser().is_dir():
        if not data.allow_hub:
            raise UserError(f"{key} {name!r} is not a directory; to fetch it from the hub set data.allow_hub to true")
        name = _download(key, name)
    return check_model_directory(name, reward=True)


def found_here(name: str) -> Path | None:
    """Where a model lies that a config names, nobody asked: a directory, or what the hub's cache holds under a name.

    Args:
        name: a path, which may be relative to the working directory or begin with ~, or a name on the hub.

    Returns:
        The directory, absolute; None where it is not on this machine.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def given_base(name: str, config: RunConfig, policy: bool) -> GivenModel:
    """Check the model that ``reward.base`` names, as ``given_model``, and that it can become a reward model.

    Args:
        name: of the model.
        config: of the command.
        policy: True if it will score what a policy samples.

    Returns:
        The model.

    Raises:
        UserError: also if it is of another kind, has weights of another backbone, or has another pooling or another tokenizer
            than it was trained with.
    """
    data, reward = config.data, config.reward
    samples = policy or config.meta.samples is not None
    longest = max(data.max_response_tokens, config.rollout.max_new_tokens) if samples else data.max_response_tokens
    base = given_model("reward.base", name, data, longest)

    from rm.checkpoints import check_vocabulary, check_weights, is_pooled_here, kind_of, read_config

    kind, stored = kind_of(base.path), read_config(base.path)
    pooling = stored.rondo_pooling if "rondo_pooling" in stored.to_dict() else "last"
    if kind == "reward model" and pooling != reward.pooling:
        raise UserError(
            f"reward.base {base.path} is a reward model with pooling {pooling!r}, reward.pooling is {reward.pooling!r}: "
            f"set reward.pooling to {pooling}"
        )
    shape = _shape(base.path)
    if not is_pooled_here(shape) and (reward.pooling != "last" or reward.packing):
        raise UserError(
            f"reward.base {base.path} is an encoder ({type(shape).__name__}), which pools by a module of its own and cannot be "
            f"packed: reward.pooling must be last and reward.packing false, got {reward.pooling} and {reward.packing}"
        )
    check_vocabulary(shape, base.tokenizer, base.path)
    check_weights(shape, base.path)
    return base


def refuse_base_of_a_run(base: GivenModel, tokenizer: Any, whose: str) -> None:
    """A run hands token ids of the policy to its reward models, and makes its critic of them.

    Args:
        base: the model of ``reward.base``.
        tokenizer: the policy's.
        whose: in words.

    Raises:
        UserError: if the base has another tokenizer, or its hidden states see what comes after them.
    """
    from rm.checkpoints import is_pooled_here

    remedy = "Give `run` a decoder with the policy's tokenizer; `reward` and `strength` take any model"
    refuse_other_tokenizer(base, f"reward.base {base.path}", tokenizer, f"{whose} policy", remedy)
    if not is_pooled_here(_shape(base.path)):
        raise UserError(
            f"reward.base {base.path} is an encoder: `run` makes the critic of the reward model, and a value must not depend on "
            f"later tokens. {remedy}"
        )


def refuse_other_tokenizer(given: GivenModel, name: str, tokenizer: Any, whose: str, remedy: str) -> None:
    """Token ids go from one model to the other: equal tokens must have equal ids.

    Args:
        given: the model.
        name: of it, in words.
        tokenizer: of the other.
        whose: the other, in words.
        remedy: a sentence for the message.

    Raises:
        UserError: if they have not.
    """
    from rm.checkpoints import check_same_vocabulary

    special = [
        f"{name} {own} and {other}"
        for name, own, other in (
            ("bos_token_id", tokenizer.bos_token_id, given.tokenizer.bos_token_id),
            ("eos_token_id", tokenizer.eos_token_id, given.tokenizer.eos_token_id),
            ("pad_token_id", tokenizer.pad_token_id, given.tokenizer.pad_token_id),
        )
        if own != other
    ]
    try:
        check_same_vocabulary(tokenizer, given.tokenizer, (whose, name))
    except UserError as error:
        raise UserError(f"{error} {remedy}") from error
    if special:
        raise UserError(f"{whose} and {name} differ in {', '.join(special)}. {remedy}")


def _shape(path: Path) -> PreTrainedModel:
    """The sequence classifier that a directory becomes, without weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rm.checkpoints import read_config

    config = read_config(path)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"reward.base {path}: transformers has no sequence classifier for {config.model_type!r}") from error
    return model


def _download(key: str, name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key} {name!r} is no directory here, and the hub did not give it: {reason}") from error
