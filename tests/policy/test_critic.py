"""The critic: what a value may depend on, padding, and saved directories."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from policy.critic import Critic
from tokens.errors import UserError
from tokens.records import SequenceBatch

MakeCritic = Callable[[int], Critic]
PROMPTS, RESPONSES = [[3, 4, 5], [6]], [[7, 8, 9, 1], [10, 1]]


def _with_token(batch: SequenceBatch, row: int, column: int, token: int) -> SequenceBatch:
    ids = batch.input_ids.clone()
    assert ids[row, column] != token
    ids[row, column] = token
    return SequenceBatch(ids, batch.attention_mask, batch.response_mask)


@torch.no_grad()
def test_value_at_t_reads_the_tokens_before_t_and_no_other(critic: MakeCritic) -> None:
    model, batch = critic(0), SequenceBatch.from_ids(PROMPTS, RESPONSES, 0)
    values = model(batch)
    for column in range(7):
        changed = model(_with_token(batch, 0, column, 20))
        torch.testing.assert_close(changed[0, : column + 1], values[0, : column + 1])
        after = batch.response_mask[0, column + 1 :]
        moved = (changed - values)[0, column + 1 :].abs() > 1e-6
        assert moved[after].all(), f"a change of token {column} must move every later value"


@torch.no_grad()
def test_value_is_the_head_on_the_hidden_state_one_before(critic: MakeCritic) -> None:
    model = critic(0)
    prefix = torch.tensor([[3, 4, 5, 7]])
    scores = model.model(input_ids=prefix).logits  # Hugging Face's own reading of the last token
    values = model(SequenceBatch.from_ids(PROMPTS[:1], RESPONSES[:1], 0))
    torch.testing.assert_close(values[0, 4], scores[0, 0])


@torch.no_grad()
def test_padding_changes_nothing_and_values_are_zero_outside_the_response(critic: MakeCritic) -> None:
    model, batch = critic(0), SequenceBatch.from_ids(PROMPTS, RESPONSES, 0)
    values = model(batch)
    assert not values[~batch.response_mask].any() and values[batch.response_mask].all()
    for left, right in ((0, 3), (3, 0), (2, 2)):
        pad = torch.nn.functional.pad
        wide = SequenceBatch(
            pad(batch.input_ids, (left, right), value=9),
            pad(batch.attention_mask, (left, right), value=False),
            pad(batch.response_mask, (left, right), value=False),
        )
        torch.testing.assert_close(model(wide)[:, left : left + 7], values, atol=1e-6, rtol=1e-5)


def test_save_and_load_give_equal_values(critic: MakeCritic, tmp_path: Path) -> None:
    model, batch = critic(0), SequenceBatch.from_ids(PROMPTS, RESPONSES, 0)
    model.save_pretrained(tmp_path)
    loaded = Critic.from_pretrained(tmp_path, torch.float32)
    assert not loaded.training
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded(batch), model(batch))


def test_a_language_model_is_no_critic(language_model: Callable[[int], LlamaForCausalLM], tmp_path: Path) -> None:
    language_model(0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"score\.weight"):
        Critic.from_pretrained(tmp_path, torch.float32)
    with pytest.raises(UserError, match="head called 'score'"):
        Critic(language_model(0))


def test_two_labels_are_refused(critic: MakeCritic) -> None:
    config = critic(0).model.config
    config.num_labels = 2
    with pytest.raises(UserError, match="one label"):
        Critic(LlamaForSequenceClassification(config))
