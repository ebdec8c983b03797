"""Reward features and all raters' weights on them, learnt together.

    L = sum_i a_i -log sigma(<phi(x_i, chosen_i) - phi(x_i, rejected_i), w_h(i)>)

a_i = 1 / N where every label counts alike, 1 / (m n_h(i)) where every rater does.

Letters: N labels, m raters, n_h labels of rater h, d reward features, B labels of a step, S distinct sequences of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from rm.batches import Encoded, features_of
from rm.config import RewardConfig
from rm.descent import check_weights, descend, within
from rm.features import FeatureModel
from rm.features_config import FeaturesConfig
from rm.resume import Saves, put_back, weights_and_moments
from rm.training import learning_rate_factor
from tokens.guards import ONLY_FINITE, BadNumber, Budget, GuardsConfig
from tokens.records import Pair
from tokens.saved_state import SavedState

ADVICE = "features.lr or reward.lr"
"""What to lower where numbers go wrong."""


@dataclass(frozen=True)
class Judged:
    """Labels, each with who gave it.

    Args:
        pairs: N, ``chosen`` as that rater said; several raters may have judged one pair.
        raters: N places among the model's raters.

    Raises:
        ValueError: if there are not as many raters as pairs, or none.
    """

    pairs: Sequence[Pair]
    raters: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.raters or len(self.pairs) != len(self.raters):
            raise ValueError(f"need as many raters as pairs and at least one, got {len(self.raters)} and {len(self.pairs)}")


@dataclass(frozen=True)
class FeatureStep:
    """One optimizer step.

    Args:
        labels: seen so far.
        loss: nats per label, as ``average`` weighs them.
        accuracy: share of the step's labels ranked as given, before the update.
        lr: learning rate of projection and weights.
        gradient_norm: before clipping.
    """

    labels: int
    loss: float
    accuracy: float
    lr: float
    gradient_norm: float

    def as_dict(self) -> dict[str, float]:
        """The step as a row of metrics."""
        return {
            "features/labels": float(self.labels),
            "features/loss": self.loss,
            "features/accuracy": self.accuracy,
            "features/lr": self.lr,
            "features/gradient_norm": self.gradient_norm,
        }


def label_weights(raters: Sequence[int], average: str) -> Tensor:
    """How much each label counts, with mean 1: N a_i.

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338): its empirical risk is the mean over
    examples; the mean over raters is ours.

    Args:
        raters: N places of who gave each.
        average: "examples" or "raters".

    Returns:
        [N] float32.
    """
    if average == "examples":
        return torch.ones(len(raters))
    index = torch.tensor(raters)
    counts = torch.bincount(index)
    return len(raters) / (int((counts > 0).sum()) * counts[index].float())


def feature_loss(differences: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of labels under their raters' rewards.

    L = (1/B) sum_i c_i -log sigma(<D_i, w_h(i)>)

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338).

    Args:
        differences: [B, d] float, phi of the preferred response - phi of the other.
        weights: [B, d] float, of each label's rater.
        counts: [B] float, how much each counts.

    Returns:
        A scalar, nats per label.
    """
    return -(counts * functional.logsigmoid((differences * weights).sum(-1))).mean()


