"""Other ways to know a new person, to compare reward features with: models that are told a user, or tuned to one.

None of them is tuned beyond what its source says: they are as far as they could be built here.

Letters: T texts, N labels, n answers, m raters, H hidden size, B labels of a step, Z latent size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.people_arms import Adapt, Material, descend_on, differences_of
from cluster.seeds import derive
from rm.batches import Encoded, features_of
from rm.descent import adamw, descend
from rm.model import RewardModel
from rm.training import learning_rate_factor

LATENT = 16
"""Z of the user-conditioned model and of the latent user."""
BASIS = 8
"""Rewards that LoRe mixes."""
KL_WEIGHT = 3e-6
"""Of the latent user, VPL's."""
OWN_STEPS, OWN_RATE = 30, 5e-3
"""Of a person's own fine-tuning."""


def lore(material: Material, hidden: Tensor) -> Adapt:
    """A convex mixture of rewards that are linear in a frozen model's features; a person is their mixture.

    Source: LoRe (2504.14439), as far as it is known here: rows of W on the simplex, a low-rank basis.
    """
    torch.manual_seed(derive(material.people.seed, "lore"))
    scale = hidden.std(0)
    rows = differences_of(hidden / scale, material.rows)  # [N, H]
    basis = nn.Parameter(torch.randn(BASIS, hidden.shape[1], dtype=torch.float64) / hidden.shape[1] ** 0.5)
    logits = nn.Parameter(0.1 * torch.randn(len(material.raters), BASIS, dtype=torch.float64))
    places = torch.tensor(material.places)
    descend_on([basis, logits], lambda: -functional.logsigmoid(((rows @ basis.T) * logits.softmax(1)[places]).sum(1)).mean())
    rewards = (hidden / scale @ basis.T).detach()  # [T, BASIS]
    prior = logits.detach().softmax(1).mean(0).log()

    def adapt(answers: np.ndarray) -> np.ndarray:
        own = differences_of(rewards, answers)
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

    descend_on(list(network.parameters()), lambda: loss(chosen, rejected), 150, 5e-3)
    kept = {name: value.clone() for name, value in network.state_dict().items()}

    def adapt(answers: np.ndarray) -> np.ndarray:
        network.load_state_dict(kept)
        if len(answers):
            a, b = torch.tensor(answers.copy()).T
            descend_on(list(network.parameters()), lambda: loss(a, b), OWN_STEPS, OWN_RATE)
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
    model = material.backbone()
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


def _least(loss: Callable[[Tensor], Tensor], prior: Tensor, weight: float) -> Tensor:
    """The vector that makes loss + weight / 2 |z - prior|^2 least, by L-BFGS."""

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(z, requires_grad=True)
        total = loss(point) + 0.5 * weight * (point - prior).square().sum()
        (gradient,) = torch.autograd.grad(total, point)
        return float(total.detach()), gradient.numpy()

    return torch.tensor(minimize(value, prior.numpy(), jac=True, method="L-BFGS-B").x)
