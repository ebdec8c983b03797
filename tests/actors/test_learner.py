"""The learner's process without Ray: with adapters, a resumed learner goes on as one that never stopped, to the bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import actors.learner
from actors.learner import PolicyLearner
from actors.process import ProcessSetup
from actors.transfer import STORED
from policy.config import PolicyConfig
from tokens.config import AdapterConfig
from tokens.records import Prompt, Rollout


def rollouts(seed: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(12):
        ids = torch.randint(2, 24, (3 + i % 5,), generator=generator).tolist()
        made.append(Rollout(Prompt(f"p{i}", "", tuple(ids[:2])), 0, (*ids[2:], 1), "", (-3.0,) * (len(ids) - 1), 0, True))
    return made


def scores(batch: list[Rollout]) -> list[float]:
    return [float(sum(r.response_ids) % 5) for r in batch]


@pytest.fixture
def own_log() -> Iterator[None]:
    """A process opens its log file in the root logger; here it must not stay there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.usefixtures("own_log")
@pytest.mark.parametrize("critic", ["reward", "previous"])
@pytest.mark.parametrize("start", ["sft", "previous"])
def test_a_resumed_learner_with_adapters_goes_on_to_the_bit(
    critic: Literal["reward", "previous"],
    start: Literal["sft", "previous"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actors.learner, "make_sender", lambda *arguments: None)
    sft, first, rewards = tmp_path / "sft", tmp_path / "rounds" / "round_000", [tmp_path / "draft" / "reward"]
    shape = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(sft)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>").save_pretrained(sft)
    LlamaForSequenceClassification(shape).save_pretrained(rewards[0])
    config = PolicyConfig(
        prompts_per_step=4, samples_per_prompt=3, minibatch_size=6, microbatch_size=3, microbatch_tokens=30, packing=True,
        lr=1e-2, critic_lr=1e-2, critic_start=critic, start=start, lora=AdapterConfig(rank=2),
    )  # fmt: skip
    setup = ProcessSetup("learner-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    process = PolicyLearner.__ray_metadata__.modified_class

    def learner(resume: Path | None) -> Any:
        made = process(setup, config, 0.8, sft, 3, STORED)
        made.load([], resume, first / "reward")
        return made

    def second_round(made: Any) -> Any:
        reward = first / "reward" if critic == "reward" else None
        made.begin_round(1, scores(rollouts(1)), reward, sft if start == "sft" else None, None)
        return made.update(rollouts(1), scores(rollouts(1)), None, 1), made.statistics(rollouts(2))

    one = learner(None)
    one.begin_round(0, scores(rollouts(0)), rewards[0], None, None)
    one.update(rollouts(0), scores(rollouts(0)), None, 0)
    one.save(tmp_path / "draft")
    shutil.move(tmp_path / "draft", first)  # as a round is committed
    assert second_round(one) == second_round(learner(first))
