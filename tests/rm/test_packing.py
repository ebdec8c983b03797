"""Sequences packed into rows: the rows themselves, and that nothing is seen across them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rm.config import Pooling
from rm.model import RewardModel
from rm.packing import PackedBatch, fill_rows, sees_neighbours
from tokens.errors import UserError
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11), (BOS, 12), (BOS,)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27,), (28, EOS), (29,)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 10))
def test_rows_hold_every_sequence_once_and_are_never_too_long(lengths: list[int], more: int) -> None:
    width = max(lengths) + more
    rows = fill_rows(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert max(totals) <= width
    assert sum(2 * total <= width for total in totals) <= 1  # two rows half empty would have been one


def test_a_sequence_that_fits_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens: expected 1 to 8"):
        fill_rows([3, 9], 8)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        fill_rows([0, 9], 9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 3), st.integers(0, 3))
def test_packed_tokens_come_back_where_they_were(lengths: list[int], left: int, right: int) -> None:
    rows = [tuple(range(3 + 20 * i, 3 + 20 * i + length)) for i, length in enumerate(lengths)]
    tight = SequenceBatch.from_ids([row[:1] for row in rows], [row[1:] for row in rows], PAD)
    parts = (tight.input_ids, tight.attention_mask, tight.response_mask)
    batch = SequenceBatch(*(torch.nn.functional.pad(part, (left, right)) for part in parts))
    packed = PackedBatch.of(batch)
    assert len(packed) == len(lengths)
    assert packed.input_ids.shape[0] <= len(lengths) and packed.input_ids.shape[1] <= max(lengths)
    back = packed.unpack(packed.input_ids.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(back[batch.attention_mask], batch.input_ids[batch.attention_mask])
    starts = (packed.position_ids == 0).sum() - (packed.position_ids.numel() - sum(lengths))
    assert starts == len(lengths)


def gradients(model: RewardModel, batch: SequenceBatch | PackedBatch) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    scores = model(batch)
    (scores * torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])).sum().backward()
    return scores.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("pooling", ["last", "before_last", "eos", "mean", "max"])
def test_packed_scores_and_gradients_are_the_padded_ones(start: Start, name: str, pooling: Pooling) -> None:
    model = start(name, pooling)
    packed = PackedBatch.of(BATCH)
    assert packed.input_ids.shape == (4, 8)  # for 5 sequences
    scores, slope = gradients(model, BATCH)
    packed_scores, packed_slope = gradients(model, packed)
    torch.testing.assert_close(packed_scores, scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_slope, slope, rtol=1e-4, atol=1e-5)


def test_packed_scores_are_the_padded_ones_under_eager_attention(start: Start) -> None:
    model = start("llama")
    model.model.set_attn_implementation("eager")
    torch.testing.assert_close(model(PackedBatch.of(BATCH)), model(BATCH), rtol=0, atol=1e-5)


def test_each_packed_sequence_sees_itself_only(start: Start) -> None:
    model = start("llama")
    others = [(prompt[0], *(token + 1 for token in prompt[1:])) for prompt in PROMPTS]
    changed = SequenceBatch.from_ids([*others[:3], PROMPTS[3], others[4]], RESPONSES, PAD)
    before, after = model(PackedBatch.of(BATCH)), model(PackedBatch.of(changed))
    assert before[3] == after[3]
    assert (before != after).sum() == 3  # the last prompt is BOS alone and stays


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_what_cannot_be_packed_is_refused(start: Start, name: str) -> None:
    with pytest.raises(UserError, match=r"Set reward\.packing to false"):
        start(name)(PackedBatch.of(BATCH))


def test_an_attention_that_runs_across_sequences_is_noticed() -> None:
    def leaking(ids: Tensor, positions: Tensor) -> Tensor:
        return ids.cumsum(-1).float().unsqueeze(-1)

    def apart(ids: Tensor, positions: Tensor) -> Tensor:
        return (ids + positions).float().unsqueeze(-1)

    assert sees_neighbours(leaking, (3, 4), torch.device("cpu"))
    assert not sees_neighbours(apart, (3, 4), torch.device("cpu"))


def test_the_check_holds_within_dropout_and_autocast(start: Start) -> None:
    model = start("llama")
    with model.dropout(0.5), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(PackedBatch.of(BATCH)).shape == (5,)


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a packed batch needs ids and positions \[R, W\]"):
        PackedBatch(ids, ids[:, :7], torch.zeros_like(BATCH.input_ids), BATCH)
