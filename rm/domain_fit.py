"""One stage of customisation: a reward model fitted on scored responses, with imitation and a penalty where they are asked for.

Letters: Q queries of a step, R responses of all its queries, C comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rm.config import RewardConfig
from rm.descent import adamw, check_weights, descend, within
from rm.domain_config import GeneralStageConfig
from rm.imitation import Imitated, LanguageHead, imitation_loss
from rm.model import RewardModel
from rm.penalties import QuadraticPenalty
from rm.ranked import response_sequences
from rm.ranking import comparisons, ranking_accuracy, ranking_loss
from rm.resume import put_back, weights_and_moments
from rm.training import learning_rate_factor
from tokens.errors import UserError
from tokens.guards import ONLY_FINITE, BadNumber, Budget, GuardsConfig
from tokens.queries import Query
from tokens.records import SequenceBatch
from tokens.saved_state import SavedState, latest_state, save_state

ADVICE = "the stage's learning rate"
"""What to lower where numbers go wrong."""


@dataclass(frozen=True)
class Imitation:
    """The imitation loss of a stage.

    Args:
        head: of the model.
        coef: its weight, > 0.
        imitated: tokens that count.
    """

    head: LanguageHead
    coef: float
    imitated: Imitated


@dataclass(frozen=True)
class StageStep:
    """One optimizer step.

    Args:
        samples: queries seen so far.
        loss: what is descended.
        ranking: nats per comparison.
        imitation: nats per token; None without imitation or a preferred response.
        penalty: 0 without one.
        accuracy: share of the step's comparisons ranked as scored, before the update.
        lr: learning rate.
        gradient_norm: before clipping.
    """

    samples: int
    loss: float
    ranking: float
    imitation: float | None
    penalty: float
    accuracy: float
    lr: float
    gradient_norm: float


@dataclass(frozen=True)
class Saving:
    """Where a fit keeps its state, so that it can go on after its process has died.

    Args:
        folder: of the states; made if needed.
        fit: what it is a state of; one of another fit is refused.
        more: what the caller wants kept with a state, fit for JSON: its measurements.
        back: given what was kept, where a fit goes on.
    """

    folder: Path
    fit: str
    more: Callable[[], Any]
    back: Callable[[Any], None]


def fit_stage(
    model: RewardModel,
    queries: Sequence[Query],
    stage: GeneralStageConfig,
    reward: RewardConfig,
    seed: int,
    pad_id: int,
    every: int,
    look: Callable[[int], None],
    on_step: Callable[[StageStep], None],
    imitation: Imitation | None = None,
    penalty: QuadraticPenalty | None = None,
    saving: Saving | None = None,
    guards: GuardsConfig = ONLY_FINITE,
) -> int:
    """Train ``model`` in place on scored responses.

        L = L_rank + coef * L_LM + penalty

    AdamW; the learning rate rises over the warm-up and then falls linearly. A step's gradient is added up over parts of at most
    ``reward.microbatch_size`` sequences, whole queries each. ``look`` is called before the first step, whenever another ``every``
    queries have been seen, and after the last step; its measurements are also where the state is saved.

    With ``saving`` a fit goes on from the newest checkpoint there: weights, optimizer and place in the data are as they were, so
    that the end is the same bit for bit. ``look`` is then not called again for what was measured before.

    Source: Everyone Deserves A Reward (2309.03126), its loss and its two fine-tuning stages.

    Args:
        model: on its device.
        queries: each with a comparison.
        stage: learning rate, batch, epochs.
        reward: AdamW's settings, clipping, microbatches.
        seed: of the order of the queries.
        pad_id: id written at padding.
        every: queries between two measurements, >= 1.
        look: measures; called with the number of queries seen.
        on_step: called after each step.
        imitation: None = without.
        penalty: None = without.
        saving: None = the fit is not saved.
        guards: how many steps whose loss or gradient is not finite may be left out. Such a step changes no weight, and its
            queries are not learned from.

    Returns:
        The queries seen before this call: 0, or those of the checkpoint.

    Raises:
        ValueError: if there is no query, or one has no comparison.
        UserError: if the checkpoint is of another fit.
        BadNumber: if too many losses or gradients are not finite, or a weight is not; names the step.
    """
    if not queries or not all(query.comparisons for query in queries):
        raise ValueError(f"a stage needs queries with a comparison each, got {len(queries)} queries")
    fit = _Fit(model, stage, reward, pad_id, imitation, penalty, len(queries), seed)
    budget = Budget.of(guards)
    began = _restore(fit, budget, saving)
    total = stage.epochs * len(queries)
    if began == 0:
        look(0)
    for batch in _batches(queries, stage.batch_size, stage.epochs, seed):
        if fit.skip(batch):
            continue
        before = fit.samples
        step = fit.step(batch, budget)
        if step is not None:
            on_step(step)
        if fit.samples // every > before // every or fit.samples == total:
            look(fit.samples)
            if saving is not None:
                _save(fit, budget, saving)
    fit.check()
    if budget.count == fit.num_steps:
        raise BadNumber("the number of steps with a finite gradient", 0, "1 or more", f"the end of a stage of {fit.num_steps}")
    return began


class _Fit:
    """Model and optimizer of one stage."""

    def __init__(
        self,
        model: RewardModel,
        stage: GeneralStageConfig,
        reward: RewardConfig,
        pad_id: int,
        imitation: Imitation | None,
        penalty: QuadraticPenalty | None,
        num_queries: int,
        seed: int,
    ) -> None:
        self.model, self.reward, self.pad_id, self.imitation, self.penalty = model, reward, pad_id, imitation, penalty
        self.stage, self.about = stage, f"{num_queries} queries, seed {seed}, {stage.model_dump_json()}"
        self.num_steps = stage.epochs * math.ceil(num_queries / stage.batch_size)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if imitation is not None:
            named |= {f"lm_head.{name}": p for name, p in imitation.head.named_parameters() if p.requires_grad}
        self.named: dict[str, nn.Parameter] = named
        self.trained = list(named.values())
        self.optimizer = adamw(self.trained, stage.lr, reward)
        self.done, self.samples, self._passed = 0, 0, 0

    def skip(self, batch: Sequence[Query]) -> bool:
        """Whether a batch was learned from before the checkpoint; to be asked of every batch in order."""
        if self._passed < self.samples:
            self._passed += len(batch)
            return True
        return False

    def step(self, batch: Sequence[Query], budget: Budget) -> StageStep | None:
        """One optimizer step; None where a number went wrong before anything was changed, and the batch was left out."""
        self.done, self.samples, self._passed = self.done + 1, self.samples + len(batch), self._passed + len(batch)
        where = f"step {self.done} of {self.num_steps} of a stage, first query {batch[0].id!r}"
        return within(budget, lambda: self._step(batch), self.optimizer, self.trained, where, ADVICE)

    def check(self) -> None:
        """Weights that are kept are finite."""
        check_weights(self.trained, f"step {self.done} of {self.num_steps} of a stage", ADVICE)

    def _step(self, batch: Sequence[Query]) -> StageStep:
        compared = sum(len(query.comparisons) for query in batch)
        imitated = sum(len(query.preferred) for query in batch) if self.imitation is not None else 0
        ranking, accuracy, language = 0.0, 0.0, 0.0
        for part in self._parts(batch):
            losses = self._losses(part, compared, imitated)
            torch.autograd.backward(losses.total)
            ranking, accuracy = ranking + losses.ranking, accuracy + losses.accuracy
            language += losses.imitation
        penalty = 0.0
        if self.penalty is not None:
            pull = self.penalty()
            torch.autograd.backward(pull)
            penalty = float(pull.detach())
        weight = 0.0 if self.imitation is None else self.imitation.coef
        loss = ranking + weight * language + penalty
        if not math.isfinite(loss):
            raise BadNumber("the loss", loss)
        lr = self.stage.lr * learning_rate_factor(self.done - 1, self.num_steps, self.stage.warmup_ratio)
        norm = descend(self.optimizer, self.trained, self.reward.max_grad_norm, lr, "loss")
        return StageStep(self.samples, loss, ranking, language if imitated else None, penalty, accuracy, lr, norm)

    def _losses(self, part: Sequence[Query], compared: int, imitated: int) -> _Losses:
        sequences = response_sequences(part)
        batch = SequenceBatch.from_ids([prompt for prompt, _ in sequences], [response for _, response in sequences], self.pad_id)
        batch = batch.to(next(self.model.parameters()).device)
        index = comparisons(part)
        if self.imitation is None or not imitated:
            scores: Tensor = self.model(batch)
            total = ranking = ranking_loss(scores, index, compared)
            language = torch.zeros(())
        else:
            scores, hidden, batch = self.model.states(batch)
            total = ranking = ranking_loss(scores, index, compared)
            language = self._imitate(part, hidden, batch, imitated, self.imitation)
            total = total + self.imitation.coef * language
        accuracy = float(ranking_accuracy(scores, index)) * index.shape[1] / compared
        return _Losses(total, float(ranking.detach()), float(language.detach()), accuracy)

    def _imitate(
        self, part: Sequence[Query], hidden: Tensor, batch: SequenceBatch, denominator: int, imitation: Imitation
    ) -> Tensor:
        rows, first = [], 0
        for query in part:
            rows += [first + index for index in query.preferred]
            first += len(query.responses)
        if not rows:
            return torch.zeros((), device=hidden.device)
        index = torch.tensor(rows, device=hidden.device)
        own = batch.rows(index)  # without the columns that only the others need
        states = hidden[index, : own.input_ids.shape[1]]
        return imitation_loss(states, own, imitation.head, imitation.imitated, denominator)

    def _parts(self, batch: Sequence[Query]) -> Iterator[list[Query]]:
        """Whole queries of at most ``microbatch_size`` sequences, like lengths together; a larger query is alone."""
        part: list[Query] = []
        size = 0
        for query in sorted(batch, key=lambda query: len(query.prompt_ids) + max(map(len, query.responses))):
            if part and size + len(query.responses) > self.reward.microbatch_size:
                yield part
                part, size = [], 0
            part.append(query)
            size += len(query.responses)
        yield part


@dataclass(frozen=True)
class _Losses:
    """Of one part of a step: what is differentiated, and its numbers."""

    total: Tensor
    ranking: float
    imitation: float
    accuracy: float


def _batches(queries: Sequence[Query], size: int, epochs: int, seed: int) -> Iterator[list[Query]]:
    """Every query once an epoch, ``size`` at a time, in an order that the seed decides; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(queries), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [queries[i] for i in order[start : start + size]]


