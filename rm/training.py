"""Fitting a reward model on preference pairs, with or without MetaRM.

Letters: B sequences, N pairs per step (n), m prompts of S_k per step, k responses per prompt.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rm.batches import Encoded, draw_groups, pair_batches, pair_sequences, score_sequences, scores_of, share_rows
from rm.config import MetaConfig, RewardConfig
from rm.losses import bradley_terry_loss, difference_loss, pair_accuracy
from rm.metarm import MetaStep, metarm_gradient
from rm.model import RewardModel
from rm.objective import PreferenceObjective
from rm.records import RewardFit, RewardStep
from tokens.errors import UserError
from tokens.ranks import ALONE, Ranks, clip_gradients
from tokens.records import Pair

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
    draws = draw_groups(groups, meta_config.prompts_per_step, seed + META_SEED_OFFSET)
    objective = PreferenceObjective(model, reward, pad_id, ranks)
    steps: list[RewardStep] = []
    optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(pair_batches(pairs, reward.batch_size, reward.epochs, seed)):
        shifted = next(draws) if groups else []
        try:
            settings = (meta_config.eta, reward.microbatch_size, pad_id)
            loss, accuracy, meta_step = _gradient(model, parameters, objective, batch, shifted, *settings, ranks)
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
    scores = score_sequences(model, pair_sequences(pairs), batch_size, pad_id, ranks)
    chosen, rejected = scores.chunk(2)
    return float(pair_accuracy(chosen, rejected)), float(bradley_terry_loss(chosen, rejected, len(pairs)))


def _gradient(
    model: RewardModel,
    parameters: Sequence[nn.Parameter],
    objective: PreferenceObjective,
    batch: Sequence[Pair],
    shifted: Sequence[Sequence[Encoded]],
    eta: float,
    microbatch: int,
    pad_id: int,
    ranks: Ranks,
) -> tuple[float, float, MetaStep | None]:
    """Fill ``.grad``; return loss, accuracy and, where there are shifted samples, what MetaRM saw."""

    def ascend() -> Tensor:
        groups = share_rows(shifted, ranks)
        flat = [sequence for group in groups for sequence in group]
        scores = scores_of(model, flat, pad_id, microbatch).view(len(groups), -1)  # [m, k]
        own = ranks.num_own(len(shifted))
        return difference_loss(scores[:own], len(shifted)) if own else 0 * scores.sum()

    if shifted:
        step = metarm_gradient(parameters, ascend, lambda: objective(batch), eta, measure=True, ranks=ranks)
        return step.loss, float(ranks.sum(objective.accuracy)), step
    loss = objective(batch)
    value = float(ranks.sum(loss.detach()))
    if not math.isfinite(value):
        raise FloatingPointError(f"the preference loss is {value}")
    torch.autograd.backward(loss)
    return value, float(ranks.sum(objective.accuracy)), None


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
