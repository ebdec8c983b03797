"""Supervised fine-tuning learns, saves a clean directory, and refuses bad input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from policy.config import SFTConfig
from policy.held_out import held_out_loss
from policy.sft import Example, fit_language_model, make_model, train_tokenizer
from tokens.errors import UserError
from tokens.shape import ModelShape

TEXTS = ["the cat sat on the mat .", "a dog ran to the park .", "the bird sang a song ."] * 20
SHAPE = ModelShape(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=1, context_length=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer"))


def _examples(tokenizer: PreTrainedTokenizerFast, number: int = 60) -> list[Example]:
    prompt = [tokenizer.bos_token_id, *tokenizer("say :", add_special_tokens=False).input_ids]
    return [(prompt, [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]) for text in TEXTS[:number]]


def _mean_loss(directory: Path | str, examples: list[Example]) -> float:
    """Mean negative log-likelihood per response token, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total, count = 0.0, 0
    for prompt, response in examples:
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(prompt) + t - 1, token]) for t, token in enumerate(response))
        count += len(response)
    return total / count


def test_loss_falls_and_the_directory_is_clean(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples, seen = _examples(tokenizer), []
    config = SFTConfig(shape=SHAPE, lr=1e-2, batch_size=6, epochs=3.0)
    result = fit_language_model(examples, tokenizer, tmp_path, config, 0, lambda done, total: seen.append((done, total)))
    assert seen == [(step, 30) for step in range(1, 31)]
    assert result["steps"] == 30 and result["loss"] < 0.5 * result["first_loss"]
    assert result["tokens"] == 3 * sum(len(prompt) + len(response) for prompt, response in examples)
    assert _mean_loss(tmp_path, examples[:3]) < 1.0
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    for holder in (model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (
            tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
        )  # fmt: skip
    assert model.generation_config.temperature in (None, 1.0) and not model.generation_config.do_sample


def test_a_given_model_is_continued_on_the_responses_only(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make_model(tokenizer, SHAPE, 0).save_pretrained(tmp_path / "start")
    examples = _examples(tokenizer, 12)
    before = _mean_loss(tmp_path / "start", examples)
    config = SFTConfig(model=str(tmp_path / "start"), lr=1e-2, batch_size=6)
    result = fit_language_model(examples, tokenizer, tmp_path / "end", config, 0)
    assert _mean_loss(tmp_path / "end", examples) < before
    # The first loss is taken before any update: it equals the mean over response tokens of the starting weights.
    batch = fit_language_model(examples[:6], tokenizer, tmp_path / "one", config, 0)
    assert batch["first_loss"] == pytest.approx(_mean_loss(tmp_path / "start", examples[:6]), rel=1e-3)
    assert result["steps"] == 2


def test_held_out_texts_are_measured_before_and_after_and_change_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model(tokenizer, SHAPE, 0).save_pretrained(tmp_path / "start")
    examples, held_out, curve = _examples(tokenizer, 12), _examples(tokenizer, 3), []
    config = SFTConfig(model=str(tmp_path / "start"), lr=1e-2, batch_size=6)
    plain = fit_language_model(examples, tokenizer, tmp_path / "plain", config, 0)
    fit = fit_language_model(
        examples, tokenizer, tmp_path / "end", config, 0, held_out=held_out, on_loss=lambda step, loss: curve.append((step, loss))
    )
    assert fit["held_out_before"] == pytest.approx(_mean_loss(tmp_path / "start", held_out), rel=1e-5)
    assert fit["held_out_after"] == pytest.approx(_mean_loss(tmp_path / "end", held_out), rel=1e-5)
    assert curve == [(1, plain["first_loss"]), (2, plain["loss"])]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "end")]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    with pytest.raises(UserError, match="got 60"):
        fit_language_model(examples, tokenizer, tmp_path / "long", config, 0, held_out=[([1] * 60, [2] * 5)])


def test_held_out_loss_does_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model, examples = make_model(tokenizer, SHAPE, 0), [*_examples(tokenizer, 3), ([1, 5], [6, 2])]
    losses = [held_out_loss(model, examples, 0, size) for size in (1, 3, 4)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6) and model.training
    with pytest.raises(ValueError, match="got 0"):
        held_out_loss(model, [], 0, 1)


def test_microbatches_change_memory_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = SFTConfig(shape=SHAPE, lr=1e-3, batch_size=6)
    whole = fit_language_model(_examples(tokenizer, 12), tokenizer, tmp_path / "whole", config, 0)
    parts = fit_language_model(
        _examples(tokenizer, 12), tokenizer, tmp_path / "parts", config.model_copy(update={"microbatch_size": 2}), 0
    )
    assert parts["steps"] == whole["steps"] and parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_equal_seeds_train_equal_models(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = SFTConfig(shape=SHAPE, lr=1e-2, batch_size=6)
    losses = [
        fit_language_model(_examples(tokenizer, 12), tokenizer, tmp_path / str(i), config, seed)["loss"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_byte_level_tokenizer_keeps_any_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "the cat sat on the mat .",
        "  two  blanks\n\ttab , and stop .",
        "naïve 日本 🙂 don't",
        "Human: hi\n\nAssistant:",
    ):
        ids = loaded(text, add_special_tokens=False).input_ids
        assert loaded(text).input_ids == ids and loaded.unk_token_id not in ids
        assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == text
    assert len(loaded) <= 300 and len({loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id}) == 3
    assert len(loaded("the cat sat on the mat .").input_ids) < len("the cat sat on the mat .")


def test_bad_input_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = SFTConfig(shape=SHAPE)
    with pytest.raises(UserError, match="0 examples"):
        fit_language_model([], tokenizer, tmp_path, config, 0)
    with pytest.raises(UserError, match="example 1: got 60 \\+ 5 tokens"):
        fit_language_model([([1], [2]), ([1] * 60, [2] * 5)], tokenizer, tmp_path, config, 0)
    with pytest.raises(UserError, match="at least 260"):
        train_tokenizer(TEXTS, 100, tmp_path)
    same = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path))
    same.pad_token = same.eos_token
    with pytest.raises(UserError, match="pad and an eos token that differ"):
        fit_language_model(_examples(tokenizer, 2), same, tmp_path, config, 0)


def _saved(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory
