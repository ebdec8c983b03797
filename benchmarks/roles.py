"""Rollouts and weight sync, against what a user would otherwise pick: interleaved pairs, order reversed, medians of ratios.

    python -m benchmarks.roles

1. k responses to each prompt: our engine through Ray, against transformers' ``generate`` in one batch. Same weights, prompts
   and temperature; useful tokens per second.
2. New weights: ``load`` into a running engine, against starting an engine with them (``benchmarks.sync`` times the whole way).

The equality of the outputs is printed beside the speed: the engine's log-probs against transformers' on the engine's samples.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from actors.config import RolloutConfig
from actors.process import ProcessSetup, engine_environment
from actors.rollout import RolloutEngine
from actors.transfer import STORED, lay_out
from cluster.run_directory import versions
from policy.sft import make_model
from sandbox.tokenizer import make_tokenizer
from tokens.logprobs import response_logprobs
from tokens.records import Prompt, Rollout, SequenceBatch
from tokens.shape import ModelShape

SHAPE = ModelShape(hidden_size=192, intermediate_size=640, num_layers=2, num_heads=6, context_length=128)
NUM_PROMPTS, SAMPLES, MAX_TOKENS, REPETITIONS = 64, 4, 64, 7
RESULTS = Path(__file__).parent / "results" / "roles.jsonl"


def start_engine(directory: Path) -> Any:
    """An engine in a process of its own, ready."""
    setup = ProcessSetup("rollout-0", directory / "log", 2, "cpu", "float32", 0, 1, False)
    config = RolloutConfig(temperature=1.0, max_new_tokens=MAX_TOKENS)
    environment = {"env_vars": engine_environment(setup, False)}
    actor: Any = RolloutEngine
    engine = actor.options(num_cpus=1, runtime_env=environment).remote(setup, directory, config, SHAPE.context_length)
    ray.get(engine.identity.remote())
    return engine


def generate(model: Any, prompts: list[Prompt]) -> int:
    """The same request to transformers, in one batch; how many tokens it gave, up to each EOS."""
    ids = torch.tensor([p.token_ids for p in prompts for _ in range(SAMPLES)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=MAX_TOKENS,
        )[:, ids.shape[1] :]
    eos = torch.eq(out, model.config.eos_token_id)
    ended = eos.int().cumsum(1)
    return int(((ended == 0) | ((ended == 1) & eos)).sum())


def timed(call: Any) -> tuple[float, Any]:
    """Seconds and answer."""
    began = time.perf_counter()
    answer = call()
    return time.perf_counter() - began, answer


def gap(model: Any, rollouts: list[Rollout]) -> float:
    """Largest difference of one token's log-prob, nats."""
    batch = SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    with torch.no_grad():
        ours = response_logprobs(model, batch)[batch.response_mask]
    return float((ours - torch.tensor([x for r in rollouts for x in r.sampler_logprobs])).abs().max())


def report(name: str, what: str, ours: list[float], theirs: list[float], unit: str, extra: dict[str, float]) -> None:
    """Print a line and append it to the results."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    print(f"{name}: {what}: ours {statistics.median(ours):.4g} {unit}, alternative {statistics.median(theirs):.4g} {unit}, "
          f"ratio {middle:.3g} ({min(ratios):.3g} to {max(ratios):.3g}), {extra}")  # fmt: skip
    row = {"id": name, "what": what, "ours": statistics.median(ours), "alternative": statistics.median(theirs), "unit": unit,
           "ratio": middle, "ratio_min": min(ratios), "ratio_max": max(ratios), **extra, "versions": versions()}  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Measure both."""
    torch.set_num_threads(2)
    tokenizer = make_tokenizer([f"w{i}" for i in range(240)])
    model = make_model(tokenizer, SHAPE, seed=0).eval()
    prompts = [Prompt(f"p{i}", "", (1, *(4 + (i * 7 + j) % 240 for j in range(10)))) for i in range(NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
        engine = start_engine(directory)
        weights = lay_out(model.named_parameters(), STORED.chunk_bytes)
        ray.get(engine.load.remote(weights, 0))
        speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
        rollouts: list[Rollout] = []
        for repetition in range(REPETITIONS + 1):  # the first is a warm-up
            for side in ("ours", "theirs") if repetition % 2 else ("theirs", "ours"):
                if side == "ours":
                    seconds, rollouts = timed(lambda: ray.get(engine.sample.remote(prompts, SAMPLES, repetition, 0)))  # noqa: B023
                    tokens = sum(len(r.response_ids) for r in rollouts)
                else:
                    seconds, tokens = timed(lambda: generate(model, prompts))
                if repetition:
                    speeds[side].append(tokens / seconds)
        report("rollouts", f"{NUM_PROMPTS} x {SAMPLES} samples", speeds["ours"], speeds["theirs"], "tokens/s",
               {"logprob_gap": gap(model, rollouts)})  # fmt: skip
        loads = [timed(lambda: ray.get(engine.load.remote(weights, 1)))[0] for _ in range(REPETITIONS)]
        starts = []
        for _ in range(3):
            seconds, other = timed(lambda: start_engine(directory))
            starts.append(seconds)
            ray.kill(other)
        report(
            "weights",
            "load against restart",
            loads[: len(starts)],
            starts,
            "s",
            {"parameters": sum(p.numel() for p in model.parameters())},
        )
        ray.shutdown()


if __name__ == "__main__":
    main()
