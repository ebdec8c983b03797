"""Fitting a reward model on preference pairs, with or without MetaRM.

Letters: B sequences, N pairs per step (n), m prompts of S_k per step, k responses per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm.batches import Encoded, pair_batches
from rm.config import MetaConfig, RewardConfig
from rm.descent import adamw, check_weights, descend, within
from rm.metarm import ascend_in_place, backward, joint_gradient, metarm_gradient
from rm.model import RewardModel
from rm.objective import PreferenceObjective
from rm.records import MetaFit, MetaStep, RewardFit, RewardStep, last_quarter
from rm.resume import Saves, best_weights, numbers_of, own_parts, put_back, step_from, weights_and_moments
from rm.shifted import ShiftedSamples, num_duplicates
from tokens.errors import UserError
from tokens.guards import ONLY_FINITE, BadNumber, Budget, GuardsConfig
from tokens.ranks import ALONE, Ranks
from tokens.records import Pair
from tokens.saved_state import SavedState

MEASURE_EVERY = 10
"""J at theta' and on held-out prompts takes further forward passes: on the first, every tenth and the last step they cost a few
percent of a fit, on every step they would cost as much as a third of MetaRM's own passes."""

ADVICE = "reward.lr or meta.eta"
"""What to lower where numbers go wrong."""

DIRECTION_SEED_OFFSET = 32_452_843
"""Keeps the generator of random directions apart from those of the data's order."""


@dataclass(frozen=True)
class Watch:
    """Looking at the model while it is fitted.

    Args:
        every: steps between two measurements, >= 1; there is one after the last step too.
        measure: called with the number of steps taken, after the optimizer's; its value is what early stopping maximises. On
            several ranks all call it, and it must say the same on all.
        patience: stop after so many measurements in a row that are not above the best one, >= 1, and put back the weights of
            the best one (the first of equals); None = never, and the last weights are kept.

    Raises:
        ValueError: if ``every`` or ``patience`` is below 1.
    """

    every: int
    measure: Callable[[int], float]
    patience: int | None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"measuring needs every >= 1 and patience >= 1 or None, got {self.every} and {self.patience}")


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
    watch: Watch | None = None,
    guards: GuardsConfig = ONLY_FINITE,
    saves: Saves | None = None,
) -> RewardFit:
    """Train ``model`` in place on D, by MetaRM where S_k is given and enabled, else by the plain preference loss.

    Each step: n pairs in one forward pass; under MetaRM first an ascent on m prompts of S_k (see ``rm.metarm``). AdamW,
    gradient norm clipped, learning rate rising over the warm-up and then falling linearly. The last batch of an epoch
    may be smaller and is averaged over its own size. Pairs and S_k are shuffled by two generators, so that a vanilla
    and a MetaRM fit of one seed see the pairs in the same order. A tenth of S_k's prompts is kept back to measure on.

    What is left behind is theta after the last step, or after the best measurement where ``watch`` has patience; with
    ``meta.deploy: theta_prime`` it is then moved by eta grad J of all prompts that are not kept back.

    Source: Secrets of RLHF Part II, Eq 2 and Algorithm 1; settings of its appendix B.

    Args:
        model: on its device.
        pairs: D.
        meta: S_k, an inner sequence per prompt: its k responses, each with the prompt's ids. None = vanilla.
        reward: epochs, lr, batch_size and the rest.
        meta_config: eta, prompts_per_step and the rest; ``enabled`` False makes the fit vanilla whatever ``meta`` is.
        seed: of both orders, of the prompts kept back, of random directions and of what the objective draws.
        pad_id: id written at padding.
        on_step: called after each step.
        ranks: that share the model, which ``ranks.shard`` has cut up already. All must call this with the same arguments; each
            computes on its share of the pairs and of S_k's prompts, and returns the same.
        watch: measurements and early stopping; None = neither.
        guards: how many steps whose loss or gradient is not finite may be left out. Such a step changes no weight, and its
            pairs are not learned from.
        saves: saving how far the fit has come, and going on from there to the same bits: ``model`` is then as it was at the
            beginning, and ``on_step`` is called again for the steps that are done. None = neither.

    Returns:
        Means over the last quarter of the steps that were taken.

    Raises:
        UserError: if there are no pairs, S_k is empty, ragged or has k < 2, or meta.order is 2 on several ranks.
        BadNumber: if too many losses or gradients are not finite, or a weight or measurement; names the step. Where it is a loss
            or a gradient, the weights are those before it.
    """
    if not pairs:
        raise UserError("no preference pairs to train the reward model on: got 0, expected at least 1. Check the data set.")
    num_steps = reward.epochs * math.ceil(len(pairs) / reward.batch_size)
    shifted = None
    if meta is not None and meta_config.enabled:
        shifted = ShiftedSamples(meta, model, reward, meta_config.prompts_per_step, seed, pad_id, ranks)
    fit = _Fit(model, reward, meta_config, shifted, seed, pad_id, num_steps, ranks)
    weights = _BestWeights(fit.theta, watch)
    start = shifted.measure() if shifted is not None and shifted.heldout else None
    budget = Budget.of(guards)
    done, steps = (0, []) if saves is None or saves.begin is None else fit.resume(saves.begin, weights, budget)
    for step in steps:
        on_step(step)
    for index, batch in islice(enumerate(pair_batches(pairs, reward.batch_size, reward.epochs, seed)), done, None):
        found = fit.step(index, batch, budget)
        if found is not None:
            steps.append(found)
            on_step(found)
        if weights.measured(index + 1, num_steps):
            break
        if saves is not None and (index + 1) % saves.every == 0 and index + 1 < num_steps:
            fit.check(index + 1)  # what is saved is gone on from
            saves.write(index + 1, fit.state(index + 1, steps, weights, budget))
    weights.restore()
    displacement = fit.deploy()
    fit.check(num_steps)
    if not steps:
        raise BadNumber(
            "the number of steps with a finite gradient", 0, "1 or more", f"the end of a reward model's fit of {num_steps}"
        )
    seen = [step.meta for step in last_quarter(steps) if step.meta is not None]
    if shifted is None:
        return RewardFit.of(steps, weights.best_step, None)
    left = shifted.measure() if shifted.heldout else None
    return RewardFit.of(steps, weights.best_step, MetaFit.of(seen, shifted.duplicate_share, start, left, displacement))


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


