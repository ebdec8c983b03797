"""C1: all members of an ensemble score the same sequences, against as many whole models, one after another.

The whole models are the members themselves: the backbone under each head, or with each adapter merged into it; so the scores must
be equal. They are run by transformers alone. Its best setting is batches of like lengths; as they come is what one writes first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.ratios.frame import take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.scenery import PAD, classifier, plain_scores, reward_model, sequences
from rm.batches import Encoded
from rm.config import LoraConfig
from rm.lora import add_lora, use_adapter
from rm.members import HeadMembers, LoraMembers
from tokens.lora import layers_with_adapters, merged

BATCH, RANK = 16, 8


def heads(num_members: int, small: bool) -> tuple[HeadMembers, list[PreTrainedModel]]:
    """Heads on one backbone, and each with a backbone of its own."""
    trunk = reward_model(small)
    drawn = torch.randn(num_members, trunk.head.weight.shape[1], generator=torch.Generator().manual_seed(1))
    models = []
    for head in drawn:
        whole = copy.deepcopy(trunk)
        whole.head.weight.data.copy_(head[None])
        models.append(whole.model)
    return HeadMembers(trunk, drawn), models


def adapters(num_members: int, small: bool) -> tuple[LoraMembers, list[PreTrainedModel]]:
    """Adapters that are not zero on one backbone, and each merged into a backbone of its own."""
    model, generator = reward_model(small), torch.Generator().manual_seed(1)
    for member in range(num_members):
        add_lora(model, LoraConfig(rank=RANK, alpha=2 * RANK), seed=member, name=f"member{member}")
    for layer in layers_with_adapters(model.model).values():
        for b in layer.lora_B.values():
            b.weight.data.copy_(0.1 * torch.randn(b.weight.shape, generator=generator))
    models: list[PreTrainedModel] = []
    for member in range(num_members):
        use_adapter(model, f"member{member}")
        whole = classifier(small)
        whole.load_state_dict(merged(model.model, f"member{member}", model.model.state_dict()))
        models.append(whole)
    return LoraMembers(model, num_members), models


def one_after_another(models: Sequence[PreTrainedModel], given: Sequence[Encoded], by_length: bool) -> Tensor:
    """[B, M] by transformers."""
    return torch.stack([plain_scores(model, given, BATCH, by_length) for model in models], dim=1)


def measure(settings: Settings) -> Iterator[Row]:
    """Heads and adapters, 4 and 10 of them."""
    given = sequences(*((6, 20, 40) if settings.small else (48, 24, 128)))
    for kind, make, num_members in (("heads", heads, 4), ("heads", heads, 10), ("lora", adapters, 4), ("lora", adapters, 10)):
        members, models = make(num_members, settings.small)
        ways = {
            "ours": partial(members.scores, given, BATCH, PAD),
            "sorted": partial(one_after_another, models, given, True),
            "as they come": partial(one_after_another, models, given, False),
        }
        if (kind, num_members) != ("heads", 4):
            del ways["as they come"]
        found = ways["ours"](), ways["sorted"]()
        equality = f"scores to {float((found[0] - found[1]).abs().max()):.0e} of {float(found[1].abs().mean()):.1f}"
        turns = take_turns(ways, settings.repetitions)
        limit = 1 / num_members if kind == "heads" else 1.0
        what = "heads on one backbone" if kind == "heads" else "LoRA members"
        yield row(("C1", f"{num_members} {what} score"), turns, ("ours", "sorted"), settings, limit, equality)
        if "as they come" in ways:
            best = limit * turns.ratio("sorted", "as they come").middle
            place = ("C1", "4 heads, against batches as they come")
            yield row(place, turns, ("ours", "as they come"), settings, best, equality)