def fit_features(
    model: FeatureModel,
    judged: Judged,
    features: FeaturesConfig,
    reward: RewardConfig,
    seed: int,
    pad_id: int,
    on_step: Callable[[FeatureStep], None],
    guards: GuardsConfig = ONLY_FINITE,
    saves: Saves | None = None,
) -> None:
    """Train phi and the raters' weights in place; a backbone whose parameters take no gradient stays as it is.

    AdamW with two learning rates: ``reward.lr`` for the backbone, ``features.lr`` for projection and weights. Both rise over the
    warm-up and then fall linearly. At the end the features are in units of the raters, see ``in_units_of_raters``.

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338).

    Args:
        model: on its device, as ``rm.feature_start.start_features`` made it.
        judged: labels of the model's raters.
        features: loss, learning rate and weight decay of projection and weights.
        reward: of the backbone: learning rate, AdamW's settings; of both: batch, epochs, clipping, microbatches.
        seed: of the order of the labels.
        pad_id: id written at padding.
        on_step: called after each step; of a fit that goes on, first with the steps that were taken before.
        guards: how many steps whose loss or gradient is not finite may be left out.
        saves: saving how far the fit has come, and going on from there to the same bits: ``model`` is then as it was at the
            beginning.

    Raises:
        ValueError: if a label is of a rater that the model has not.
        BadNumber: if too many losses or gradients are not finite, or a weight is not; names the step.
    """
    if max(judged.raters) >= len(model.raters):
        raise ValueError(f"a label is of rater {max(judged.raters)}, the model has {len(model.raters)}")
    fit = _Fit(model, judged, features, reward, pad_id)
    budget = Budget.of(guards)
    if saves is not None and saves.begin is not None:
        fit.resume(saves.begin, budget)
        for step in fit.steps:
            on_step(step)
    for rows in islice(_batches(judged.pairs, reward.batch_size, reward.epochs, seed), fit.done, None):
        taken = fit.step(rows, budget)
        if taken is not None:
            on_step(taken)
        if saves is not None and fit.done % saves.every == 0 and fit.done < fit.num_steps:
            fit.check()
            saves.write(fit.done, fit.state(budget))
    fit.check()
    if not model.shared:
        in_units_of_raters(model)