_Gradient = Callable[[int, Sequence[Pair]], tuple[float, MetaStep | None, int]]
"""Fills ``.grad`` for a step (its index, its pairs); gives L, what MetaRM saw, and the duplicates among its samples."""


class _Fit:
    """Model, objective and optimizer of one fit. How a gradient is made is chosen here, once."""

    def __init__(
        self,
        model: RewardModel,
        reward: RewardConfig,
        meta: MetaConfig,
        shifted: ShiftedSamples | None,
        seed: int,
        pad_id: int,
        num_steps: int,
        ranks: Ranks,
    ) -> None:
        if shifted is not None and meta.order == 2 and ranks.size > 1:
            raise UserError(
                f"meta.order is 2, which differentiates twice and needs the whole model in one process: got {ranks.size} ranks. "
                "Train the reward model in one process, or set meta.order to 1."
            )
        self.reward, self.meta, self.shifted, self.num_steps, self.ranks = reward, meta, shifted, num_steps, ranks
        self.objective = PreferenceObjective(model, reward, pad_id, ranks, seed)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.theta = list(self.named.values())
        self.own = {f"objective/{i}": p for i, p in enumerate(self.objective.parameters())}
        self.trained = [*self.theta, *self.own.values()]
        self.optimizer = adamw(self.trained, reward.lr, reward)
        self.optimizer.zero_grad(set_to_none=True)
        self.directions = torch.Generator().manual_seed(seed + DIRECTION_SEED_OFFSET)
        self.gradient: _Gradient = self._plain if shifted is None else partial(self._meta, shifted)

    def step(self, index: int, batch: Sequence[Pair], budget: Budget) -> RewardStep | None:
        """One optimizer step; None where a number went wrong before anything was changed, and the batch was left out."""
        where = f"step {index + 1} of {self.num_steps} of a reward model's fit, first pair {batch[0].id!r}"
        return within(budget, lambda: self._step(index, batch, budget.count), self.optimizer, self.trained, where, ADVICE)

    def check(self, done: int) -> None:
        """Weights that are kept are finite, also those that no pair of the last steps has read."""
        check_weights(self.trained, f"step {done} of {self.num_steps} of a reward model's fit", ADVICE)

    def _step(self, index: int, batch: Sequence[Pair], skipped: int) -> RewardStep:
        loss, meta_step, duplicates = self.gradient(index, batch)
        lr = self.reward.lr * learning_rate_factor(index, self.num_steps, self.reward.warmup_ratio)
        norm = descend(self.optimizer, self.trained, self.reward.max_grad_norm, lr, "preference loss")
        accuracy = float(self.ranks.sum(self.objective.accuracy))
        parts = dict(self.objective.parts)
        whole = (index + 1, self.num_steps, len(batch), loss, accuracy, lr, norm, parts, meta_step, duplicates, skipped)
        return RewardStep(*whole)

    def state(self, done: int, steps: Sequence[RewardStep], weights: _BestWeights, budget: Budget) -> SavedState:
        """All that moves in a fit; the order of the data follows from the seed and the number of steps behind it.

        Args:
            done: steps behind the fit, those that were left out included.
            steps: that were taken.
            weights: of the best measurement.
            budget: of bad numbers.
        """
        tensors = weights_and_moments(self.named | self.own, self.optimizer) | best_weights(self.named, weights.copy)
        tensors |= {f"generator/{name}": generator.get_state() for name, generator in self._generators().items()}
        values = {
            "done": done,
            "since_best": weights.since_best,
            "best_step": weights.best_step,
            "budget": [budget.row, budget.count],
            "collapsed": self.objective.steps_collapsed,
        }
        return SavedState(tensors if self.ranks.rank == 0 else {}, values | numbers_of(steps, weights.best_value))

    def resume(self, saved: SavedState, weights: _BestWeights, budget: Budget) -> tuple[int, list[RewardStep]]:
        """Be where a state says; the model and all else must be as they were at the beginning of the fit.

        Args:
            saved: what ``state`` gave.
            weights: of the best measurement.
            budget: of bad numbers.

        Returns:
            Steps behind the fit, and those that were taken.
        """
        tensors, values = saved.tensors, saved.values
        put_back(self.named | self.own, self.optimizer, tensors)
        weights.copy, weights.best_step, weights.since_best = (
            own_parts(self.named, tensors),
            values["best_step"],
            values["since_best"],
        )
        weights.best_value = -math.inf if values["best_value"] is None else values["best_value"]
        budget.row, budget.count = values["budget"]
        self.objective.steps_collapsed = values["collapsed"]
        for name, generator in self._generators().items():
            generator.set_state(tensors[f"generator/{name}"])
        if self.shifted is not None:
            for _ in range(values["done"]):
                next(self.shifted.batches)
        return values["done"], [step_from(step) for step in values["steps"]]

    def _generators(self) -> dict[str, torch.Generator]:
        return {"directions": self.directions, "masks": self.objective.masks}

    def deploy(self) -> float | None:
        """Move theta to theta' for good, where that is what the config wants; how far."""
        if self.shifted is None or self.meta.deploy == "theta":
            return None
        return ascend_in_place(
            self.theta,
            self.shifted.parts(),
            self.meta.eta,
            direction=self.meta.direction,
            generator=self.directions,
            ranks=self.ranks,
        )

    def _plain(self, index: int, batch: Sequence[Pair]) -> tuple[float, None, int]:
        return backward(self.objective.terms(batch), "the preference loss", self.ranks), None, 0

    def _meta(self, shifted: ShiftedSamples, index: int, batch: Sequence[Pair]) -> tuple[float, MetaStep, int]:
        groups = next(shifted.batches)
        due = index % MEASURE_EVERY == 0 or index == self.num_steps - 1
        heldout = shifted.measure if due and shifted.heldout else None
        losses = (self.theta, shifted.terms(groups), self.objective.terms(batch))
        if self.meta.objective == "joint":
            step = joint_gradient(*losses, self.meta.joint_coef, heldout=heldout, ranks=self.ranks)
        else:
            step = metarm_gradient(
                *losses,
                self.meta.eta,
                order=self.meta.order,
                direction=self.meta.direction,
                generator=self.directions,
                measure=due,
                heldout=heldout,
                ranks=self.ranks,
            )
        return step.loss, step, num_duplicates(groups)


