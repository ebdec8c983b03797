"""G1: PPO updates, and what of the GPU's FLOP/s they use.

One update of 32 rollouts in one minibatch, one epoch: three evaluations without gradient, two backward passes, two
optimizer steps. Useful FLOPs: 6 N T of policy and critic each (4 N T with adapters), and 2 N T to evaluate each of policy,
critic and reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Kind, computing, measured
from benchmarks.gpu.models import (
    PAD,
    SMALL,
    Lengths,
    critic,
    forward_flops,
    language_model,
    multiplying,
    rollouts,
    training_flops,
)
from benchmarks.gpu.rows import Row, Scene, row
from policy.config import PolicyConfig
from policy.lora import add_adapters
from policy.ppo import PPO
from tokens.config import AdapterConfig
from tokens.lora import WithoutAdapters
from tokens.packing import PACKED
from tokens.recompute import recompute_layers
from tokens.records import Rollout

ROLLOUTS = 32


@dataclass(frozen=True)
class Kit:
    """A PPO learner on one device, and what it learns from.

    Args:
        ppo: the learner.
        rollouts: of one update.
        scores: [B] float32, of the rollouts.
        flops: useful ones of an update.
    """

    ppo: PPO
    rollouts: list[Rollout]
    scores: Tensor
    flops: float

    def update(self) -> None:
        """One."""
        self.ppo.update(self.rollouts, self.scores)

    @property
    def tokens(self) -> int:
        """Of prompts and responses."""
        return sum(len(r.prompt.token_ids) + len(r.response_ids) for r in self.rollouts)


def learner(size: str, kind: Kind, small: bool, packed: bool = True, recompute: bool = False, rank: int = 0) -> Kit:
    """Policy, critic, reference and both optimizers.

    Args:
        size: of each model.
        kind: of the device.
        small: whether they are to be tiny.
        packed: sequences one after another in microbatches of 4,096 tokens; else padded, eight at a time.
        recompute: whether layers keep their inputs only.
        rank: of adapters over bfloat16 weights, whose reference is the policy without them; 0 trains everything in float32.
    """
    shape, attention = "tiny" if small else size, PACKED if packed else "sdpa"
    half = torch.bfloat16 if kind == "cuda" else torch.float32
    trained = half if rank else torch.float32
    policy, values = language_model(shape, kind, trained, attention), critic(shape, kind, trained, attention)
    n_policy, n_critic = multiplying(policy), multiplying(values)
    if rank:
        adapters = AdapterConfig(rank=rank, alpha=2 * rank)
        add_adapters(policy, adapters, seed=0)
        add_adapters(values.model, adapters, seed=1, head="score")
    reference: Any = WithoutAdapters(policy) if rank else language_model(shape, kind, half, attention)
    if recompute:
        recompute_layers(policy)
        recompute_layers(values)
    number = 4 if small else ROLLOUTS
    settings: dict[str, Any] = {"microbatch_tokens": 4096, "packing": True} if packed else {}
    sizes = {"prompts_per_step": number, "minibatch_size": number, "microbatch_size": min(8, number), "importance_cap": None}
    config = PolicyConfig.model_validate(sizes | settings)
    ppo = PPO(policy, values, reference, config, temperature=1.0, pad_id=PAD, seed=0)
    given = rollouts(number, SMALL if small else Lengths())
    tokens = sum(len(r.prompt.token_ids) + len(r.response_ids) for r in given)
    flops = training_flops(n_policy + n_critic, tokens, frozen=bool(rank)) + forward_flops(2 * n_policy + n_critic, tokens)
    return Kit(ppo, given, torch.randn(number, generator=torch.Generator().manual_seed(0)), flops)


def update(size: str, case: str, recompute: bool, rank: int, scene: Scene) -> Iterator[Row]:
    """Packed updates of one size.

    Args:
        size: of the models.
        case: its name.
        recompute: whether layers keep their inputs only.
        rank: of adapters; 0 = none.
        scene: of the measurement.
    """
    kind = scene.device.kind
    kit = learner(size, kind, scene.settings.small, recompute=recompute, rank=rank)
    ways: dict[str, Callable[[], object]] = {"packed": kit.update}
    with computing(kind):
        found = measured(kind, ways, scene.settings.repetitions)
    speed = kit.tokens / found.turns.seconds("packed")
    yield row(("G1", case), found, "packed", flops=kit.flops, tokens=kit.tokens, tokens_per_second=speed)
