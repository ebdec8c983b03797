"""A rollout engine in a process of its own, as a run starts it, and what it says beside transformers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import PreTrainedModel

from actors.config import RolloutConfig
from actors.process import ProcessSetup, engine_environment
from actors.rollout import RolloutEngine
from policy.sft import make_model
from sandbox.tokenizer import make_tokenizer
from tokens.logprobs import response_logprobs
from tokens.records import Prompt, Rollout, SequenceBatch
from tokens.shape import ModelShape


@dataclass(frozen=True)
class Saved:
    """A model of random weights and where it lies.

    Args:
        model: float32, on the CPU.
        folder: its Hugging Face directory, tokenizer included; engines log there too.
    """

    model: PreTrainedModel
    folder: Path


@contextlib.contextmanager
def saved_model(shape: ModelShape, num_words: int) -> Iterator[Saved]:
    """Make one, and save it for as long as the context lasts."""
    tokenizer = make_tokenizer([f"w{i}" for i in range(num_words)])
    model = make_model(tokenizer, shape, seed=0).eval()
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        model.save_pretrained(name)
        yield Saved(model, Path(name))


@contextlib.contextmanager
def local_ray(num_cpus: int = 2) -> Iterator[None]:
    """A Ray of this machine's own, for as long as the context lasts."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=num_cpus)
    try:
        yield
    finally:
        ray.shutdown()


def start_engine(saved: Saved, config: RolloutConfig, context_length: int, threads: int) -> Any:
    """An engine in a process of its own, ready."""
    setup = ProcessSetup("rollout-0", saved.folder / "log", threads, "cpu", "float32", 0, 1, False)
    environment = {"env_vars": engine_environment(setup, False)}
    actor: Any = RolloutEngine
    engine = actor.options(num_cpus=1, runtime_env=environment).remote(setup, saved.folder, config, context_length)
    ray.get(engine.identity.remote())
    return engine


def gap(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> float:
    """Largest difference of a sampled token's log-prob between the engine (temperature 1) that drew it and transformers, nats."""
    batch = SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    with torch.no_grad():
        ours = response_logprobs(model, batch)[batch.response_mask]
    return float((ours - torch.tensor([x for r in rollouts for x in r.sampler_logprobs])).abs().max())


def prompts(number: int, length: int, num_words: int) -> list[Prompt]:
    """BOS and some words; no two prompts are alike."""
    return [Prompt(f"p{i}", "", (1, *(4 + (i * 7 + j) % num_words for j in range(length - 1)))) for i in range(number)]
