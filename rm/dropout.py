"""Dropout that is off, and on for as long as a loss needs two differing views of the same sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

OTHER_NOISE = ("layerdrop", "layer_drop", "drop_path", "jitter")
"""Names of other things that transformers does to a model in training mode; they stay off."""
_RATE = "rondo_dropout_rate"
_State = list[tuple[nn.Module, bool, dict[str, Any]]]


class Dropout:
    """Switches every dropout of a model to one rate for a while, and puts everything back as it was.

    It reaches ``nn.Dropout`` modules and the numbers of modules that functional dropout reads (``attention_dropout`` and the
    like). The token embeddings are dropped out too: a decoder that has no hidden dropout (Llama, Qwen, ...) would otherwise give
    two views that hardly differ. Dropout of LoRA adapters is on at its own rate.

    A layer whose activations are recomputed in the backward pass is recomputed at the rate of its forward pass, wherever the
    backward pass runs.

    Args:
        model: of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rate: float | None = None
        """None: off."""
        self._before: dict[nn.Module, _State] = {}
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def at(self, rate: float | None) -> Iterator[None]:
        """Context in which forward passes use dropout.

        Args:
            rate: in [0, 1); None = all off, inside another such context too.

        Raises:
            ValueError: if ``rate`` is not in [0, 1).
        """
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"a dropout rate must lie in [0, 1), got {rate}")
        if rate == 0 and not _adapter_dropouts(self.model):
            rate = None
        self._follow_layers()
        outer, self.rate = self.rate, rate
        state = _switch(self.model, rate)
        embeddings = self._drop_embeddings() if rate else None
        try:
            yield
        finally:
            if embeddings is not None:
                embeddings.remove()
            _restore(state)
            self.rate = outer

    def _drop_embeddings(self) -> RemovableHandle:
        def drop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output if self.rate is None else functional.dropout(output, self.rate)

        return self.model.get_input_embeddings().register_forward_hook(drop)

    def _follow_layers(self) -> None:
        """Let each layer's call carry its rate, so that a recomputation, which repeats the call, knows it.

        ``_stamp`` must run before the hook that makes a layer recompute, which keeps the arguments, and ``_enter`` after it.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                self._hooks += [
                    layer.register_forward_pre_hook(self._stamp, prepend=True, with_kwargs=True),
                    layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                    layer.register_forward_hook(self._leave, always_call=True),
                ]

    def _stamp(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if _RATE in kwargs else {**kwargs, _RATE: self.rate}

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rate = kwargs[_RATE]
        if rate != self.rate:
            self._before[layer] = _switch(layer, rate)
        return args, {name: value for name, value in kwargs.items() if name != _RATE}

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if layer in self._before:
            _restore(self._before.pop(layer))


def _switch(root: nn.Module, rate: float | None) -> _State:
    """Set every dropout below ``root``; what was there before."""
    adapters = _adapter_dropouts(root)
    state: _State = []
    for module in root.modules():
        numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
        rates = {
            name: value for name, value in numbers.items() if "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
        }
        noise = {name: value for name, value in numbers.items() if any(word in name for word in OTHER_NOISE)}
        state.append((module, module.training, rates | noise))
        module.training = rate is not None
        if rate is not None and module not in adapters:
            for name in rates | noise:
                setattr(module, name, 0.0 if name in noise else rate)
    return state


def _restore(state: _State) -> None:
    for module, training, numbers in state:
        module.training = training
        for name, value in numbers.items():
            setattr(module, name, value)


def _adapter_dropouts(root: nn.Module) -> set[nn.Module]:
    return {module for name, module in root.named_modules() if ".lora_dropout." in f".{name}." and isinstance(module, nn.Dropout)}
