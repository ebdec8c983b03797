"""Low-rank adapters on a reward model's backbone, and several of them on one backbone.

    h = W x + (alpha / r) B A x,    A [r, in], B [out, r];  W is frozen, B starts at 0

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", Eq 3; ``tokens.lora`` has what any model needs.

Everything outside the backbone, and an encoder's pooler in it, is trained whole ("the head").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rm.config import LoraConfig
from tokens.errors import UserError
from tokens.lora import DEFAULT, PREFIX, SETTINGS, WEIGHTS, fingerprint, inject, is_of, layers_with_adapters, peft_config
from tokens.ranks import ALONE, Ranks, full

if TYPE_CHECKING:
    from rm.model import RewardModel


@dataclass
class Adapters:
    """The adapters of one reward model; kept on it as ``adapters``.

    Args:
        active: name of the one that is computed with, trained and saved.
        backbone: fingerprint of the frozen weights, which an adapter is worth nothing without.
        configs: of each, by name.
        heads: head weights of those that are not active, by name.
    """

    active: str
    backbone: str
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def add_lora(model: RewardModel, config: LoraConfig, *, seed: int = 0, name: str = DEFAULT) -> None:
    """Freeze the backbone and put an adapter on each of its linear layers, in place; the adapter becomes the active one.

    A freshly added adapter changes no score. The head goes on as it is, trained whole. Adapters are float32, and so is a
    decoder's head, whatever the backbone is. To be called before ``ranks.shard`` cuts the model up, and before an optimizer.

    Args:
        model: on any device.
        config: rank >= 1.
        seed: of A's random numbers; the global generator is not touched.
        name: of the adapter; one that the model does not have yet.

    Raises:
        UserError: if the rank is 0, or the backbone has no linear layers.
        ValueError: if there is an adapter of that name.
    """
    if config.rank < 1:
        raise UserError(f"reward.lora.rank is {config.rank}: expected at least 1 for adapters. Raise it, or train all weights.")
    classifier, backbone = model.model, model.model.base_model
    if model.adapters is not None and name in model.adapters.configs:
        raise ValueError(f"there is an adapter {name!r} already")
    if model.adapters is None:
        model.adapters = Adapters(name, _fingerprint(backbone))
        backbone.requires_grad_(False)
        if model.pooled_here:  # an encoder's head computes inside the model, in its dtype
            model.head.float()
    else:
        model.adapters.heads[name] = {key: p.detach().clone() for key, p in _head(classifier).items()}
    inject(backbone, config, config.dropout, name, seed)
    model.adapters.configs[name] = config
    use_adapter(model, name)
    model.eval()


def use_adapter(model: RewardModel, name: str) -> None:
    """Make one of the adapters the active one, its head with it.

    Args:
        model: with adapters.
        name: of one of them.

    Raises:
        ValueError: if it has none of that name.
    """
    adapters = _adapters(model)
    if name not in adapters.configs:
        raise ValueError(f"no adapter {name!r}: there are {', '.join(sorted(adapters.configs))}")
    head = _head(model.model)
    if name != adapters.active:
        adapters.heads[adapters.active] = {key: p.detach().clone() for key, p in head.items()}
        with torch.no_grad():
            for key, value in adapters.heads.pop(name).items():
                head[key].copy_(value)
        adapters.active = name
    for layer in layers_with_adapters(model.model).values():
        layer.set_adapter(name)
    for parameter in head.values():
        parameter.requires_grad_(True)


def save_adapter(model: RewardModel, path: str | Path, ranks: Ranks = ALONE) -> None:
    """Write the active adapter and its head to ``path``: a few megabytes instead of the whole model.

    Args:
        model: with adapters.
        path: directory, made if needed.
        ranks: that share the model; all must call this, rank 0 writes.
    """
    adapters = _adapters(model)
    config = adapters.configs[adapters.active]
    weights = {name: full(p.detach()) for name, p in _adapter_weights(model).items()}
    if ranks.rank == 0:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        targets = sorted(layers_with_adapters(model.model))
        heads = sorted({_module_of(key, f"{model.model.base_model_prefix}.") for key in _head(model.model)})
        peft_config(config, config.dropout, targets, _is_transposed(model.model), heads, "SEQ_CLS").save_pretrained(str(folder))
        save_file(
            {PREFIX + name: value.to("cpu").contiguous() for name, value in weights.items()},
            folder / WEIGHTS,
            metadata={"format": "pt", "backbone": adapters.backbone},
        )


def load_adapter(model: RewardModel, path: str | Path, name: str = DEFAULT) -> None:
    """Read a saved adapter and its head, and make it the active one; adds it, or overwrites one of that name.

    Args:
        model: on the backbone that the adapter was trained on, with or without other adapters.
        path: as written by ``save_adapter``.
        name: that the adapter gets here.

    Raises:
        UserError: if there is no adapter, or it belongs to another backbone.
    """
    weights, scale = read_adapter(model, path)
    if model.adapters is None or name not in model.adapters.configs:
        add_lora(model, LoraConfig(rank=scale.rank, alpha=scale.alpha, dropout=scale.dropout), name=name)
    use_adapter(model, name)
    own = _adapter_weights(model)
    differing = sorted(
        key for key in {*own, *weights} if key not in own or key not in weights or own[key].shape != weights[key].shape
    )
    if differing:
        raise UserError(
            f"the adapter in {path} does not fit this model: {', '.join(differing[:3])} differ. Is it of another rank?"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(weights[key])


@dataclass(frozen=True)
class Scale:
    """How an adapter was trained.

    Args:
        rank: r.
        alpha: scale of B A is alpha / r.
        dropout: in front of it.
    """

    rank: int
    alpha: float
    dropout: float

    @property
    def factor(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def read_adapter(model: RewardModel, path: str | Path) -> tuple[dict[str, Tensor], Scale]:
    """A saved adapter's weights and its head's, by their names in the classifier; the model is not changed.

    Args:
        model: on the backbone that the adapter was trained on.
        path: as written by ``save_adapter``.

    Returns:
        The weights, on the CPU, and the adapter's scale.

    Raises:
        UserError: if there is no adapter, or it belongs to another backbone.
    """
    from peft import LoraConfig as PeftConfig

    folder = Path(path)
    if not (folder / WEIGHTS).is_file() or not (folder / SETTINGS).is_file():
        raise UserError(f"no adapter at {path}: expected {SETTINGS} and {WEIGHTS} there. Check the path.")
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
            weights = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot read the adapter in {path}: {error}") from error
    backbone = _fingerprint(model.model.base_model) if model.adapters is None else model.adapters.backbone
    if "backbone" not in metadata or metadata["backbone"] != backbone:
        raise UserError(
            f"the adapter in {path} was trained on another backbone than this {type(model.model).__name__}: expected the "
            "weights that it was trained on. Load those first."
        )
    return weights, Scale(settings.r, settings.lora_alpha, settings.lora_dropout)


def _head(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What is trained whole, by name."""
    inside = {id(p) for name, p in model.base_model.named_parameters() if not name.startswith("pooler.")}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def _module_of(key: str, backbone: str) -> str:
    """The outermost module that is trained whole: a child of the classifier, or the backbone's pooler."""
    return f"{backbone}pooler" if key.startswith(backbone) else key.partition(".")[0]


def _adapter_weights(model: RewardModel) -> dict[str, nn.Parameter]:
    """The active adapter's parameters and the head's, by names without the adapter's own."""
    active = _adapters(model).active
    lora = {key.replace(f".{active}.weight", ".weight"): p for key, p in model.model.named_parameters() if is_of(active, key)}
    return {**lora, **_head(model.model)}


def _adapters(model: RewardModel) -> Adapters:
    if model.adapters is None:
        raise ValueError("the model has no adapters: call add_lora or load_adapter first")
    return model.adapters


def _is_transposed(model: nn.Module) -> bool:
    return any(layer.fan_in_fan_out for layer in layers_with_adapters(model).values())


def _fingerprint(backbone: nn.Module) -> str:
    return fingerprint((name, p) for name, p in backbone.named_parameters() if not name.startswith("pooler."))
