"""Dropout on for a while: two views differ, everything is put back, and a recomputation sees what its forward pass saw."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rm.batches import scores_of
from rm.config import LoraConfig
from rm.lora import add_lora
from rm.model import RewardModel
from rm.packing import PackedBatch
from tokens.recompute import recompute_layers
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27,)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
NAMES = ["llama", "gpt2", "opt", "bert", "distilbert", "roberta", "modernbert"]


def state(model: RewardModel) -> list[tuple[str, bool, dict[str, Any]]]:
    """Mode and numbers of every module."""
    return [
        (name, module.training, {key: value for key, value in vars(module).items() if type(value) in (int, float, bool)})
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_views_differ_within_and_none_outside(start: Start, name: str) -> None:
    model = start(name)
    before, plain = state(model), model(BATCH)
    with model.dropout(0.1):
        first, second = model(BATCH), model(BATCH)
        assert (first != second).all() and (first != plain).all()
        torch.manual_seed(1)
        third = model(BATCH)
        torch.manual_seed(1)
        assert torch.equal(model(BATCH), third)
    assert state(model) == before
    assert torch.equal(model(BATCH), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_every_dropout_has_the_rate_asked_for(start: Start, name: str) -> None:
    model = start(name)
    with model.dropout(0.25):
        rates = [
            value
            for module in model.modules()
            for key, value in vars(module).items()
            if ("drop" in key and type(value) is float) or (key == "p" and isinstance(module, torch.nn.Dropout))
        ]
        assert rates and set(rates) == {0.25}
        assert all(module.training for module in model.model.modules())


def test_the_share_of_the_embeddings_that_is_dropped(start: Start) -> None:
    model, seen = start("llama"), []
    with model.dropout(0.3):
        hook = model.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
        for _ in range(20):
            model(BATCH)
        hook.remove()
    dropped = torch.stack(seen)[:, BATCH.attention_mask].eq(0).float()  # padding's embedding is 0 anyway
    assert float(dropped.mean()) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / dropped.numel()) ** 0.5)


def test_none_changes_nothing_and_nested_contexts_end_with_theirs(start: Start) -> None:
    model = start("gpt2")
    plain = model(BATCH)
    with model.dropout(0):
        assert torch.equal(model(BATCH), plain)
    with model.dropout(0.5):
        outer = state(model)
        with model.dropout(0):
            assert torch.equal(model(BATCH), plain)
        with model.dropout(0.1):
            pass
        assert state(model) == outer
        assert not torch.equal(model(BATCH), plain)
    assert torch.equal(model(BATCH), plain)


def test_everything_is_put_back_after_an_error(start: Start) -> None:
    model = start("bert")
    before, plain = state(model), model(BATCH)
    with pytest.raises(ZeroDivisionError), model.dropout(0.5):
        raise ZeroDivisionError
    with pytest.raises(IndexError), model.dropout(0.5):
        model(SequenceBatch.from_ids([(BOS, 999)], [(5,)], PAD))  # within the embeddings
    assert state(model) == before
    assert torch.equal(model(BATCH), plain)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_an_impossible_rate_is_refused(start: Start, rate: float) -> None:
    with pytest.raises(ValueError, match=r"a dropout rate must lie in \[0, 1\)"), start("llama").dropout(rate):
        pass


def two_views(model: RewardModel) -> list[Tensor]:
    """Gradients of a loss over a dropout view, a plain pass and another view; the backward pass runs outside."""
    torch.manual_seed(2)
    with model.dropout(0.2):
        first = model(BATCH)
    plain = model(BATCH)
    with model.dropout(0.4), torch.autocast("cpu", torch.bfloat16):
        second = model(BATCH)
    model.zero_grad()
    (first.sum() + 2 * plain.square().sum() + (first * second).sum()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_recomputed_layers_see_the_dropout_of_their_forward_pass(start: Start, name: str) -> None:
    plain = two_views(start(name))
    model = start(name)
    recompute_layers(model)
    before = state(model)
    for _ in range(2):  # the second time every hook is there already
        again = two_views(model)
        assert len(again) == len(plain)
        for got, wanted in zip(again, plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        assert state(model) == before


def test_a_backward_pass_within_another_context_recomputes_at_the_old_rate(start: Start) -> None:
    def slope(model: RewardModel, within: float) -> Tensor:
        torch.manual_seed(2)
        with model.dropout(0.2):
            scores = model(BATCH)
        model.zero_grad()
        with model.dropout(within):
            scores.sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    recomputing = start("llama")
    recompute_layers(recomputing)
    wanted = slope(start("llama"), 0)
    torch.testing.assert_close(slope(recomputing, 0.7), wanted, rtol=1e-5, atol=1e-7)


def test_adapters_keep_their_own_rate(start: Start) -> None:
    model = start("llama")
    add_lora(model, LoraConfig(rank=4, dropout=0.6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    plain = model(BATCH)
    assert torch.equal(model(BATCH), plain)
    with model.dropout(0):
        adapters = {module.p for name, module in model.named_modules() if name.endswith(".lora_dropout.default")}
        assert adapters == {0.6}
        first, second = model(BATCH), model(BATCH)
    assert (first != second).all()
    with model.dropout(0.1):
        assert {module.p for name, module in model.named_modules() if name.endswith(".lora_dropout.default")} == {0.6}
    assert torch.equal(model(BATCH), plain)


def test_packed_views_have_gradients_too(start: Start) -> None:
    model = start("llama", "mean")
    with model.dropout(0.1):
        scores = scores_of(model, list(zip(PROMPTS, RESPONSES, strict=True)), PAD, 8, packing=True)
        scores.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not torch.equal(scores, model(PackedBatch.of(BATCH)))
