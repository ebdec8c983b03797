"""What runs would take on 8, 64 and 1,000 GPUs with policies of 7B, 70B and 405B: on paper, by the planner's own formulas.

    python -m benchmarks.scaling            # prints the tables
    python -m benchmarks.scaling --write    # into docs/scaling.md, between its marks

For every size and number of GPUs the GPUs are shared out between engines, learner, reward trainer and scorer so that a round is
shortest by `cluster.times` among the layouts whose models fit by `cluster.plan`. The only thing measured here is how many bytes a
rollout has on its way through the driver.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ray import cloudpickle

from benchmarks.markdown import markdown
from cluster import times
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.memory import BYTES, engine_cache
from cluster.model_sizes import ModelSize, model_size, reward_size
from cluster.placement import placed
from cluster.plan import GIB, Node, Plan, bundles, place
from cluster.times import Clock, Lengths, Phase, Speeds, Times
from tokens.records import Prompt, Rollout

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables of benchmarks.scaling -->", "<!-- end of tables -->"
GPU_GIB, NODE_GPUS, NODE_CPUS, NODE_GIB = 141, 8, 112, 2048
"""A node: eight H200s."""
GPUS = (8, 64, 1000)
PROMPTS = {8: 32, 64: 256, 1000: 4096}
"""Prompts of a PPO step, four responses each: as many a GPU in all three."""
SAMPLES, LENGTH, PAIRS, STEPS, MEMBERS = 4, 512, 160_000, 200, 4
"""Responses of a prompt, tokens of a prompt and of a response, pairs of D, PPO steps of a round, members of the ensemble."""
SHAPE_8B = (
    "{vocab_size: 128256, hidden_size: 4096, intermediate_size: 14336, num_layers: 32, num_heads: 32, num_kv_heads: 8, "
    "context_length: 8192}"
)


@dataclass(frozen=True)
class Policy:
    """A size of policy.

    Args:
        name: of it.
        shape: of the policy, as `sft.shape`.
        reward: of reward models and critic, as `reward.shape`; None = the policy's.
        parallel: GPUs of an engine.
    """

    name: str
    shape: str
    reward: str | None
    parallel: int


POLICIES = (
    Policy(
        "7B",
        "{vocab_size: 32000, hidden_size: 4096, intermediate_size: 11008, num_layers: 32, num_heads: 32, context_length: 2048}",
        None,
        1,
    ),
    Policy(
        "70B",
        "{vocab_size: 128256, hidden_size: 8192, intermediate_size: 28672, num_layers: 80, num_heads: 64, num_kv_heads: 8, "
        "context_length: 8192}",
        SHAPE_8B,
        4,
    ),
    Policy(
        "405B",
        "{vocab_size: 128256, hidden_size: 16384, intermediate_size: 53248, num_layers: 126, num_heads: 128, num_kv_heads: 8, "
        "context_length: 8192}",
        SHAPE_8B,
        8,
    ),
)


@dataclass(frozen=True)
class Layout:
    """GPUs shared out, and what that takes.

    Args:
        engines: of the rollout pool.
        learner: ranks.
        reward: ranks of the reward trainer.
        config: of the run.
        plan: where its processes land; what is short of the machine's memory stands in it.
        times: of its phases.
    """

    engines: int
    learner: int
    reward: int
    scorers: int
    config: RunConfig
    plan: Plan
    times: Times


def recipe(policy: Policy, gpus: int, engines: int, learner: int, reward: int, scorers: int) -> RunConfig:
    """The config of a layout: configs/hh_70b.yaml with these sizes.

    Args:
        policy: its size.
        gpus: of the cluster.
        engines: of the rollout pool.
        learner: ranks.
        reward: ranks of the reward trainer.
        scorers: processes of the scorer.
    """
    rollouts = PROMPTS[gpus] * SAMPLES
    keys = {
        "name": "scaling",
        "sft.shape": policy.shape,
        "reward.shape": policy.reward or policy.shape,
        "rollout.num_engines": engines,
        "rollout.tensor_parallel": policy.parallel,
        "rollout.max_new_tokens": LENGTH,
        "policy.steps_per_round": STEPS,
        "policy.prompts_per_step": PROMPTS[gpus],
        "policy.samples_per_prompt": SAMPLES,
        "policy.minibatch_size": rollouts,
        "policy.max_lag": 1,
        "scorer.num_members": MEMBERS,
        "reward.batch_size": 64,
        "meta.prompts_per_step": 16,
        "resources.rollout.num_cpus": 2 * policy.parallel,
        "resources.rollout.num_gpus": policy.parallel,
        "resources.learner.num_ranks": learner,
        "resources.learner.num_cpus": 4,
        "resources.reward.num_ranks": reward,
        "resources.scorer.num_ranks": scorers,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return load_config(ROOT / "configs" / "hh_70b.yaml", words)


def layouts(policy: Policy, gpus: int) -> Iterator[tuple[int, int, int, int]]:
    """Engines, learner's ranks, reward trainer's ranks and scorers that use the GPUs.

    Args:
        policy: its size.
        gpus: of the cluster.
    """
    for reward in (1, 2, 4, 8, 16):
        for learner, scorers in itertools.product((2**n for n in range(11)), repeat=2):
            engines = (gpus - scorers - reward - learner) // policy.parallel
            if engines > 0 and (PROMPTS[gpus] * SAMPLES) % learner == 0:
                yield min(engines, PROMPTS[gpus]), learner, reward, scorers


@cache
def best_layout(policy: Policy, gpus: int) -> Layout | None:
    """The layout with the shortest round among those whose models fit the GPUs; None where none does.

    Args:
        policy: its size.
        gpus: of the cluster.
    """
    nodes = (Node(NODE_CPUS, NODE_GPUS, NODE_GIB * GIB, GPU_GIB * GIB),) * (gpus // NODE_GPUS)
    found: list[Layout] = []
    for engines, learner, reward, scorers in layouts(policy, gpus):
        config = recipe(policy, gpus, engines, learner, reward, scorers)
        if (clock := clock_of(config, learner, reward)) is not None:
            found.append(Layout(engines, learner, reward, scorers, config, Plan((), (), (), ()), clock.times()))
    for layout in sorted(found, key=lambda each: each.times.per_round):
        asked = placed(layout.config, bundles(layout.config, model_size(layout.config))).bundles
        if place([replace(bundle, host=0) for bundle in asked], nodes).shortfalls:
            continue
        return replace(layout, plan=place(asked, nodes))
    return None


def clock_of(config: RunConfig, learner: int, reward: int) -> Clock | None:
    """What times the phases of a layout; None where an engine's cache does not hold one sequence.

    Args:
        config: of the run.
        learner: ranks.
        reward: ranks of the reward trainer.
    """
    size = model_size(config)
    cache = engine_cache(config, size, GPU_GIB * GIB)
    if cache.sequences < 1:
        return None
    speeds = Speeds(
        "an H200", times.TFLOPS, times.H200_TBS, times.LINK_GBS, times.NVLINK_GBS, times.TRAINING_MFU, times.SCORING_MFU
    )
    ranks = (("learner", learner), ("reward", reward))
    across = frozenset(role for role, number in ranks if number > NODE_GPUS)
    return Clock(config, size, reward_size(config, size), speeds, Lengths(LENGTH, LENGTH), PAIRS, cache, across)


def rollout_bytes() -> int:
    """Bytes of one rollout on its way through Ray, of full length: measured, as Ray pickles it."""
    prompt = Prompt("train-123456", "word " * LENGTH, tuple(range(1000, 1000 + LENGTH)))
    response = tuple(range(20_000, 20_000 + LENGTH))
    many = [
        Rollout(prompt, i, response, "word " * LENGTH, tuple(-0.001 * (i + j) for j in range(LENGTH)), 1, True)
        for i in range(SAMPLES)
    ]
    return len(cloudpickle.dumps(many, protocol=5)) // SAMPLES


def longest(phases: Sequence[Phase]) -> Phase:
    """The phase that takes longest."""
    return max(phases, key=lambda phase: phase.seconds)


def of_size(policy: Policy, clusters: Sequence[int] = GPUS) -> list[tuple[str, ...]]:
    """Rows of the table of times, one for each number of GPUs.

    Args:
        policy: its size.
        clusters: numbers of GPUs.
    """
    rows: list[tuple[str, ...]] = []
    for gpus in clusters:
        layout = best_layout(policy, gpus)
        if layout is None:
            rows.append((policy.name, f"{gpus:,}", *["does not fit"] + [""] * 8))
            continue
        step = {phase.name: phase for phase in layout.times.step}
        sampling, rest = layout.times.sampling, layout.times.synchronous - layout.times.sampling
        slow = longest([phase for phase in layout.times.step if phase.name.startswith("sample") is (sampling > rest)])
        fitted = next(phase for phase in layout.times.round if phase.name == "reward model")
        rows.append(
            (
                policy.name,
                f"{gpus:,}",
                f"{layout.engines:,} x {policy.parallel}, {layout.learner}, {layout.reward}, {layout.scorers}",
                _seconds(sampling),
                _seconds(step["score"].seconds),
                _seconds(step["policy: experience"].seconds + step["policy: update"].seconds),
                _seconds(step["sync"].seconds),
                _seconds(layout.times.overlapped),
                _seconds(fitted.seconds),
                f"{slow.name} ({slow.bound})",
                "yes" if not layout.plan.shortfalls else "no",
            )
        )
    return rows


def carried(policy: Policy) -> list[tuple[str, ...]]:
    """Rows of the table of what driver and object store carry.

    Args:
        policy: its size.
    """
    rows: list[tuple[str, ...]] = []
    each = rollout_bytes()
    for gpus in GPUS:
        layout = best_layout(policy, gpus)
        if layout is None:
            continue
        size: ModelSize = model_size(layout.config)
        rollouts = PROMPTS[gpus] * SAMPLES
        seconds = layout.times.overlapped
        weights = BYTES["bfloat16"] * size.parameters
        rows.append(
            (
                policy.name,
                f"{gpus:,}",
                f"{rollouts:,}",
                f"{rollouts * each / 1e6:,.0f} MB",
                f"{3 * rollouts * each / seconds / 1e6:,.1f} MB/s",
                f"{layout.engines + layout.learner + layout.reward + layout.scorers:,}",
                f"{weights / 1e9:,.0f} GB",
                f"{_reads(layout, policy) * weights / seconds / 1e9:,.1f} GB/s",
                f"{4 * size.parameters / GIB:,.0f} GiB",
            )
        )
    return rows


def _reads(layout: Layout, policy: Policy) -> int:
    """Nodes with engines: each reads the weights once."""
    return -(-layout.engines * policy.parallel // NODE_GPUS)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


TIMES = (
    "policy", "GPUs", "engines x GPUs, learner, reward, scorers", "sample", "score", "learn", "sync", "step, overlapped",
    "reward model a round", "bounds the step", "loads into 2 TiB",
)  # fmt: skip
CARRIED = (
    "policy", "GPUs", "rollouts a step", "bytes of them", "through driver and store", "processes", "weights",
    "read from the store", "a rank's load",
)  # fmt: skip


def tables() -> str:
    """Both tables, as Markdown."""
    return "\n\n".join(
        markdown(heads, [row for policy in POLICIES for row in rows(policy)])
        for heads, rows in ((TIMES, of_size), (CARRIED, carried))
    )


def written(page: str, text: str) -> str:
    """A page with new text between its marks.

    Args:
        page: as it is.
        text: to put there.
    """
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into the page.

    Args:
        arguments: None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    text = tables()
    print(text)
    if options.write:
        PAGE.write_text(written(PAGE.read_text("utf-8"), text), "utf-8")


if __name__ == "__main__":
    main()