class _Fit:
    """Model and optimizer of one fit."""

    def __init__(self, model: FeatureModel, judged: Judged, features: FeaturesConfig, reward: RewardConfig, pad_id: int) -> None:
        self.model, self.judged, self.features, self.reward, self.pad_id = model, judged, features, reward, pad_id
        self.counts = label_weights(judged.raters, features.average)
        model.backbone.head.requires_grad_(False)  # it has no part in phi
        model.weights.requires_grad_(not model.shared)
        backbone = [p for p in model.backbone.parameters() if p.requires_grad]
        own = [p for p in (model.projection, model.weights) if p.requires_grad]
        self.trained: list[nn.Parameter] = [*backbone, *own]
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.lrs = [*([reward.lr] if backbone else []), features.lr]
        groups = [{"params": backbone, "weight_decay": reward.weight_decay}] if backbone else []
        self.optimizer = torch.optim.AdamW(
            [*groups, {"params": own, "weight_decay": features.weight_decay}],
            lr=features.lr,
            betas=(reward.beta1, reward.beta2),
            eps=reward.eps,
        )
        self.num_steps = reward.epochs * math.ceil(len(judged.raters) / reward.batch_size)
        self.done, self.labels = 0, 0
        self.steps: list[FeatureStep] = []

    def step(self, rows: Sequence[int], budget: Budget) -> FeatureStep | None:
        """One optimizer step; None where a number went wrong before anything was changed, and the batch was left out."""
        self.done, self.labels = self.done + 1, self.labels + len(rows)
        where = f"step {self.done} of {self.num_steps} of the features' fit, first pair {self.judged.pairs[rows[0]].id!r}"
        step = within(budget, lambda: self._step(rows), self.optimizer, self.trained, where, ADVICE)
        if step is not None:
            self.steps.append(step)
        return step

    def state(self, budget: Budget) -> SavedState:
        """All that moves; the order of the labels follows from the seed and the number of steps behind the fit."""
        values = {"done": self.done, "labels": self.labels, "budget": [budget.row, budget.count]}
        steps = [astuple(step) for step in self.steps]
        return SavedState(weights_and_moments(self.named, self.optimizer), values | {"steps": steps})

    def resume(self, saved: SavedState, budget: Budget) -> None:
        """Be where a state says; the model must be as it was at the beginning of the fit."""
        put_back(self.named, self.optimizer, saved.tensors)
        self.done, self.labels = saved.values["done"], saved.values["labels"]
        budget.row, budget.count = saved.values["budget"]
        self.steps = [FeatureStep(*numbers) for numbers in saved.values["steps"]]

    def check(self) -> None:
        """Weights that are kept are finite."""
        check_weights(self.trained, f"step {self.done} of {self.num_steps} of the features' fit", ADVICE)

    def _step(self, rows: Sequence[int]) -> FeatureStep:
        device = self.model.projection.device
        differences = self._differences([self.judged.pairs[row] for row in rows])
        weights = self.model.weights[torch.tensor([self.judged.raters[row] for row in rows], device=device)]
        loss = feature_loss(differences, weights, self.counts[torch.tensor(rows)].to(device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise BadNumber("the loss", value)
        torch.autograd.backward(loss)
        right = (differences.detach() * weights.detach()).sum(-1) > 0
        factor = learning_rate_factor(self.done - 1, self.num_steps, self.reward.warmup_ratio)
        norm = descend(self.optimizer, self.trained, self.reward.max_grad_norm, [lr * factor for lr in self.lrs], "loss")
        return FeatureStep(self.labels, value, float(right.float().mean()), self.features.lr * factor, norm)

    def _differences(self, pairs: Sequence[Pair]) -> Tensor:
        """[B, d] with gradient; a sequence that several labels speak of is computed once."""
        place: dict[Encoded, int] = {}
        sides = [
            [place.setdefault((pair.prompt_ids, ids), len(place)) for ids in (pair.chosen_ids, pair.rejected_ids)]
            for pair in pairs
        ]
        hidden = features_of(self.model.backbone, list(place), self.pad_id, self.reward.microbatch_size, self.reward.packing)
        phi = self.model.project(hidden)  # [S, d]
        chosen, rejected = torch.tensor(sides, device=phi.device).T
        return phi[chosen] - phi[rejected]


@torch.no_grad()
def in_units_of_raters(model: FeatureModel, floor: float = 1e-3) -> None:
    """Choose among all equal ways to write the model the one in which the raters' weights have covariance I.

    phi -> L^T phi and w -> L^-1 w with L L^T = Cov(w) + floor * trace(Cov(w)) / d * I leave every reward as it is. The prior
    N(mean rater, I / l2) of ``rm.person`` then says: a person differs from the mean as the raters do, in every direction.

    Source: empirical Bayes, for a model that is known up to an invertible map.

    Args:
        model: changed in place; with one rater, or raters who are all alike, it stays as it is.
        floor: keeps directions in which the raters are alike from being divided by 0.
    """
    weights = model.weights.double()
    root = spread_root(weights, floor)
    if root is None:
        return
    model.projection.copy_(root.T @ model.projection.double())
    model.weights.copy_(torch.linalg.solve_triangular(root, weights.T, upper=False).T)


def spread_root(weights: Tensor, floor: float = 1e-3) -> Tensor | None:
    """L with L L^T = Cov(w) + floor * trace(Cov(w)) / d * I, the unit of how raters differ.

    Source: as ``in_units_of_raters``.

    Args:
        weights: [m, d] float64, the raters'.
        floor: keeps directions in which the raters are alike from being divided by 0.

    Returns:
        [d, d] lower triangular; None where all raters are alike.
    """
    centred = weights - weights.mean(0)
    covariance = centred.T @ centred / len(weights)
    size = float(covariance.trace()) / len(covariance)
    if not size > 0:
        return None
    root: Tensor = torch.linalg.cholesky(
        covariance + floor * size * torch.eye(len(covariance), dtype=torch.float64, device=weights.device)
    )
    return root


def _batches(pairs: Sequence[Pair], size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Every label once an epoch, ``size`` at a time, in an order that the seed decides; an epoch's last batch may be smaller.

    Labels of one pair come one after another, so that its two sequences are computed once for all of them.
    """
    place: dict[frozenset[Encoded], int] = {}
    of = torch.tensor([place.setdefault(pair_key(pair), len(place)) for pair in pairs])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        turn = torch.randperm(len(place), generator=generator)
        yield from (rows.tolist() for rows in turn[of].argsort(stable=True).split(size))


def pair_key(pair: Pair) -> frozenset[Encoded]:
    """What two labels of one pair share, whichever response was preferred."""
    return frozenset({(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)})
