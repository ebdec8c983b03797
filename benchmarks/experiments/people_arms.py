"""Ways to know a new person: reward features, and rewards that are linear in frozen ones.

Every way is learnt from the raters' labels, then told a held-out person's answers, and says how they like every text.

Letters: T texts, N labels, n answers, m raters, H hidden size, d reward features, Z latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.common import Lab
from benchmarks.experiments.people_data import People
from cluster.seeds import derive
from rm.config import RewardConfig
from rm.feature_fit import Judged, fit_features, spread_root
from rm.feature_start import start_features
from rm.features import FeatureModel
from rm.features_config import FeaturesConfig
from rm.heads import sequence_features
from rm.model import RewardModel
from rm.person import fit_person

Adapt = Callable[[np.ndarray], np.ndarray]
"""[n, 2] answers, the preferred text first -> [T] how the person likes every text."""
ORACLE_PENALTIES = (0.01, 0.1, 1.0)
STEPS, RATE = 400, 0.02
"""Of full-batch Adam on frozen features."""


@dataclass
class Material:
    """What all ways of one seed share.

    Args:
        lab: the world.
        people: raters and held-out users.
        labels: of each rater.
        epochs: of joint fits.
    """

    lab: Lab
    people: People
    labels: int
    epochs: int
    pairs: list[Any] = field(init=False)
    who: list[str] = field(init=False)
    rows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.pairs, self.who, self.rows = self.people.training(self.labels)

    @property
    def raters(self) -> tuple[str, ...]:
        return self.people.names[: self.people.num_raters]

    @property
    def places(self) -> tuple[int, ...]:
        """[N] of each label's rater."""
        place = {name: i for i, name in enumerate(self.raters)}
        return tuple(place[name] for name in self.who)

    @property
    def reward(self) -> RewardConfig:
        return self.lab.config.reward.model_copy(update={"epochs": self.epochs})

    def backbone(self) -> RewardModel:
        """The SFT model under a fresh head."""
        seed = derive(self.people.seed, "head")
        return RewardModel.from_language_model(
            self.lab.files.sft_dir, pooling=self.reward.pooling, seed=seed, dtype=torch.float32, pad_id=self.lab.pad_id
        )

    def hidden(self, model: RewardModel) -> Tensor:
        """[T, H] float64, what the model's head reads of every text."""
        return sequence_features(model, self.people.texts.encoded, 128, self.lab.pad_id).double()


def fit_rfm(material: Material, config: FeaturesConfig) -> FeatureModel:
    """Reward features and the raters' weights on them, learnt together."""
    judged, seed = Judged(material.pairs, material.places), derive(material.people.seed, "order")
    model = start_features(
        material.backbone(), material.raters, judged, config, derive(material.people.seed, "head"), 128, material.lab.pad_id
    )
    fit_features(model, judged, config, material.reward, seed, material.lab.pad_id, lambda step: None)
    return model


def by_features(phi: Tensor, mean: Tensor, l2: float) -> Adapt:
    """<phi, w>, w fitted to the answers.

    Args:
        phi: [T, d] float64.
        mean: [d] weights of the mean rater.
        l2: pull towards them.
    """

    def adapt(answers: np.ndarray) -> np.ndarray:
        return np.asarray(fit_person(differences_of(phi, answers), l2, mean).scores(phi))

    return adapt


def best_weights(phi: Tensor, mean: Tensor) -> Adapt:
    """<phi, w>, w fitted to as many answers as there are, with whichever penalty is right most often on a third kept back.

    Args:
        phi: [T, d] float64.
        mean: [d] weights of the mean rater.
    """

    def adapt(answers: np.ndarray) -> np.ndarray:
        cut = 2 * len(answers) // 3
        kept = differences_of(phi, answers[cut:])
        fits = {l2: fit_person(differences_of(phi, answers[:cut]), l2, mean) for l2 in ORACLE_PENALTIES}
        best = max(fits, key=lambda l2: float((fits[l2].scores(kept) > 0).double().mean()))
        return by_features(phi, mean, best)(answers)

    return adapt


def as_it_is(scores: Tensor) -> Adapt:
    """One reward for all, whatever anybody answers."""
    return lambda answers: scores.numpy()


def in_units(features: Tensor, rows: np.ndarray, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Fixed features in units of the raters' spread, and the mean rater's weights, as ``in_units_of_raters`` for learnt ones.

    Args:
        features: [T, F] float64.
        rows: [N, 2] labels, the preferred text first.
        places: [N] of each label's rater.

    Returns:
        [T, F] and [F].
    """
    spread = features.std(0)
    features = (features - features.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    differences, who = differences_of(features, rows), torch.tensor(places)
    pooled = fit_person(differences, 1.0).weights
    weights = torch.stack([fit_person(differences[who == i], 1.0, pooled).weights for i in range(max(places) + 1)])
    root = spread_root(weights)
    assert root is not None  # no two raters' labels are the same
    return features @ root, torch.linalg.solve_triangular(root, weights.mean(0)[:, None], upper=False)[:, 0]


def linear_features(features: Tensor, rows: np.ndarray, places: Sequence[int], d: int, seed: int) -> Tensor:
    """Reward features that are linear in a frozen model's: P and the raters' weights learnt together, the backbone left alone.

    Args:
        features: [T, F] float64.
        rows: [N, 2] labels, the preferred text first.
        places: [N] of each label's rater.
        d: reward features.
        seed: of their start.

    Returns:
        [T, d].
    """
    torch.manual_seed(seed)
    differences, who = differences_of(features, rows).float(), torch.tensor(places)
    projection = nn.Parameter(torch.randn(d, features.shape[1]) / features.shape[1] ** 0.5)
    weights = nn.Parameter(torch.randn(max(places) + 1, d) / d**0.5)
    descend_on([projection, weights], lambda: -functional.logsigmoid((differences @ projection.T * weights[who]).sum(1)).mean())
    return features @ projection.detach().double().T


def differences_of(values: Tensor, rows: np.ndarray) -> Tensor:
    """[N, ...] of the preferred text - of the other."""
    a, b = torch.tensor(rows.reshape(-1, 2).copy()).T
    return values[a] - values[b]


def descend_on(trained: list[nn.Parameter], loss: Callable[[], Tensor], steps: int = STEPS, rate: float = RATE) -> None:
    """Full-batch Adam."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
