"""G1: steps of a reward model, and what of the GPU's FLOP/s they use.

A step is the fit's own: the objective in microbatches of eight sequences, one backward pass, clipping, AdamW. Three layouts
of sequences as long as HH-RLHF's take turns: like lengths together (ours), packed into rows, and by transformers in the
order in which they come. The larger models have sequences of 1,024 tokens each, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.gpu.device import computing, measured
from benchmarks.gpu.models import (
    PAD,
    SHAPES,
    SMALL,
    Lengths,
    equal_pairs,
    multiplying,
    pairs,
    reward_model,
    tokens_of,
    training_flops,
)
from benchmarks.gpu.rows import Row, Scene, row
from rm.batches import pair_sequences, passes_behind_prompts, scores_of
from rm.config import LoraConfig, RewardConfig
from rm.descent import adamw, descend
from rm.lora import add_lora
from rm.losses import bradley_terry_loss
from rm.model import RewardModel
from rm.objective import PreferenceObjective
from rm.shared_prompts import row_width
from tokens.ranks import ALONE
from tokens.records import Pair, SequenceBatch

MICROBATCH, LR = 8, 1e-6
RANK = 16
"""Of adapters."""


class Steps:
    """Steps of one model on one batch, by layout.

    Args:
        model: on its device.
        batch: pairs.
    """

    def __init__(self, model: RewardModel, batch: Sequence[Pair]) -> None:
        self.model, self.batch = model, batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        config = RewardConfig(batch_size=len(batch), microbatch_size=MICROBATCH)
        self.optimizer = adamw(self.trained, LR, config)
        layouts = {"by length": config, "packed": config.model_copy(update={"packing": True})}
        self.objectives = {name: PreferenceObjective(model, each, PAD, ALONE, 0) for name, each in layouts.items()}

    def ours(self, layout: str) -> None:
        """A step of the fit."""
        self._end(self.objectives[layout](self.batch))

    def as_they_come(self) -> None:
        """The same step as one writes it first."""
        chosen, rejected = plain_scores(self.model, self.batch).chunk(2)
        self._end(bradley_terry_loss(chosen, rejected, len(self.batch)))

    def _end(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)
        descend(self.optimizer, self.trained, 1.0, LR, "preference loss")


def plain_scores(model: RewardModel, batch: Sequence[Pair]) -> torch.Tensor:
    """Scores in the order given, in microbatches that are padded to their longest, by transformers' own forward pass.

    Args:
        model: on its device.
        batch: N pairs.

    Returns:
        [2 N] float32: of all chosen, then of all rejected.
    """
    device, given = next(model.parameters()).device, pair_sequences(batch)
    parts = []
    for start in range(0, len(given), MICROBATCH):
        part = given[start : start + MICROBATCH]
        padded = SequenceBatch.from_ids([prompt for prompt, _ in part], [response for _, response in part], PAD).to(device)
        mask = padded.attention_mask.long()
        parts.append(model.model(input_ids=padded.input_ids, attention_mask=mask, use_cache=False).logits[:, 0].float())
    return torch.cat(parts)


def padded_tokens(batch: Sequence[Pair]) -> int:
    """Tokens that ``plain_scores`` computes."""
    lengths = [len(prompt) + len(response) for prompt, response in pair_sequences(batch)]
    parts = [lengths[start : start + MICROBATCH] for start in range(0, len(lengths), MICROBATCH)]
    return sum(len(part) * max(part) for part in parts)


def shared_tokens(model: RewardModel, batch: Sequence[Pair]) -> int:
    """Tokens that our step needs: those of both sequences, the prompt once where it stands before both."""
    given = pair_sequences(batch)
    passes = passes_behind_prompts(model, given, MICROBATCH)
    if passes is None:
        return tokens_of(list(batch))
    return sum(row_width([given[i] for i in row]) for rows in passes for row in rows)


def layouts(size: str, number: int, scene: Scene) -> Iterator[Row]:
    """The three layouts on one model.

    Args:
        size: of the model.
        number: pairs of a step.
        scene: of the measurement.
    """
    kind = scene.device.kind
    batch = pairs(number, SMALL if scene.settings.small else Lengths())
    steps = Steps(reward_model("tiny" if scene.settings.small else size, kind), batch)
    ways: dict[str, Callable[[], object]] = {name: partial(steps.ours, name) for name in steps.objectives}
    with computing(kind):
        with torch.no_grad():
            got = scores_of(steps.model, pair_sequences(batch), PAD, MICROBATCH, share=True)
            differing = float((got - plain_scores(steps.model, batch)).abs().max())
        found = measured(kind, ways | {"as they come": steps.as_they_come}, scene.settings.repetitions)
    tokens, padded = tokens_of(list(batch)), padded_tokens(batch)
    shared = shared_tokens(steps.model, batch)
    for layout in steps.objectives:
        place, needed = ("G1", f"reward step, {size}, {layout}"), tokens if layout == "packed" else shared
        flops = training_flops(multiplying(steps.model), needed)
        figures = {"tokens": tokens, "needed": needed, "of_padded": needed / padded, "scores_to": differing}
        yield row(place, found, layout, "as they come", needed / padded, flops, **figures)


def whole(size: str, case: str, number: int, length: int, recompute: bool, rank: int, scene: Scene) -> Iterator[Row]:
    """A step on sequences of one length.

    Args:
        size: of the model.
        case: its name.
        number: pairs.
        length: tokens of each sequence.
        recompute: whether layers keep their inputs only.
        rank: of adapters over a bfloat16 backbone; 0 trains everything in float32.
        scene: of the measurement.
    """
    kind, small = scene.device.kind, scene.settings.small
    shape = "tiny" if small else size
    dtype = torch.bfloat16 if rank and kind == "cuda" else torch.float32
    model = reward_model(shape, kind, dtype, recompute)
    if rank:
        add_lora(model, LoraConfig(rank=rank, alpha=2 * rank))
    batch = equal_pairs(min(number, 4) if small else number, 16 if small else length, SHAPES[shape].vocabulary)
    steps = Steps(model, batch)
    with computing(kind):
        found = measured(kind, {"by length": partial(steps.ours, "by length")}, scene.settings.repetitions)
    tokens = tokens_of(batch)
    flops = training_flops(multiplying(model), tokens, frozen=bool(rank))
    yield row(("G1", case), found, "by length", flops=flops, tokens=tokens, billions_trained=billions_trained(model))


def billions_trained(model: nn.Module) -> float:
    """Weights that are trained, in billions."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9
