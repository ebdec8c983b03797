"""What is saved here is a reward model elsewhere, with equal scores: Hugging Face, TRL, vLLM. And what TRL trains is one here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from actors.process import ProcessSetup, engine_environment
from rm.config import LoraConfig
from rm.lora import add_lora
from rm.model import RewardModel
from sandbox.tokenizer import make_tokenizer
from tokens.records import SequenceBatch

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27, EOS)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)


def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer([f"w{i}" for i in range(46)])


@torch.no_grad()
def ours(model: RewardModel) -> Tensor:
    return model(BATCH)


@torch.no_grad()
def theirs(model: Any, batch: SequenceBatch = BATCH) -> Tensor:
    logits = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert logits.shape == (len(batch), 1)
    return logits[:, 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "opt", "bert", "distilbert", "roberta", "modernbert"])
def test_hugging_face_scores_the_same(start: Start, tmp_path: Path, name: str) -> None:
    model = start(name)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(loaded), ours(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["eos", "mean", "max"])
def test_other_poolings_do_not_carry_over_and_are_in_the_config(start: Start, tmp_path: Path, pooling: str) -> None:
    model = start("llama", pooling)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.rondo_pooling == pooling
    last = RewardModel(loaded, "last")
    torch.testing.assert_close(theirs(loaded), ours(last), rtol=0, atol=1e-5)
    if pooling != "eos":  # each response here ends at its first EOS, which is its last token
        assert not torch.allclose(ours(last), ours(model), atol=1e-3)


PAIRS = {
    "prompt": ["w1 w2", "w3", "w4 w5 w6", "w7"] * 2,
    "chosen": [" w20 w21", " w22 w23 w24", " w25", " w26 w27"] * 2,
    "rejected": [" w30", " w31 w32", " w33 w34", " w35 w36 w37"] * 2,
}


def trainer(model: str, out: Path) -> Any:
    from trl import RewardConfig, RewardTrainer

    settings = RewardConfig(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=False,
        model_init_kwargs={"dtype": torch.float32}, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_dict(PAIRS)
    return RewardTrainer(model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


@pytest.fixture(scope="module")
def trl_model(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[[str], Path]) -> tuple[Path, Tensor]:
    """A reward model that TRL trained for two steps from a language model, and TRL's scores of the batch."""
    folder = tmp_path_factory.mktemp("trl")
    made = trainer(str(backbone("llama")), folder / "work")
    made.train()
    made.save_model(str(folder / "model"))
    return folder / "model", theirs(made.model)


def test_a_model_that_trl_trained_is_a_start(trl_model: tuple[Path, Tensor]) -> None:
    path, scores = trl_model
    model = RewardModel.from_any(path, pooling="last", seed=0, dtype=torch.float32)
    torch.testing.assert_close(ours(model), scores, rtol=0, atol=1e-5)
    assert len(set(scores.tolist())) == 3


def test_trl_goes_on_from_our_export(start: Start, tmp_path: Path) -> None:
    model = start("llama")
    add_lora(model, LoraConfig(rank=2))
    model.save_pretrained(tmp_path / "model")
    made = trainer(str(tmp_path / "model"), tmp_path / "work")
    torch.testing.assert_close(theirs(made.model), ours(model), rtol=0, atol=1e-5)
    row = made.train_dataset[0]
    own = [tokenizer()(PAIRS["prompt"][0] + PAIRS[side][0])["input_ids"] + [EOS] for side in ("chosen", "rejected")]
    assert [row["chosen_ids"], row["rejected_ids"]] == own
    accuracy = made.evaluate()["eval_accuracy"]
    halves = [
        model(SequenceBatch.from_ids([(i[0],) for i in ids], [i[1:] for i in ids], PAD)).detach()
        for ids in ([row[f"{side}_ids"] for row in made.train_dataset] for side in ("chosen", "rejected"))
    ]
    assert accuracy == pytest.approx(float((halves[0] > halves[1]).float().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vllms_pooling_runner_scores_the_same(tmp_path: Path, pooling: str) -> None:
    shape = LlamaConfig(  # vLLM's attention on the CPU wants heads of at least 32
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "start")
    model = RewardModel.from_any(tmp_path / "start", pooling=pooling, seed=3, dtype=torch.float32)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    files = [tmp_path / name for name in ("sequences.json", "scores.json")]
    files[0].write_text(json.dumps([[*prompt, *response] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]))
    setup = ProcessSetup("scorer", tmp_path / "log", 1, "cpu", "float32", 0, 1, False)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("score_with_vllm.py")), str(tmp_path / "model"), *map(str, files)],
        env=os.environ | engine_environment(setup, False), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    scores = torch.tensor(json.loads(files[1].read_text()))
    torch.testing.assert_close(scores, ours(RewardModel(model.model, "last")), rtol=0, atol=1e-5)
