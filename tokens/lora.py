"""Low-rank adapters on any model of transformers: put there, taken out of the way, merged.

    h = W x + (alpha / r) B A x,    A [r, in], B [out, r];  W is frozen, B starts at 0

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", Eq 3; layers by peft, imported where they are used.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokens.config import AdapterConfig
from tokens.errors import UserError

DEFAULT = "default"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""What peft calls the two files of a saved adapter; its ``PeftModel.from_pretrained(model, path)`` reads them too."""
PREFIX = "base_model.model."
"""What peft puts before the names of weights in them."""


def inject(backbone: nn.Module, config: AdapterConfig, dropout: float, name: str, seed: int) -> None:
    """Put an adapter on each linear layer of a backbone, in place. What the backbone computes stays as it was.

    Adapters are float32, whatever the backbone is. To be called before ``ranks.shard`` cuts the model up.

    Args:
        backbone: a model of transformers without its head; freezing it is the caller's.
        config: rank >= 1.
        dropout: in front of the adapters.
        name: of the adapter; one that the backbone does not have yet.
        seed: of A's random numbers; the global generator is not touched.

    Raises:
        UserError: if the backbone has no linear layers.
    """
    from peft import inject_adapter_in_model

    targets = [key.removesuffix(".base_layer") for key, module in backbone.named_modules() if _is_linear(module, key)]
    if not targets:
        raise UserError(f"{type(backbone).__name__} has no linear layers for adapters: train all weights (lora.rank 0)")
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # It is set per layer, rightly; and several adapters on one backbone are meant.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to|Already found a `peft_config`", category=UserWarning)
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(config, dropout, targets, transposed, None), backbone, name)
    for key, parameter in backbone.named_parameters():
        if is_of(name, key):
            parameter.data = parameter.data.float()


def peft_config(
    config: AdapterConfig,
    dropout: float,
    targets: list[str],
    transposed: bool,
    heads: list[str] | None,
    task: str | None = None,
) -> Any:
    """Peft's settings of an adapter.

    Args:
        config: rank and scale.
        dropout: in front of the adapters.
        targets: paths of the layers.
        transposed: whether their weights are [in, out].
        heads: modules that are trained whole; None = for training, else for a file.
        task: peft's name of what the model does.
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=config.rank,
        lora_alpha=cast(int, config.alpha),  # any number; the annotation is narrower
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        modules_to_save=heads,
        inference_mode=heads is not None,
    )


def layers_with_adapters(model: nn.Module) -> dict[str, Any]:
    """Layers with adapters, by path.

    Args:
        model: of any kind.
    """
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged_stream(
    model: nn.Module, name: str, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Weights one by one, as they would be if the model's adapters were part of them; little is held at a time.

        W + (alpha / r) B A, computed in float32

    Args:
        model: with adapters; it is not changed.
        name: of the adapter.
        weights: names in the model's state dict and whole tensors of any shapes; in any order, the state dict's holds least.
        dtype: of weights that an adapter was added to; None = W's own. bfloat16 drops what is smaller than its last digit.

    Returns:
        Name and weight, by the names of the model without adapters.
    """
    layers = layers_with_adapters(model)
    parts: dict[str, str] = {}
    for path in layers:
        parts |= {f"{path}.{part}": path for part in ("base_layer.weight", f"lora_A.{name}.weight", f"lora_B.{name}.weight")}
    waiting: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    for key, value in weights:
        if key not in parts:
            if ".lora_" not in key:
                yield key.replace(".base_layer.", "."), value
            continue
        path = parts[key]
        waiting[path][key.removeprefix(f"{path}.").partition(".")[0]] = value
        if len(waiting[path]) == 3:
            found, layer = waiting.pop(path), layers[path]
            base = found["base_layer"]
            delta = layer.scaling[name] * (found["lora_B"].float() @ found["lora_A"].float())  # [out, in]
            delta = (delta.T if layer.fan_in_fan_out else delta).to(base.device)
            yield f"{path}.weight", (base.float() + delta).to(dtype or base.dtype)


def merged(model: nn.Module, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict that the model would have if its adapters were part of its weights; see ``merged_stream``.

    Args:
        model: with adapters; it is not changed.
        name: of the adapter.
        weights: its state dict, whole tensors of any shapes.
        dtype: of weights that an adapter was added to; None = W's own.

    Returns:
        By the names of the model without adapters; tied weights are still tied.
    """
    return dict(merged_stream(model, name, weights.items(), dtype))


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes and each weight's first numbers, in bfloat16, so that the same checkpoint in another dtype is the same.

    Args:
        weights: name and value, any shape, in the model's order.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in weights:
        start = value.detach().flatten()[:32].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(value.shape)} {start.tolist()}".encode())
    return digest.hexdigest()


def is_of(name: str, key: str) -> bool:
    """Whether a parameter belongs to an adapter: its name ends in .lora_A.NAME.weight or .lora_B.NAME.weight.

    Args:
        name: the adapter's.
        key: the parameter's.
    """
    return any(key.endswith(f".lora_{part}.{name}.weight") for part in "AB")


class WithoutAdapters(nn.Module):
    """A model as it is without its adapters, with no weights of its own: called, it calls the model with them out of the way.

    Args:
        model: with adapters; it is not a submodule, so nothing done to this module's parameters reaches it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = (model,)

    @property
    def model(self) -> PreTrainedModel:
        """The model with its adapters."""
        return self._model[0]

    @property
    def config(self) -> PreTrainedConfig:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def forward(self, **inputs: Any) -> Any:
        """What the model without its adapters answers; without gradient.

        Args:
            inputs: the model's.
        """
        with torch.no_grad(), _set_aside(self.model):
            return self.model(**inputs)


@contextmanager
def _set_aside(model: nn.Module) -> Iterator[None]:
    """Adapters are not computed with. Peft's own switch also freezes them, which FSDP2's weights would remember."""
    layers = layers_with_adapters(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _is_linear(module: nn.Module, path: str) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in path and not path.startswith("pooler.")
