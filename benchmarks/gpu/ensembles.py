"""G3: four members of an ensemble score the same sequences, against four whole models that lie on the device.

``heads`` share one backbone (limit 1/4), ``adapters`` pass through it once each (limit 1), and ``models`` rest in host
memory and come to the device in turn, as members of kind "full" do (limit 1: what the device computes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device import computing, measured
from benchmarks.gpu.models import PAD, SMALL, Lengths, forward_flops, multiplying, reward_model, rollouts
from benchmarks.gpu.rows import Row, Scene, row
from rm.batches import Encoded, score_sequences
from rm.config import LoraConfig
from rm.lora import add_lora
from rm.members import FullMembers, HeadMembers, LoraMembers
from rm.model import RewardModel

MEMBERS, BATCH, SEQUENCES, RANK = 4, 16, 64, 8
LIMITS = {"heads": 1 / MEMBERS, "adapters": 1.0, "models in turn": 1.0}


def resident(models: Sequence[RewardModel], given: Sequence[Encoded]) -> Tensor:
    """[B, M] scores, one model after another."""
    return torch.stack([score_sequences(model, given, BATCH, PAD) for model in models], dim=1)


def scoring(size: str, scene: Scene) -> Iterator[Row]:
    """All forms.

    Args:
        size: of the backbone.
        scene: of the measurement.
    """
    kind, small = scene.device.kind, scene.settings.small
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    make = partial(reward_model, "tiny" if small else size, kind, dtype)
    given: list[Encoded] = [
        (r.prompt.token_ids, r.response_ids) for r in rollouts(8 if small else SEQUENCES, SMALL if small else Lengths())
    ]
    models, trunk, adapted = [make() for _ in range(MEMBERS)], make(), make()
    drawn = torch.randn(MEMBERS, trunk.head.in_features, generator=torch.Generator().manual_seed(1))
    drawn = drawn.to(dtype).float()  # the whole models' heads are of that type
    for member in range(MEMBERS):
        models[member].head.weight.data.copy_(drawn[member][None])
        add_lora(adapted, LoraConfig(rank=RANK, alpha=2 * RANK), seed=member, name=f"member{member}")
    resting = [reward_model("tiny" if small else size, kind, dtype).to("cpu") for _ in range(MEMBERS)]
    ways: dict[str, Callable[[], object]] = {
        "heads": partial(HeadMembers(trunk, drawn).scores, given, BATCH, PAD),
        "adapters": partial(LoraMembers(adapted, MEMBERS).scores, given, BATCH, PAD),
        "models in turn": partial(FullMembers(resting, kind).scores, given, BATCH, PAD),
        "resident": partial(resident, models, given),
    }
    with computing(kind):
        differing = float((HeadMembers(trunk, drawn).scores(given, BATCH, PAD) - resident(models, given)).abs().max())
        found = measured(kind, ways, scene.settings.repetitions)
    tokens = sum(len(prompt) + len(response) for prompt, response in given)
    passes = {"heads": 1, "adapters": MEMBERS, "models in turn": MEMBERS}
    for way, limit in LIMITS.items():
        flops = forward_flops(multiplying(trunk), tokens * passes[way])
        figures = {"scores_to": differing} if way == "heads" else {}
        place = ("G3", f"scoring by 4 {way}, {size}")
        yield row(place, found, way, "resident", limit, flops, tokens=tokens, **figures)