def _save(fit: _Fit, budget: Budget, saving: Saving) -> None:
    """Write weights, AdamW's moments, the place in the data, and what the caller wants kept."""
    fit.check()  # what is saved is gone on from
    values = {
        "samples": fit.samples, "done": fit.done, "budget": [budget.row, budget.count],
        "about": fit.about, "fit": saving.fit, "more": saving.more(),
    }  # fmt: skip
    save_state(saving.folder, fit.samples, SavedState(weights_and_moments(fit.named, fit.optimizer), values))


def _restore(fit: _Fit, budget: Budget, saving: Saving | None) -> int:
    """Put the newest state back, if there is one; the queries seen before it."""
    state = None if saving is None else latest_state(saving.folder)
    if saving is None or state is None:
        return 0
    tensors, values = state.tensors, state.values
    names = {key.removeprefix("weights/") for key in tensors if key.startswith("weights/")}
    if (values["about"], values["fit"]) != (fit.about, saving.fit) or names != fit.named.keys():
        raise UserError(
            f"the checkpoint in {saving.folder} is of another fit (there: {values['about']}, settings {values['fit'][:8]}; here: "
            f"{fit.about}, settings {saving.fit[:8]}). Remove it to begin the stage again"
        )
    put_back(fit.named, fit.optimizer, tensors)
    fit.samples, fit.done = int(values["samples"]), int(values["done"])
    budget.row, budget.count = values["budget"]
    saving.back(values["more"])
    return fit.samples
