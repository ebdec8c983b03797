"""Fitting a reward model on preference pairs, with or without MetaRM, and scoring with it.

Letters: B sequences, N pairs per step (n), m prompts of S_k per step, k responses per prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rm.config import MetaConfig, RewardConfig
from rm.losses import bradley_terry_loss, difference_loss, pair_accuracy
from rm.metarm import MetaStep, metarm_gradient
from rm.model import RewardModel
from rm.records import RewardFit, RewardStep
from tokens.errors import UserError
from tokens.ranks import ALONE, Ranks, clip_gradients
from tokens.records import Pair, SequenceBatch

TokenIds = tuple[int, ...]
_Row = TypeVar("_Row")
Encoded = tuple[TokenIds, TokenIds]
"""Prompt ids and response ids of one sequence."""

META_SEED_OFFSET = 7_919_027
"""Keeps the generator of S_k's order apart from the one of the pairs' order."""


def fit_reward_model(
    model: RewardModel,
    pairs: Sequence[Pair],
    meta: Sequence[Sequence[Encoded]] | None,
    reward: RewardConfig,
    meta_config: MetaConfig,
    seed: int,
    pad_id: int,
    on_step: Callable[[RewardStep], None],
    ranks: Ranks = ALONE,
) -> RewardFit:
    """Train ``model`` in place on D, by MetaRM where S_k is given and enabled, else by the plain preference loss.

    Each step: n pairs in one forward pass; under MetaRM first an ascent on m prompts of S_k (see ``rm.metarm``). AdamW,
    gradient norm clipped, learning rate rising over the warm-up and then falling linearly. The last batch of an epoch
    may be smaller and is averaged over its own size. Pairs and S_k are shuffled by two generators, so that a vanilla
    and a MetaRM fit of one seed see the pairs in the same order.

    Source: Secrets of RLHF Part II, Eq 2 and Algorithm 1; settings of its appendix B.

    Args:
        model: on its device.
        pairs: D.
        meta: S_k, an inner sequence per prompt: its k responses, each with the prompt's ids. None = vanilla.
        reward: epochs, lr, batch_size and the rest.
        meta_config: eta, prompts_per_step; ``enabled`` False makes the fit vanilla whatever ``meta`` is.
        seed: of both orders.
        pad_id: id written at padding.
        on_step: called after each step.
        ranks: that share the model, which ``ranks.shard`` has cut up already. All must call this with the same arguments; each
            computes on its share of the pairs and of S_k's prompts, and returns the same.

    Returns:
        Means over the last quarter of the steps.

    Raises:
        UserError: if there are no pairs, or S_k is empty, ragged or has k < 2.
        FloatingPointError: if a loss or gradient is not finite; names the step. The weights are those before it.
    """
    if not pairs:
        raise UserError("no preference pairs to train the reward model on: got 0, expected at least 1. Check the data set.")
    groups = list(meta) if meta is not None and meta_config.enabled else []
    if meta is not None and meta_config.enabled:
        _check_meta(groups)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=reward.lr, betas=(reward.beta1, reward.beta2), eps=reward.eps, weight_decay=reward.weight_decay
    )
    num_steps = reward.epochs * math.ceil(len(pairs) / reward.batch_size)
    draws = _draw_groups(groups, meta_config.prompts_per_step, seed + META_SEED_OFFSET)
    steps: list[RewardStep] = []
    optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(_pair_batches(pairs, reward.batch_size, reward.epochs, seed)):
        shifted = next(draws) if groups else []
        try:
            settings = (meta_config.eta, reward.microbatch_size, pad_id)
            loss, accuracy, meta_step = _gradient(model, parameters, batch, shifted, *settings, ranks)
            norm = clip_gradients(parameters, reward.max_grad_norm)
            if not math.isfinite(norm):
                raise FloatingPointError(f"the preference loss is {loss}, its gradient's norm is {norm}")
        except FloatingPointError as error:
            raise FloatingPointError(
                f"reward model, step {index + 1} of {num_steps}: {error}; first pair {batch[0].id!r}. "
                "Lower reward.lr or meta.eta."
            ) from error
        lr = reward.lr * learning_rate_factor(index, num_steps, reward.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(RewardStep(index + 1, num_steps, len(batch), loss, accuracy, lr, norm, meta_step, _duplicates(shifted)))
        on_step(steps[-1])
    return RewardFit.of(steps, _duplicates(groups) / sum(len(group) for group in groups) if groups else None)


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step: up linearly over w = round(warmup_ratio * num_steps) steps, then down to 0.

    (s + 1) / w for s < w, else (S - s) / (S - w): 1 at the end of the warm-up, and 0 one step after the last.

    Args:
        step: s, from 0.
        num_steps: S.
        warmup_ratio: in [0, 1).

    Returns:
        A factor in (0, 1].

    Raises:
        ValueError: if ``step`` is not in 0..S-1.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is not one of {num_steps}")
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return (num_steps - step) / (num_steps - warmup)


def score_sequences(
    model: RewardModel, sequences: Sequence[Encoded], batch_size: int, pad_id: int, ranks: Ranks = ALONE
) -> Tensor:
    """Scores without gradient, in batches of similar length.

    Args:
        model: on its device.
        sequences: B of (prompt ids, response ids); may be none.
        batch_size: sequences per forward pass, >= 1.
        pad_id: id written at padding.
        ranks: that share the model; all must call this, with the same sequences.

    Returns:
        [B] on the CPU, in the order given; scores of the model, unnormalised.

    Raises:
        ValueError: if ``batch_size`` is below 1.

    Padding contract: a sequence's score does not depend on those beside it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(sequences)), key=lambda i: -(len(sequences[i][0]) + len(sequences[i][1])))
    scores = torch.zeros(len(sequences))
    if not order:
        return scores
    own = _share(order, ranks)
    with torch.no_grad():
        parts = [
            _scores(model, [sequences[i] for i in own[start : start + batch_size]], pad_id, batch_size)
            for start in range(0, len(own), batch_size)
        ]
    scores[order] = ranks.gather(torch.cat(parts), len(order)).to("cpu", scores.dtype)
    return scores


