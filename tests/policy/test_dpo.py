"""DPO by TRL on our ids: it learns to prefer what was chosen, and what it saves loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from policy.config import DPOConfig
from policy.dpo import fit_dpo
from policy.sft import make_model, train_tokenizer
from tokens.logprobs import response_logprobs
from tokens.records import Pair, SequenceBatch
from tokens.shape import ModelShape

GOOD, BAD = ("the cat sat down .", "a dog ran home ."), ("no no no no no no .", "it is it is it is .")
SHAPE = ModelShape(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=1, context_length=64)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = train_tokenizer([*GOOD, *BAD], 300, folder)
    make_model(tokenizer, SHAPE, 0).save_pretrained(folder)
    return folder, tokenizer


def _pairs(tokenizer: PreTrainedTokenizerFast, number: int) -> list[Pair]:
    def ids(text: str) -> tuple[int, ...]:
        return (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)

    prompt = (tokenizer.bos_token_id, *tokenizer("say :", add_special_tokens=False).input_ids)
    return [Pair(str(i), prompt, ids(GOOD[i % 2]), ids(BAD[i // 2 % 2])) for i in range(number)]


def _logprobs(folder: Path, pairs: list[Pair], side: str) -> torch.Tensor:
    """[N] summed log-probability of the chosen or rejected responses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    responses = [pair.chosen_ids if side == "chosen" else pair.rejected_ids for pair in pairs]
    with torch.no_grad():
        return response_logprobs(model, SequenceBatch.from_ids([p.prompt_ids for p in pairs], responses, 0)).sum(-1)


def test_chosen_comes_to_be_preferred_and_the_directory_loads(sft: tuple[Path, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    folder, tokenizer = sft
    pairs, seen = _pairs(tokenizer, 16), []
    config = DPOConfig(beta=0.1, lr=3e-3, epochs=5, batch_size=8, microbatch_size=4)
    rows = fit_dpo(
        folder, pairs, tokenizer, tmp_path, config, 0, False, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(step, 10) for step in range(1, 11)]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    lead = [(_logprobs(where, pairs, "chosen") - _logprobs(where, pairs, "rejected")) for where in (folder, tmp_path)]
    assert bool((lead[1] > lead[0] + 1).all()), "every pair's lead grew by more than a nat"
    # The first loss is logged before the policy has moved: pi = pi_sft, so it is log 2 whatever the pairs are.
    assert rows[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-3) and rows[0]["dpo/margin"] == pytest.approx(0, abs=1e-3)
    assert rows[-1]["dpo/accuracy"] == 1 and rows[-1]["dpo/loss"] < 0.6


def test_the_logged_margin_is_beta_times_the_log_ratios(sft: tuple[Path, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    """The wiring: ids, masks and reference are what the formula means by x, y and pi_sft."""
    folder, tokenizer = sft
    pairs = _pairs(tokenizer, 4)
    # What the second of two steps logs is of the weights that the first made, and one step alone makes the same.
    config = DPOConfig(beta=0.5, lr=1e-3, epochs=1, batch_size=4)
    fit_dpo(folder, pairs, tokenizer, tmp_path / "one", config, 0, False)
    two = fit_dpo(folder, pairs, tokenizer, tmp_path / "two", config.model_copy(update={"epochs": 2.0}), 0, False)

    def ratio(side: str) -> torch.Tensor:
        return _logprobs(tmp_path / "one", pairs, side) - _logprobs(folder, pairs, side)

    assert two[1]["dpo/margin"] == pytest.approx(float(0.5 * (ratio("chosen") - ratio("rejected")).mean()), rel=1e-3)


def test_no_pairs_are_refused(sft: tuple[Path, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0"):
        fit_dpo(sft[0], [], sft[1], tmp_path, DPOConfig(), 0, False)
