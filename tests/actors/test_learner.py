"""The learner's process without Ray: a resumed learner goes on as one that never stopped, to the bit; every piece is needed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import actors.learner
from actors.learner import PolicyLearner
from actors.process import ProcessSetup
from actors.transfer import STORED
from policy.config import KLConfig, PolicyConfig
from tokens.config import AdapterConfig
from tokens.records import Prompt, Rollout

SHAPE = LlamaConfig(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
    initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip


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
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(sft)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>").save_pretrained(sft)
    LlamaForSequenceClassification(SHAPE).save_pretrained(rewards[0])
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


PPO_ONLY = PolicyConfig(
    prompts_per_step=4, samples_per_prompt=3, minibatch_size=6, microbatch_size=3, lr=1e-2, critic_lr=1e-2,
    kl=KLConfig(controller="adaptive", target=1.0, horizon=24), ptx_coef=0.5, ptx_batch_size=2, reference="previous",
)  # fmt: skip
TEXTS = [((2, 3), (4 + i, 1)) for i in range(8)]


@dataclass(frozen=True)
class Stopped:
    """A learner that was saved after two updates of round 1, and what two more of them came to.

    Args:
        saved: the save.
        reference: of the KL.
        make: another learner, as a new process has it.
        undisturbed: metrics and weights of the next two updates.
    """

    saved: Path
    reference: Path
    make: Callable[[], Any]
    undisturbed: Any


def two_more(made: Any) -> Any:
    """Metrics and weights of two updates."""
    metrics = [made.update(rollouts(seed), scores(rollouts(seed)), None, 2 + seed) for seed in (2, 3)]
    models = (made.ppo.policy, made.ppo.critic.model)
    return metrics, [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]


def same(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(a[name].equal(b[name]) for a, b in zip(one[1], other[1], strict=True) for name in a)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    folder = tmp_path_factory.mktemp("learner")
    sft, reference, reward = folder / "sft", folder / "round" / "policy", folder / "reward"
    for place, seed in ((sft, 0), (reference, 1)):
        torch.manual_seed(seed)
        LlamaForCausalLM(SHAPE).save_pretrained(place)
    LlamaForSequenceClassification(SHAPE).save_pretrained(reward)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>").save_pretrained(sft)
    process = PolicyLearner.__ray_metadata__.modified_class
    setup = ProcessSetup("learner-0", folder / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def make() -> Any:
        return process(setup, PPO_ONLY, 0.8, sft, 3, STORED, TEXTS)

    one = make()
    one.load([], None, reward)
    one.begin_round(1, scores(rollouts(9)), reward, None, reference)
    for seed in (0, 1):
        one.update(rollouts(seed), scores(rollouts(seed)), None, seed)
    one.save(folder / "saved")
    yield Stopped(folder / "saved", reference, make, two_more(one))
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def restored(made: Any, stopped: Stopped, saved: Path, reference: Path | None) -> Any:
    """The next two updates of a learner that was put where a save left one."""
    made.restore(saved, saved)
    made.begin_round(1, None, None, None, reference)
    return two_more(made)


def test_a_learner_is_put_back_in_a_new_process_and_in_a_living_one(stopped: Stopped) -> None:
    other = stopped.make()
    other.load([], stopped.saved, stopped.saved)
    assert same(stopped.undisturbed, restored(other, stopped, stopped.saved, stopped.reference))
    assert same(stopped.undisturbed, restored(other, stopped, stopped.saved, stopped.reference)), "it had gone two updates on"


def spoil_tensors(name: str) -> Callable[[Path], None]:
    """Moments of one kind as they are at the beginning."""

    def spoil(saved: Path) -> None:
        tensors = load_file(saved / "learner.safetensors")
        touched = {key: torch.zeros_like(x) for key, x in tensors.items() if fnmatch(key, name)}
        assert any(not tensors[key].equal(x) for key, x in touched.items())
        save_file(tensors | touched, saved / "learner.safetensors")

    return spoil


def spoil_value(section: str, key: str, value: float) -> Callable[[Path], None]:
    def spoil(saved: Path) -> None:
        values = json.loads((saved / "learner.json").read_text())
        assert values[section][key] != value
        values[section][key] = value
        (saved / "learner.json").write_text(json.dumps(values))

    return spoil


def spoil_weights(name: str) -> Callable[[Path], None]:
    def spoil(saved: Path) -> None:
        tensors = load_file(saved / name / "model.safetensors")
        save_file({key: x + 1e-4 for key, x in tensors.items()}, saved / name / "model.safetensors", {"format": "pt"})

    return spoil


PIECES: dict[str, Callable[[Path], None]] = {
    "policy": spoil_weights("policy"),
    "critic": spoil_weights("critic"),
    "policy's first moments": spoil_tensors("policy/*/exp_avg"),
    "policy's second moments": spoil_tensors("policy/*/exp_avg_sq"),
    "policy's step counts": spoil_tensors("policy/*/step"),
    "critic's first moments": spoil_tensors("critic/*/exp_avg"),
    "critic's second moments": spoil_tensors("critic/*/exp_avg_sq"),
    "critic's step counts": spoil_tensors("critic/*/step"),
    "KL controller": spoil_value("kl", "coef", 0.05),
    "number of rewards": spoil_value("moments", "count", 12),
    "mean of rewards": spoil_value("moments", "mean", 0.0),
    "spread of rewards": spoil_value("moments", "m2", 1.0),
    "update counter, which minibatches and texts follow from": spoil_value("counters", "num_updates", 0),
}


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_of_the_learners_state_is_needed(piece: str, stopped: Stopped, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(stopped.saved, saved)
    PIECES[piece](saved)
    assert not same(stopped.undisturbed, restored(loaded(stopped), stopped, saved, stopped.reference))


def test_the_reference_is_needed(stopped: Stopped) -> None:
    assert not same(stopped.undisturbed, restored(loaded(stopped), stopped, stopped.saved, None))


def loaded(stopped: Stopped) -> Any:
    made = stopped.make()
    made.load([], stopped.saved, stopped.saved)
    return made