def evaluate_pairs(
    model: RewardModel, pairs: Sequence[Pair], batch_size: int, pad_id: int, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """How well a model ranks pairs.

    Args:
        model: on its device.
        pairs: at least one.
        batch_size: sequences per forward pass, >= 1.
        pad_id: id written at padding.
        ranks: that share the model; all must call this, with the same pairs.

    Returns:
        Share ranked as labelled (a tie counts one half), and the Bradley-Terry loss in nats per pair.

    Raises:
        ValueError: if there are no pairs.
    """
    if not pairs:
        raise ValueError("no pairs to evaluate on")
    scores = score_sequences(model, _pair_sequences(pairs), batch_size, pad_id, ranks)
    chosen, rejected = scores.chunk(2)
    return float(pair_accuracy(chosen, rejected)), float(bradley_terry_loss(chosen, rejected, len(pairs)))


def _gradient(
    model: RewardModel,
    parameters: Sequence[nn.Parameter],
    batch: Sequence[Pair],
    shifted: Sequence[Sequence[Encoded]],
    eta: float,
    microbatch: int,
    pad_id: int,
    ranks: Ranks,
) -> tuple[float, float, MetaStep | None]:
    """Fill ``.grad``; return loss, accuracy and, where there are shifted samples, what MetaRM saw.

    The losses are this rank's part of a sum. A rank without rows of its own scores one that stands in, and multiplies it by 0.
    """
    accuracy = torch.zeros((), device=parameters[0].device)

    def descend() -> Tensor:
        nonlocal accuracy
        scores = _scores(model, _pair_sequences(_share(batch, ranks)), pad_id, microbatch)
        own = ranks.num_own(len(batch))
        if not own:
            return 0 * scores.sum()
        chosen, rejected = (half[:own] for half in scores.chunk(2))  # [own] each
        accuracy = pair_accuracy(chosen, rejected) * (own / len(batch))
        return bradley_terry_loss(chosen, rejected, len(batch))

    def ascend() -> Tensor:
        groups = _share(shifted, ranks)
        flat = [sequence for group in groups for sequence in group]
        scores = _scores(model, flat, pad_id, microbatch).view(len(groups), -1)  # [m, k]
        own = ranks.num_own(len(shifted))
        return difference_loss(scores[:own], len(shifted)) if own else 0 * scores.sum()

    if shifted:
        step = metarm_gradient(parameters, ascend, descend, eta, measure=True, ranks=ranks)
        return step.loss, float(ranks.sum(accuracy)), step
    loss = descend()
    value = float(ranks.sum(loss.detach()))
    if not math.isfinite(value):
        raise FloatingPointError(f"the preference loss is {value}")
    torch.autograd.backward(loss)
    return value, float(ranks.sum(accuracy)), None


def _share(rows: Sequence[_Row], ranks: Ranks) -> list[_Row]:
    return [rows[i] for i in ranks.share(torch.arange(len(rows))).tolist()]


def _scores(model: RewardModel, sequences: Sequence[Encoded], pad_id: int, microbatch: int) -> Tensor:
    """[B] scores in the order given, with gradient; like lengths share a forward pass, so that little is spent on padding."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    parts: list[Tensor] = []
    for start in range(0, len(order), microbatch):
        rows = [sequences[i] for i in order[start : start + microbatch]]
        parts.append(model(SequenceBatch.from_ids([p for p, _ in rows], [r for _, r in rows], pad_id).to(device)))
    back = torch.tensor(order).argsort()
    return torch.cat(parts)[back.to(device)]


def _pair_sequences(pairs: Sequence[Pair]) -> list[Encoded]:
    """All chosen, then all rejected."""
    return [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]


def _pair_batches(pairs: Sequence[Pair], size: int, epochs: int, seed: int) -> Iterator[list[Pair]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [pairs[i] for i in order[start : start + size]]


def _draw_groups(groups: Sequence[Sequence[Encoded]], size: int, seed: int) -> Iterator[list[Sequence[Encoded]]]:
    """Endless batches of min(size, all) prompts' groups; every prompt comes up once before any comes up again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < min(size, len(groups)):
            queue += torch.randperm(len(groups), generator=generator).tolist()
        taken, queue = queue[:size], queue[size:]
        yield [groups[i] for i in taken]


def _check_meta(groups: Sequence[Sequence[Encoded]]) -> None:
    if not groups:
        raise UserError("MetaRM got no prompts in S_k: expected at least 1. Raise meta.num_prompts or set meta.enabled to false.")
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1 or sizes[0] < 2:
        raise UserError(
            f"MetaRM needs the same number k >= 2 of responses for every prompt of S_k, got {sizes}. Set meta.samples_per_prompt."
        )
    for index, group in enumerate(groups):
        if len({prompt for prompt, _ in group}) > 1:
            raise UserError(f"entry {index} of S_k mixes responses to different prompts: expected one prompt's k responses.")


def _duplicates(groups: Sequence[Sequence[Encoded]]) -> int:
    return sum(len(group) - len({tuple(response) for _, response in group}) for group in groups)
