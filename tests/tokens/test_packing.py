"""Sequences in one row: equal to padding, gradients too, and blind to their neighbours. Groups of so many tokens."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from policy.critic import Critic
from tokens.errors import UserError
from tokens.logprobs import response_logprobs, response_logprobs_and_entropy
from tokens.packing import PACKED, PackedRow, check_packing, packed_attention, token_groups
from tokens.records import SequenceBatch

PROMPTS = [(1, 5, 6), (1, 7), (1, 8, 9, 10, 11), (1, 12)]
RESPONSES = [(20, 21, 2), (22, 23, 24, 25, 26, 2), (27,), (28, 2)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, 0)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
         "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS = {
    "llama": {},  # four heads of queries share two of keys
    "qwen2": {},
    "mistral": {"sliding_window": 3},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32},
}


def language_model(kind: str = "llama", attention: str | None = None, **settings: int) -> PreTrainedModel:
    shape = (
        SHAPE if kind != "gpt2" else {key: SHAPE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **KINDS.get(kind, {}), **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()  # type: ignore[no-any-return]


def with_gradient(model: nn.Module, values: Tensor) -> tuple[Tensor, list[Tensor]]:
    weights = torch.linspace(-1, 2, values.numel(), device=values.device).view(values.shape)
    model.zero_grad()
    (values * weights).sum().backward()  # type: ignore[no-untyped-call]
    return values.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_equal(left: tuple[Tensor, list[Tensor]], right: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-5)
    assert len(left[1]) == len(right[1]) > 10
    for a, b in zip(left[1], right[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logprobs_and_gradients_are_the_padded_ones(kind: str) -> None:
    padded, packed = language_model(kind), language_model(kind, PACKED)
    check_packing(packed)
    assert_equal(*(with_gradient(model, response_logprobs(model, BATCH, 0.7)) for model in (packed, padded)))
    for got, wanted in zip(*(response_logprobs_and_entropy(model, BATCH, 0.7) for model in (packed, padded)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_packed_values_are_the_padded_ones() -> None:
    critics = []
    for attention in (PACKED, None):
        torch.manual_seed(1)
        config = LlamaConfig(**SHAPE, num_labels=1, attn_implementation=attention)
        critics.append(Critic(LlamaForSequenceClassification(config).eval()))
    assert_equal(*(with_gradient(critic, critic(BATCH)) for critic in critics))
    first = SequenceBatch(BATCH.input_ids, BATCH.attention_mask, BATCH.attention_mask)  # responses without a prompt
    assert bool((critics[0](first)[:, 0] == 0).all())


def test_a_sequence_does_not_see_its_neighbours() -> None:
    model = language_model(attention=PACKED)
    changed = SequenceBatch.from_ids(
        [PROMPTS[0], (1, 30), *PROMPTS[2:]], [RESPONSES[0], (31, 32, 33, 34, 35, 2), *RESPONSES[2:]], 0
    )
    before, after = response_logprobs(model, BATCH), response_logprobs(model, changed)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert not torch.isclose(before[1, 3:8], after[1, 3:8]).any()


def test_a_row_is_laid_out_by_hand() -> None:
    batch = SequenceBatch(
        torch.tensor([[0, 7, 8], [9, 0, 0]]), torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(), torch.zeros(2, 3, dtype=torch.bool)
    )
    row = PackedRow.of(batch)
    assert row.input_ids.tolist() == [[7, 8, 9]] and row.position_ids.tolist() == [[0, 1, 0]]
    assert row.bounds.tolist() == [0, 2, 3] and row.places.tolist() == [1, 2, 3] and row.longest == 2


def test_what_cannot_be_packed_is_refused() -> None:
    model = language_model(attention=PACKED)
    with pytest.raises(UserError, match=r"called without the bounds.*policy\.packing"):
        model(input_ids=BATCH.input_ids)
    with pytest.raises(UserError, match="softcap"):
        check_packing(language_model("gemma2", PACKED, head_dim=8))
    layer, x = nn.Linear(1, 1), torch.zeros(1, 2, 3, 4)
    for asked in ({"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(UserError, match="which attention to packed sequences cannot do"):
            packed_attention(layer, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3, **asked)  # type: ignore[arg-type]


def test_attention_across_sequences_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(attention=PACKED)
    whole: Callable[..., PackedRow] = PackedRow.of

    def leaking(batch: SequenceBatch) -> PackedRow:
        row = whole(batch)
        end = row.input_ids.shape[1]
        return PackedRow(row.input_ids, row.position_ids, torch.tensor([0, end]), end, row.places)

    monkeypatch.setattr(PackedRow, "of", leaking)
    with pytest.raises(UserError, match="other states than each by itself"):
        check_packing(model)
    assert model.config._attn_implementation == PACKED


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 60), st.data())
def test_groups_hold_every_sequence_once_and_no_more_tokens_than_allowed(
    lengths: list[int], limit: int, data: st.DataObject
) -> None:
    at_least = data.draw(st.integers(1, len(lengths)))
    groups = token_groups(lengths, limit, at_least)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= limit or len(group) == 1 for group in groups)
    assert len(groups) == max(at_least, len(token_groups(lengths, limit)))


def test_more_groups_than_sequences_are_refused() -> None:
    assert token_groups([4, 9, 2], 6) == [[2, 0], [1]]
    with pytest.raises(ValueError, match="2 sequences do not make 3 groups"):
        token_groups([1, 1], 5, at_least=3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_gpu_kernel_agrees_with_padding(kind: str) -> None:
    padded, packed = (language_model(kind, attention, head_dim=16).cuda() for attention in (None, PACKED))
    batch = BATCH.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        left, right = (with_gradient(model, response_logprobs(model, batch)) for model in (packed, padded))
        changed = SequenceBatch.from_ids([PROMPTS[0], (1, 30), *PROMPTS[2:]], RESPONSES, 0).to("cuda")
        assert torch.equal(response_logprobs(packed, changed)[[0, 2, 3]], left[0][[0, 2, 3]])
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=0.05)
    for a, b in zip(left[1], right[1], strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05
    exact = [with_gradient(model, response_logprobs(model, batch)) for model in (packed, padded)]  # float32: no such kernel
    torch.testing.assert_close(exact[0][0], exact[1][0], rtol=0, atol=1e-4)