class _BestWeights:
    """Measurements of a fit, and where there is patience the weights of the best one, on the CPU."""

    def __init__(self, theta: Sequence[nn.Parameter], watch: Watch | None) -> None:
        self.theta, self.watch = theta, watch
        self.best_value, self.since_best = -math.inf, 0
        self.best_step: int | None = None
        self.copy: list[Tensor] = []

    def measured(self, step: int, num_steps: int) -> bool:
        """Measure if it is time to; True if the fit should stop."""
        if self.watch is None or (step % self.watch.every and step != num_steps):
            return False
        value = self.watch.measure(step)
        if not math.isfinite(value):
            where = f"step {step} of {num_steps} of a reward model's fit"
            raise BadNumber("the validation measurement", value, where=where, undo=True)
        if self.watch.patience is None:
            return False
        if value > self.best_value:
            self.best_value, self.best_step, self.since_best = value, step, 0
            self.copy = [_local(p).to("cpu", copy=True) for p in self.theta]
        else:
            self.since_best += 1
        return self.since_best >= self.watch.patience

    def restore(self) -> None:
        """Put the best weights back."""
        if self.copy:
            for parameter, best in zip(self.theta, self.copy, strict=True):
                _local(parameter).copy_(best)


def _local(parameter: nn.Parameter) -> Tensor:
    """The numbers themselves, on this rank, without gradient."""
    found = parameter.detach()
    return found.to_local() if isinstance(found, DTensor) else found
