"""Adapters of policy and critic: added, saved for an exact continuation, read again.

The frozen weights are not saved with them: they are the SFT model's, and those of the reward model that the critic began from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tokens.config import AdapterConfig
from tokens.errors import UserError
from tokens.lora import DEFAULT, PREFIX, WEIGHTS, fingerprint, inject, layers_with_adapters, peft_config


def add_adapters(model: PreTrainedModel, config: AdapterConfig, seed: int, head: str | None = None) -> None:
    """Freeze a model and put an adapter on each linear layer of its backbone, in place. What it computes stays as it was.

    To be called before ``ranks.shard`` cuts the model up, and before an optimizer.

    Args:
        model: on any device.
        config: rank >= 1.
        seed: of the adapters' random half.
        head: path of a module that is trained whole, in float32; None = there is none.

    Raises:
        UserError: if the backbone has no linear layers.
    """
    model.requires_grad_(False)
    inject(model.base_model, config, 0.0, DEFAULT, seed)
    if head is not None:
        model.get_submodule(head).float().requires_grad_(True)


def save_adapters(
    model: PreTrainedModel, config: AdapterConfig, path: Path, weights: Mapping[str, Tensor], head: str | None = None
) -> None:
    """Write what is trained, in peft's format, and a fingerprint of what is not.

    Args:
        model: with adapters; may be cut up.
        config: of the adapters.
        path: directory, made if needed.
        weights: the model's state dict, whole tensors of any shapes (``ranks.full_state``).
        head: path of the module that is trained whole.
    """
    path.mkdir(parents=True, exist_ok=True)
    layers = layers_with_adapters(model)
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    heads, task = ([], "CAUSAL_LM") if head is None else ([head], "SEQ_CLS")
    peft_config(config, 0.0, sorted(layers), transposed, heads, task).save_pretrained(str(path))
    trained = {_peft_name(name): weights[name].to("cpu").contiguous() for name in _trained(model)}
    save_file(trained, path / WEIGHTS, metadata={"format": "pt", "backbone": _fingerprint(model, weights)})


def load_adapters(model: PreTrainedModel, path: Path) -> None:
    """Read what ``save_adapters`` wrote.

    Args:
        model: after ``add_adapters``, whole.
        path: the directory.

    Raises:
        UserError: if the adapters belong to other frozen weights, or are of another shape.
    """
    if not (path / WEIGHTS).is_file():
        raise UserError(f"no adapters at {path}: expected {WEIGHTS} there, beside the merged model of the round. Is it whole?")
    with safe_open(path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata["backbone"] != _fingerprint(model, model.state_dict()):
        raise UserError(
            f"the adapters in {path} were trained on other weights than this {type(model).__name__}'s: expected the model "
            "that the run began with. Has the SFT model, or the first round's reward model, been replaced?"
        )
    own = {_peft_name(name): p for name, p in _trained(model).items()}
    differing = sorted(k for k in {*own, *saved} if k not in own or k not in saved or own[k].shape != saved[k].shape)
    if differing:
        raise UserError(f"the adapters in {path} do not fit: {', '.join(differing[:3])} differ. Are they of another rank?")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(saved[key])


def _trained(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _peft_name(name: str) -> str:
    return PREFIX + name.replace(f".{DEFAULT}.weight", ".weight")


def _fingerprint(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> str:
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return fingerprint((name.replace(".base_layer.", "."), weights[name]) for name in frozen)
