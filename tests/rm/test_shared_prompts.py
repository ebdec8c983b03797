"""Responses behind a shared prompt: who sees whom, what is laid out where, and that no score is another one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rm import batches, shared_prompts
from rm.batches import score_sequences, scores_of
from rm.config import Pooling
from rm.model import RewardModel
from rm.shared_prompts import SharedBatch, row_width, sees_as_it_is_told, shared_passes
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
LONG, SHORT = (BOS, 5, 6, 7, 8, 9), (BOS, 7)
ROWS = [[(LONG, (20, 21, EOS)), (LONG, (22,)), (LONG, (23, 24, EOS, 25))], [(SHORT, (26, EOS)), (SHORT, (27,))]]
SEQUENCES = [ROWS[0][0], ROWS[1][0], ROWS[0][1], ROWS[0][2], ROWS[1][1]]


def test_who_sees_whom_by_hand() -> None:
    batch = SharedBatch.of([[((3, 4), (5, 6)), ((3, 4), (7,))], [((8,), (9,))]], PAD)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.mask()[:, 0].int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
    ]
    assert len(batch) == 3
    back = batch.unpack(batch.input_ids[..., None])[..., 0]
    assert torch.equal(back[batch.sequences.attention_mask], batch.sequences.input_ids[batch.sequences.attention_mask])


def test_a_row_has_one_prompt() -> None:
    with pytest.raises(ValueError, match="row 0 has sequences of several prompts"):
        SharedBatch.of([[((3, 4), (5,)), ((3,), (5,))]], PAD)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=40), st.integers(1, 9))
def test_every_sequence_is_in_one_row_of_its_prompt_and_no_pass_is_too_large(drawn: list[tuple[int, int]], size: int) -> None:
    sequences = [(tuple(range(40 + prompt, 70)), (1,) * length) for prompt, length in drawn]
    passes = shared_passes(sequences, size)
    assume(passes is not None)
    assert passes is not None
    assert sorted(i for rows in passes for row in rows for i in row) == list(range(len(sequences)))
    assert all(len({sequences[i][0] for i in row}) == 1 for rows in passes for row in rows)
    assert all(sum(len(row) for row in rows) <= size for rows in passes)


def test_rows_are_no_wider_than_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "WIDEST", 12)
    sequences = [(LONG, (20,) * 3)] * 5
    passes = shared_passes(sequences, 8)
    assert passes is not None and [len(row) for rows in passes for row in rows] == [2, 2, 1]
    assert max(row_width([sequences[i] for i in row]) for rows in passes for row in rows) == 12


def test_nothing_is_shared_where_that_saves_little() -> None:
    assert shared_passes([(LONG, (20,)), ((*LONG, 3), (20,))], 8) is None, "no prompt comes twice"
    assert shared_passes([((3,), (20,) * 30), ((3,), (21,) * 30)], 8) is None, "one token of 31"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "opt"])
@pytest.mark.parametrize("pooling", ["last", "before_last", "eos", "mean", "max"])
def test_no_score_is_another_one(start: Start, name: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = start(name, pooling)
    assert model.shares_prompts(10)
    found = score_sequences(model, SEQUENCES, 3, PAD)
    monkeypatch.setattr(batches, "shared_passes", lambda sequences, batch_size: None)
    torch.testing.assert_close(found, score_sequences(model, SEQUENCES, 3, PAD), rtol=0, atol=1e-5)
    alone = [model(SequenceBatch.from_ids([prompt], [response], PAD)) for prompt, response in SEQUENCES]
    torch.testing.assert_close(found, torch.cat(alone).detach(), rtol=0, atol=1e-5)


def test_prompts_are_computed_once(start: Start) -> None:
    model, seen = start("llama"), list[int]()
    model.shares_prompts(10)
    model.model.base_model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    score_sequences(model, [(LONG, (20, EOS))] * 8, 8, PAD)
    assert seen == [len(LONG) + 8 * 2]


def test_the_trial_is_not_rounded_by_autocast(start: Start) -> None:
    model, seen = start("llama"), list[torch.dtype]()
    model.model.base_model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.shares_prompts(10)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "opt"])
def test_gradients_are_those_of_sequences_alone(start: Start, name: str) -> None:
    model = start(name)
    assert model.shares_prompts(10)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.5])

    def gradient(share: bool) -> torch.Tensor:
        model.zero_grad()
        (scores_of(model, SEQUENCES, PAD, 3, share=share) * weights).sum().backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    alone, seen = gradient(False), list[int]()
    model.model.base_model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    shared = gradient(True)
    assert sum(seen) < sum(len(prompt) + len(response) for prompt, response in SEQUENCES)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["gemma2", "bert", "distilbert"])
def test_what_cannot_share_is_scored_alone(start: Start, name: str) -> None:
    model = start(name)
    assert not model.shares_prompts(10)
    alone = [model(SequenceBatch.from_ids([prompt], [response], PAD)) for prompt, response in SEQUENCES]
    torch.testing.assert_close(score_sequences(model, SEQUENCES, 3, PAD), torch.cat(alone).detach(), rtol=0, atol=1e-5)


def test_a_window_as_long_as_the_longest_sequence_plays_no_part(start: Start) -> None:
    config = start("gemma2").model.config
    config._attn_implementation = "sdpa"
    assert sees_as_it_is_told(config, 4) and not sees_as_it_is_told(config, 5), "its window is 4"
    config._attn_implementation = "eager"
    assert not sees_as_it_is_told(config, 4), "which adds its mask, and this one is of bools"


def test_a_model_that_hears_of_no_mask_is_found_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model = start("llama")
    hidden = model._hidden
    monkeypatch.setattr(model, "_hidden", lambda ids, mask, positions: hidden(ids, None, positions))
    assert not model.shares_prompts(10)
