"""Recomputing activations changes memory, not gradients; with and without FSDP2's units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokens.errors import UserError
from tokens.logprobs import response_logprobs
from tokens.recompute import recompute_layers
from tokens.records import SequenceBatch


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(shape).eval()


def gradients(language_model: LlamaForCausalLM) -> tuple[dict[str, torch.Tensor], int]:
    batch = SequenceBatch.from_ids([[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10]], pad_id=0)
    kept = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = response_logprobs(language_model, batch).sum()
    loss.backward()
    return {name: p.grad for name, p in language_model.named_parameters() if p.grad is not None}, kept


def test_gradients_are_equal_and_less_is_kept_even_in_evaluation_mode() -> None:
    plain, kept = gradients(model())
    saving = model()
    recompute_layers(saving)
    again, kept_less = gradients(saving)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert kept_less < kept / 2


def test_an_architecture_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="recompute_activations"):
        recompute_layers(nn.Linear(2, 2))
