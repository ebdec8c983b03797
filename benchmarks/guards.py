"""What the guards on numbers cost: `python -m benchmarks.guards`. One PPO update of the quickstart's size, on one thread; no Ray.

CPU time of the process, so that others on the machine do not count; medians over updates.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from cluster.load_config import load_config
from policy.critic import Critic
from policy.guards import check_collapse, check_sampler, check_views
from policy.ppo import PPO
from tokens.guards import GuardsConfig
from tokens.ranks import weights_norm
from tokens.records import Prompt, Rollout

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
RESULTS = Path(__file__).resolve().with_name("results") / "guards.jsonl"
REPEATS, PROMPT = 15, 12


def learner() -> PPO:
    """PPO as the quickstart has it, on random weights of its shape."""
    config = load_config(QUICKSTART, [])
    shape = config.sft.shape
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, max_position_embeddings=shape.context_length,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
    llama.num_labels = 1
    models = LlamaForCausalLM(llama), Critic(LlamaForSequenceClassification(llama)), LlamaForCausalLM(llama)
    settings = config.policy.model_copy(update={"lr": 1e-6, "critic_lr": 1e-6})  # every update is like the first
    ppo = PPO(*models, settings, config.rollout.temperature, 0, 0, guards=GuardsConfig())
    ppo.begin_round(0, torch.randn(256))
    return ppo


def batch(ppo: PPO) -> tuple[list[Rollout], torch.Tensor]:
    """As many rollouts as a step has, of random tokens and about the quickstart's lengths."""
    generator = torch.Generator().manual_seed(1)
    number, longest = (
        ppo.config.prompts_per_step * ppo.config.samples_per_prompt,
        load_config(QUICKSTART, []).rollout.max_new_tokens,
    )
    rollouts = []
    for i in range(number):
        length = int(torch.randint(longest // 2, longest + 1, (), generator=generator))
        ids = torch.randint(2, 500, (PROMPT + length,), generator=generator).tolist()
        rollouts.append(Rollout(Prompt(f"p{i}", "", tuple(ids[:PROMPT])), 0, tuple(ids[PROMPT:]), "", (-6.0,) * length, 0, True))
    return rollouts, torch.randn(number, generator=generator)


def seconds(work: Callable[[], object]) -> float:
    """Median CPU seconds of some work."""
    found = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def measure() -> list[dict[str, Any]]:
    """A row for the update, and one for each guard, as a share of it."""
    ppo = learner()
    rollouts, scores = batch(ppo)
    data = ppo._experience(rollouts, scores, ppo.moments, 0.95, "")
    weights = [*ppo.policy.parameters(), *ppo.critic.parameters()]
    update = seconds(lambda: ppo.update(rollouts, scores, sampler_bound=1e9))

    def before() -> None:
        check_collapse(rollouts, scores, ppo.moments, 4.0, "")
        check_views(data.old, "")
        check_sampler(rollouts, ppo._gaps(rollouts, data), 1e9, "")

    named: dict[str, Callable[[], object]] = {
        "before the update: rollouts, scores, views": before,
        "weights are finite, and how far the update went": lambda: ppo._moved(data, ""),
        "of that, the norm of the weights": lambda: weights_norm(weights),
    }
    rows: list[dict[str, Any]] = [{"what": "update, with its guards", "cpu_seconds": update, "share": 1.0}]
    for what, work in named.items():
        took = seconds(work)
        rows.append({"what": what, "cpu_seconds": took, "share": took / update})
    return rows


def main() -> None:
    """Measure, print, write down."""
    torch.set_num_threads(1)
    rows = measure()
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(f"{row['what']:50} {1e3 * row['cpu_seconds']:8.2f} ms  {row['share']:7.2%}")


if __name__ == "__main__":
    main()
