"""Ways to know a new person: reward features, and what else there is.

Every way is learnt from the raters' labels, then told a held-out person's answers, and says how they like every text.

Letters: T texts, N labels, n answers, m raters, H hidden size, d reward features, Z latent size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.common import Lab
from benchmarks.experiments.people_data import People
from cluster.seeds import derive
from rm.batches import Encoded, features_of
from rm.config import RewardConfig
from rm.descent import adamw, descend
from rm.feature_fit import Judged, fit_features
from rm.feature_start import start_features
from rm.features import FeatureModel
from rm.features_config import FeaturesConfig
from rm.heads import sequence_features
from rm.model import RewardModel
from rm.person import fit_person
from rm.training import learning_rate_factor

Adapt = Callable[[np.ndarray], np.ndarray]
"""[n, 2] answers, the preferred text first -> [T] how the person likes every text."""
LATENT = 16
"""Z of the user-conditioned model and of the latent user."""
BASIS = 8
"""Rewards that LoRe mixes."""
STEPS, RATE = 400, 0.02
"""Of full-batch Adam on frozen features."""
KL_WEIGHT = 3e-6
"""Of the latent user, VPL's."""
OWN_STEPS, OWN_RATE = 30, 5e-3
"""Of a person's own fine-tuning."""


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
        return np.asarray(fit_person(_differences(phi, answers), l2, mean).scores(phi))

    return adapt


def as_it_is(scores: Tensor) -> Adapt:
    """One reward for all, whatever anybody answers."""
    return lambda answers: scores.numpy()


def lore(material: Material, hidden: Tensor) -> Adapt:
    """A convex mixture of rewards that are linear in a frozen model's features; a person is their mixture.

    Source: LoRe (2504.14439), as far as it is known here: rows of W on the simplex, a low-rank basis.
    """
    torch.manual_seed(derive(material.people.seed, "lore"))
    scale = hidden.std(0)
    rows = _differences(hidden / scale, material.rows)  # [N, H]
    basis = nn.Parameter(torch.randn(BASIS, hidden.shape[1], dtype=torch.float64) / hidden.shape[1] ** 0.5)
    logits = nn.Parameter(0.1 * torch.randn(len(material.raters), BASIS, dtype=torch.float64))
    places = torch.tensor(material.places)
    _descend([basis, logits], lambda: -functional.logsigmoid(((rows @ basis.T) * logits.softmax(1)[places]).sum(1)).mean())
    rewards = (hidden / scale @ basis.T).detach()  # [T, BASIS]
    prior = logits.detach().softmax(1).mean(0).log()

    def adapt(answers: np.ndarray) -> np.ndarray:
        own = _differences(rewards, answers)
        return np.asarray(rewards @ _least(lambda z: -functional.logsigmoid(own @ z.softmax(0)).sum(), prior, 0.1).softmax(0))

    return adapt


def own_mlp(material: Material, hidden: Tensor) -> Adapt:
    """A small network on a frozen model's features, fitted to all raters and then fine-tuned on a person's answers alone.

    Source: per-person fine-tuning, as Park et al. 2024 (2405.00254) are read.
    """
    torch.manual_seed(derive(material.people.seed, "mlp"))
    scaled = (hidden - hidden.mean(0)) / hidden.std(0)
    network = nn.Sequential(nn.Linear(hidden.shape[1], 64), nn.Tanh(), nn.Linear(64, 1)).double()
    chosen, rejected = torch.tensor(material.rows).T

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return -functional.logsigmoid(network(scaled[a]) - network(scaled[b])).mean()

    _descend(list(network.parameters()), lambda: loss(chosen, rejected), 150, 5e-3)
    kept = {name: value.clone() for name, value in network.state_dict().items()}

    def adapt(answers: np.ndarray) -> np.ndarray:
        network.load_state_dict(kept)
        if len(answers):
            a, b = torch.tensor(answers.copy()).T
            _descend(list(network.parameters()), lambda: loss(a, b), OWN_STEPS, OWN_RATE)
        with torch.no_grad():
            return network(scaled)[:, 0].numpy()

    return adapt


