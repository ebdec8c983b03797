"""Whether a PPO update holds as much memory as `plan` says: measured on the CPU, where it can be watched from outside.

    python -m benchmarks.plan_memory

Each case in a process of its own: two updates (the second has the optimizers' moments from the start) of a policy and a critic
made from scratch, on responses of full length. By how much the process's resident memory grows at most above what it held before
there was a model (Python, torch, transformers, one update of a very small model), sampled every 2 ms, against the sum of the
parts that `cluster.memory.learner_parts` gives. glibc is told to hand freed tensors back at once (MALLOC_MMAP_THRESHOLD_), so
that what is seen is tensors that live, and not holes between them. Prints the rows and appends them to
benchmarks/results/plan_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.config import ResourcesConfig, RolloutConfig, Share
from benchmarks.strength_memory import Growth
from cluster.config import RunConfig
from cluster.memory import learner_parts
from cluster.model_sizes import model_size, reward_size
from cluster.versions import versions
from policy.config import PolicyConfig, SFTConfig
from preferences.config import DataConfig
from tokens.shape import ModelShape

RESULTS = Path(__file__).parent / "results" / "plan_memory.jsonl"
MIB = 1 << 20
CASES: dict[str, dict[str, Any]] = {
    # hidden, MLP width, layers, vocabulary; rollouts of a microbatch, tokens of each; recomputation
    "weights": {"sizes": (512, 1376, 6, 2048), "microbatch": 2, "length": 32, "recompute": False},
    "activations": {"sizes": (256, 688, 8, 512), "microbatch": 8, "length": 128, "recompute": False},
    "recomputed": {"sizes": (256, 688, 8, 512), "microbatch": 8, "length": 128, "recompute": True},
    "logits": {"sizes": (64, 192, 1, 8192), "microbatch": 8, "length": 128, "recompute": False},
}


def recipe(sizes: tuple[int, int, int, int], microbatch: int, length: int, recompute: bool) -> RunConfig:
    """A config of that size: a minibatch is two microbatches, a step two minibatches.

    Args:
        sizes: hidden size, MLP width, layers, vocabulary.
        microbatch: rollouts.
        length: tokens of prompt and response, half each.
        recompute: whether layers keep their inputs only.
    """
    hidden, inner, layers, vocabulary = sizes
    shape = ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=hidden // 64,
        context_length=length,
    )
    return RunConfig(
        name="plan-memory",
        data=DataConfig(preferences="none.jsonl", max_prompt_tokens=length // 2, max_response_tokens=length // 2),
        sft=SFTConfig(shape=shape),
        rollout=RolloutConfig(max_new_tokens=length // 2),
        policy=PolicyConfig(prompts_per_step=4 * microbatch, minibatch_size=2 * microbatch, microbatch_size=microbatch),
        resources=ResourcesConfig(learner=Share(recompute_activations=recompute)),
    )


def update_twice(config: RunConfig) -> None:
    """Two updates on made-up rollouts of full length."""
    import torch
    from transformers import LlamaForSequenceClassification

    from policy.critic import Critic
    from policy.ppo import PPO
    from policy.sft import make_model
    from sandbox.tokenizer import make_tokenizer
    from tokens.recompute import recompute_layers
    from tokens.records import Prompt, Rollout

    shape = config.sft.shape
    tokenizer = make_tokenizer([f"w{i}" for i in range(shape.vocab_size - 4)])
    policy, reference = (make_model(tokenizer, shape, seed=0).eval() for _ in range(2))
    settings = policy.config.__class__(**{**policy.config.to_dict(), "num_labels": 1})
    critic = Critic(LlamaForSequenceClassification(settings).eval())
    if config.resources.learner.recompute_activations:
        recompute_layers(policy)
        recompute_layers(critic)
    half, number = config.rollout.max_new_tokens, config.policy.prompts_per_step
    ids = torch.randint(4, shape.vocab_size, (number, 2 * half), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = [
        Rollout(Prompt(str(i), "", tuple(row[:half])), 0, tuple(row[half:]), "", (-1.0,) * half, 0, True)
        for i, row in enumerate(ids)
    ]
    ppo = PPO(policy, critic, reference, config.policy, 1.0, 0, 0)
    for _ in range(2):
        ppo.update(rollouts, torch.linspace(-1, 1, number))


def measure(case: str) -> dict[str, Any]:
    """One case, in this process.

    Args:
        case: of ``CASES``.
    """
    update_twice(recipe((64, 96, 1, 64), 1, 8, False))  # what is loaded once
    config = recipe(**CASES[case])
    size = model_size(config)
    parts = learner_parts(config, size, reward_size(config, size))
    began = time.perf_counter()
    with Growth() as growth:
        update_twice(config)
    planned = sum(part.bytes for part in parts)
    return {
        "id": "plan_memory",
        "what": case,
        "parameters": size.parameters,
        "measured_mib": round(growth.most / MIB, 1),
        "planned_mib": round(planned / MIB, 1),
        "planned_over_measured": round(planned / growth.most, 3),
        "parts_mib": {part.name: round(part.bytes / MIB, 1) for part in parts},
        "seconds": round(time.perf_counter() - began, 2),
    }


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure the cases, each in a process of its own, print and append the rows.

    Args:
        arguments: of the command line; None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The rows; none for the process of one case, which prints its own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--here", choices=list(CASES), help="measure this one in this process, and print its row")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure(options.here)))
        return []
    rows = []
    for case in options.cases:
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--here", case]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row | {"versions": versions()})
        print(", ".join(f"{key} {value}" for key, value in row.items() if key != "id"), flush=True)
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


if __name__ == "__main__":
    main()
