"""Where a sequence's features are read, by hand."""

import pytest
import torch
from torch import Tensor

from rm.config import Pooling
from rm.pooling import left_aligned, pool, reads_padding
from tokens.records import SequenceBatch

PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, EOS), (BOS, 6), (BOS, 7)]
RESPONSES = [(8, 9, EOS, 10), (11, EOS), (12, 13, 14)]
# Columns of the tokens that each pooling must read.
LAST, FIRST_EOS = [6, 3, 4], [5, 3, 4]


def states(rows: int, width: int) -> Tensor:
    """All below zero, so that a maximum over zeroed padding would show."""
    return -1 - torch.rand(rows, width, 4, generator=torch.Generator().manual_seed(0))


def test_last_is_the_last_attended_token_and_eos_the_responses_first_eos() -> None:
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    hidden, rows = states(3, 7), torch.arange(3)
    assert torch.equal(pool(hidden, batch, "last", ()), hidden[rows, LAST])
    assert torch.equal(pool(hidden, batch, "eos", (EOS,)), hidden[rows, FIRST_EOS])  # the prompt's own EOS does not count
    assert torch.equal(pool(hidden, batch, "eos", (99, 9, EOS)), hidden[rows, [4, 3, 4]])  # 9 ends the first response earlier
    assert torch.equal(pool(hidden, batch, "eos", ()), hidden[rows, LAST])


def test_the_off_by_one_trap() -> None:
    """DSP reads "last" one token before EOS and "eos" at it; Hugging Face's "last", and ours, is EOS."""
    batch = SequenceBatch.from_ids([(BOS, 5)], [(8, 9, EOS)], PAD)
    hidden = states(1, 5)
    dsp_last, dsp_eos = hidden[:, 3], hidden[:, 4]
    assert torch.equal(pool(hidden, batch, "last", (EOS,)), dsp_eos)
    assert torch.equal(pool(hidden, batch, "eos", (EOS,)), dsp_eos)
    assert torch.equal(pool(hidden, batch, "before_last", (EOS,)), dsp_last)
    assert not torch.equal(dsp_last, dsp_eos)


def test_the_token_before_the_last_may_be_the_prompts_and_is_never_padding() -> None:
    batch = SequenceBatch.from_ids([(BOS, 5), (7,)], [(EOS,), (8, 9, EOS)], PAD)
    hidden = states(2, 4)
    assert torch.equal(pool(hidden, batch, "before_last", ()), hidden[torch.arange(2), [1, 2]])
    alone = SequenceBatch(torch.tensor([[5, PAD]]), torch.tensor([[True, False]]), torch.tensor([[False, False]]))
    assert torch.equal(pool(hidden[:1, :2], alone, "before_last", ()), hidden[:1, 0])


def test_mean_and_max_run_over_the_response() -> None:
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    hidden = states(3, 7)
    responses = [hidden[0, 3:7], hidden[1, 2:4], hidden[2, 2:5]]
    torch.testing.assert_close(pool(hidden, batch, "mean", ()), torch.stack([r.mean(0) for r in responses]), rtol=0, atol=1e-6)
    assert torch.equal(pool(hidden, batch, "max", ()), torch.stack([r.amax(0) for r in responses]))


@pytest.mark.parametrize("pooling", ["last", "before_last", "eos", "mean", "max"])
def test_padding_is_not_read_whatever_is_there(pooling: Pooling) -> None:
    batch = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
    hidden = states(3, 7).masked_fill(~batch.attention_mask.unsqueeze(-1), 1e9)
    wide = SequenceBatch(
        torch.nn.functional.pad(batch.input_ids, (2, 3), value=EOS),  # padding that looks like the end of a response
        torch.nn.functional.pad(batch.attention_mask, (2, 3)),
        torch.nn.functional.pad(batch.response_mask, (2, 3)),
    )
    around = torch.nn.functional.pad(hidden, (0, 0, 2, 3), value=-1e9)
    assert torch.equal(pool(around, wide, pooling, (EOS,)), pool(hidden, batch, pooling, (EOS,)))
    aligned = left_aligned(wide)
    assert torch.equal(aligned.input_ids[:, :7][batch.attention_mask], batch.input_ids[batch.attention_mask])
    assert torch.equal(aligned.attention_mask[:, :7], batch.attention_mask)
    assert torch.equal(aligned.response_mask[:, :7], batch.response_mask)


def test_a_mean_of_narrow_states_is_taken_in_float32() -> None:
    batch = SequenceBatch.from_ids([(BOS,)], [tuple([5] * 300)], PAD)
    hidden = torch.full((1, 301, 2), 1.0, dtype=torch.bfloat16)  # bfloat16 cannot count to 300
    mean = pool(hidden, batch, "mean", ())
    assert mean.dtype == torch.float32 and mean.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("pooling", ["eos", "mean", "max"])
def test_a_sequence_without_a_response_is_refused(pooling: Pooling) -> None:
    batch = SequenceBatch.from_ids([(BOS, 5), (BOS, 6)], [(7,), ()], PAD)
    with pytest.raises(ValueError, match=f"{pooling} pooling: sequence 1 of the batch has no response"):
        pool(states(2, 3), batch, pooling, (EOS,))


def test_reading_padding_is_noticed() -> None:
    assert reads_padding(lambda batch: batch.input_ids[:, -1:].float(), (4, 5))
    assert not reads_padding(lambda batch: (batch.input_ids * batch.attention_mask).sum(1, keepdim=True).float(), (4, 5))