class _Conditioned(nn.Module):
    """Score of what a backbone reads beside a user's vector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(hidden + LATENT, 64), nn.Linear(64, 1)

    def forward(self, features: Tensor, user: Tensor) -> Tensor:
        both = torch.cat([features, user.to(features.dtype).expand(*features.shape[:-1], LATENT)], -1)
        found: Tensor = self.last(torch.tanh(self.first(both))).squeeze(-1)
        return found


def conditioned(material: Material) -> Adapt:
    """A reward model that is told a vector of each rater; of a new person the vector alone is fitted."""
    torch.manual_seed(derive(material.people.seed, "conditioned"))
    model, network = material.backbone(), None
    network = _Conditioned(model.head.in_features)
    users = nn.Parameter(0.3 * torch.randn(len(material.raters), LATENT))
    places = torch.tensor(material.places)

    def loss(rows: Sequence[int]) -> Tensor:
        features, sides = _with_gradient(material, model, rows)
        own = users[places[list(rows)]]
        return -functional.logsigmoid(network(features[sides[0]], own) - network(features[sides[1]], own)).mean()

    _fit_jointly(material, model, [*network.parameters(), users], loss)
    hidden, network = material.hidden(model), network.double()
    known = users.detach().double()
    prior, weight = known.mean(0), 1 / float(known.var(0).mean())

    def adapt(answers: np.ndarray) -> np.ndarray:
        a, b = torch.tensor(answers.reshape(-1, 2).copy()).T
        user = _least(lambda z: -functional.logsigmoid(network(hidden[a], z) - network(hidden[b], z)).sum(), prior, weight)
        with torch.no_grad():
            return network(hidden, user).numpy()

    return adapt


def latent(material: Material, frozen: Tensor) -> Adapt:
    """A latent user, read from a few of their answers by an encoder that is trained with the reward model.

    Source: VPL (2408.10075), as far as it is known here: mean and log-variance in [-1, 1], the KL's small weight.

    Args:
        material: of the seed.
        frozen: [T, H] of a reward model for all: what the encoder reads.
    """
    torch.manual_seed(derive(material.people.seed, "latent"))
    model = material.backbone()
    frozen = ((frozen - frozen.mean(0)) / frozen.std(0)).float()
    network = _Conditioned(model.head.in_features)
    encoder = nn.Sequential(nn.Linear(2 * frozen.shape[1], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    out = nn.Linear(64, 2 * LATENT)
    rng = random.Random(derive(material.people.seed, "contexts"))
    of = [np.flatnonzero(np.array(material.places) == place) for place in range(len(material.raters))]

    def encode(answers: np.ndarray) -> tuple[Tensor, Tensor]:
        if not len(answers):
            return torch.zeros(LATENT), torch.zeros(LATENT)
        a, b = torch.tensor(answers.copy()).T
        mean, log_variance = out(encoder(torch.cat([frozen[a], frozen[b]], -1)).mean(0)).chunk(2)
        return mean.clamp(-1, 1), log_variance.clamp(-1, 1)

    def loss(rows: Sequence[int]) -> Tensor:
        features, sides = _with_gradient(material, model, rows)
        users, divergence = [], torch.zeros(())
        for row in rows:
            others = [i for i in of[material.places[row]].tolist() if i != row]
            context = rng.sample(others, min(len(others), rng.choice([0, 3, 10, 30, 49])))
            mean, log_variance = encode(material.rows[context])
            users.append(mean + (0.5 * log_variance).exp() * torch.randn(LATENT))
            divergence = divergence + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(rows)
        own = torch.stack(users)
        fitted = -functional.logsigmoid(network(features[sides[0]], own) - network(features[sides[1]], own)).mean()
        return fitted + KL_WEIGHT * divergence

    _fit_jointly(material, model, [*network.parameters(), *encoder.parameters(), *out.parameters()], loss)
    hidden = material.hidden(model).float()

    def adapt(answers: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(hidden, encode(answers)[0]).double().numpy()

    return adapt


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
    differences, who = _differences(features, rows), torch.tensor(places)
    pooled = fit_person(differences, 1.0).weights
    weights = torch.stack([fit_person(differences[who == i], 1.0, pooled).weights for i in range(max(places) + 1)])
    centred = weights - weights.mean(0)
    covariance = centred.T @ centred / len(weights)
    floor = 1e-3 * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
    root = torch.linalg.cholesky(covariance + floor)
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
    differences, who = _differences(features, rows).float(), torch.tensor(places)
    projection = nn.Parameter(torch.randn(d, features.shape[1]) / features.shape[1] ** 0.5)
    weights = nn.Parameter(torch.randn(max(places) + 1, d) / d**0.5)
    _descend([projection, weights], lambda: -functional.logsigmoid((differences @ projection.T * weights[who]).sum(1)).mean())
    return features @ projection.detach().double().T


def _differences(values: Tensor, rows: np.ndarray) -> Tensor:
    """[N, ...] of the preferred text - of the other."""
    a, b = torch.tensor(rows.reshape(-1, 2).copy()).T
    return values[a] - values[b]


def _with_gradient(material: Material, model: RewardModel, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Features [S, H] of the texts of some labels, and [2, B] which of them are chosen and rejected."""
    texts, inverse = np.unique(material.rows[list(rows)], return_inverse=True)
    sequences: list[Encoded] = [material.people.texts.encoded[i] for i in texts]
    features = features_of(model, sequences, material.lab.pad_id, material.reward.microbatch_size)
    return features, torch.tensor(inverse.reshape(-1, 2)).T


def _fit_jointly(
    material: Material, model: RewardModel, own: list[nn.Parameter], loss: Callable[[Sequence[int]], Tensor]
) -> None:
    """AdamW on a backbone and what stands on it, as a reward model is fitted."""
    reward, number = material.reward, len(material.rows)
    model.head.requires_grad_(False)
    trained = [*(p for p in model.parameters() if p.requires_grad), *own]
    optimizer = adamw(trained, reward.lr, reward)
    generator = torch.Generator().manual_seed(derive(material.people.seed, "order"))
    batches = [b.tolist() for _ in range(reward.epochs) for b in torch.randperm(number, generator=generator).split(32)]
    for step, rows in enumerate(batches):
        torch.autograd.backward(loss(rows))
        lr = reward.lr * learning_rate_factor(step, len(batches), reward.warmup_ratio)
        descend(optimizer, trained, reward.max_grad_norm, [lr], "loss")


def _descend(trained: list[nn.Parameter], loss: Callable[[], Tensor], steps: int = STEPS, rate: float = RATE) -> None:
    """Full-batch Adam."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()


def _least(loss: Callable[[Tensor], Tensor], prior: Tensor, weight: float) -> Tensor:
    """The vector that makes loss + weight / 2 |z - prior|^2 least, by L-BFGS."""

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(z, requires_grad=True)
        total = loss(point) + 0.5 * weight * (point - prior).square().sum()
        (gradient,) = torch.autograd.grad(total, point)
        return float(total.detach()), gradient.numpy()

    return torch.tensor(minimize(value, prior.numpy(), jac=True, method="L-BFGS-B").x)
