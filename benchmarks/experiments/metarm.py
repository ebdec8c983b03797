"""Does MetaRM do what it says? Algorithm 1 and its neighbours against a vanilla reward model, seed by seed.

    python -m benchmarks.experiments.metarm [--part reward|ppo|sweep] [--seeds 1 2 ...] [--workers 2] [--quick] [--tables]

Every arm sees the same pairs in the same order, from the same head, for the same steps; only S_k and what is done with it differ.
Outcomes are measured on other prompts, on samples of the policy that S_k came from. Rows go to
benchmarks/results/metarm.jsonl, and what is there is not computed again; ``--tables`` prints paired differences to vanilla
with 95% t-intervals over the seeds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.common import (
    RECIPE,
    KnownPair,
    Lab,
    clean_scores,
    drawn,
    fit,
    open_lab,
    relabelled,
)
from benchmarks.experiments.shifted import Samples, language_model, measure, optimise, sample, shifted_samples
from cluster.seeds import derive
from rm.batches import score_sequences, scores_of
from rm.config import MetaConfig
from rm.losses import difference_loss
from rm.model import RewardModel
from rm.spread import scale_free_spread

NUM_PAIRS, POOL = 3000, 4000
"""Pairs that a seed trains on, and how many it draws them from; the rest shifted the policies."""
WIDE = 0.2
"""Pairs of responses whose gold differs by more than this, in s.d., are counted apart."""
K = 5
"""Responses per prompt in S_k, as in the paper; J is always given for this k, whatever k it was trained with."""
PPO_SAMPLES = 4
KEY = ("part", "arm", "strength", "deploy", "shift", "k", "flip_rate", "hidden", "seed")


@dataclass(frozen=True)
class Job:
    """One fit, or one fit and PPO against it.

    Args:
        part: reward, ppo or sweep.
        arm: vanilla, algorithm1, order2, joint, random or descent.
        strength: eta, or lambda of ``joint``; 0 for vanilla.
        shift: of the samples; "" = all of them (vanilla, which uses none).
        k: responses per prompt in S_k.
        flip_rate: of the training labels.
        hidden: width of the reward model.
        seed: of everything.
        recipe: of the world.
        overrides: of the recipe.
    """

    part: str
    arm: str
    strength: float
    shift: str
    seed: int
    k: int = K
    flip_rate: float = 0.25
    hidden: int = 64
    recipe: Path = RECIPE
    overrides: tuple[str, ...] = ()

    def meta(self, lab: Lab) -> MetaConfig | None:
        """The arm as the reward model's config says it."""
        change: dict[str, dict[str, Any]] = {
            "algorithm1": {"eta": self.strength},
            "order2": {"eta": self.strength, "order": 2},
            "joint": {"objective": "joint", "joint_coef": self.strength},
            "random": {"eta": self.strength, "direction": "random"},
            "descent": {"eta": self.strength, "direction": "descent"},
        }
        if self.arm == "vanilla":
            return None
        return lab.config.meta.model_copy(update=change[self.arm] | {"samples_per_prompt": self.k})


@dataclass(frozen=True)
class Outcomes:
    """A reward model on samples of the shifted policy, and on the original validation pairs.

    Args:
        J: for k = 5: 0.8 times the mean of sigma(|difference|) over pairs of responses to one prompt.
        J_unit: the same after the scores were divided by their std on the validation pairs, so that inflation does not count.
        spread: scale-free, mean std within prompts / std of all scores; both on the shifted samples.
        std: mean std within prompts on the shifted samples.
        rank: share of pairs of responses to one prompt ranked as gold does.
        rank_wide: the same where gold differs by more than WIDE.
        accuracy: on the validation pairs, whose labels are the truth.
        loss: there, nats per pair.
        calibration_error: there.
        scale: std of the scores there.
    """

    J: float
    J_unit: float
    spread: float
    std: float
    rank: float
    rank_wide: float
    accuracy: float
    loss: float
    calibration_error: float
    scale: float


def outcomes(lab: Lab, model: RewardModel, samples: Samples, validation: Sequence[KnownPair]) -> Outcomes:
    """What a model says of samples that it was not trained on."""
    clean = clean_scores(lab, model, validation)
    k = len(samples.gold[0])
    flat = [sequence for group in samples.evaluation for sequence in group]
    scores = score_sequences(model, flat, 512, lab.pad_id).view(-1, k).double()
    first, second = torch.triu_indices(k, k, offset=1)
    gold = torch.tensor(samples.gold, dtype=torch.float64)
    gap, truth = scores[:, first] - scores[:, second], gold[:, first] - gold[:, second]
    right = 0.5 * (1 + (gap * truth).sign())
    share = (K - 1) / K
    return Outcomes(
        J=float(share * torch.sigmoid(gap.abs()).mean()),
        J_unit=float(share * torch.sigmoid(gap.abs() / clean.scale).mean()),
        spread=scale_free_spread(scores),
        std=float(scores.std(1, correction=0).mean()),
        rank=float(right[truth != 0].mean()),
        rank_wide=float(right[truth.abs() > WIDE].mean()),
        accuracy=clean.accuracy,
        loss=clean.loss,
        calibration_error=clean.calibration_error,
        scale=clean.scale,
    )


def ascended(lab: Lab, model: RewardModel, groups: Sequence[Sequence[Any]], eta: float) -> RewardModel:
    """theta' = theta + eta grad J on all of S_k, as ``meta.deploy: theta_prime`` keeps it; the model itself stays."""
    there = deepcopy(model)
    parameters = [p for p in there.parameters() if p.requires_grad]
    size = max(1, 256 // len(groups[0]))
    total = [torch.zeros_like(p) for p in parameters]
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        scores = scores_of(there, [sequence for group in part for sequence in group], lab.pad_id, 256).view(len(part), -1)
        for sum_, slope in zip(total, torch.autograd.grad(difference_loss(scores, len(groups)), parameters), strict=True):
            sum_ += slope
    with torch.no_grad():
        for parameter, slope in zip(parameters, total, strict=True):
            parameter.add_(slope, alpha=eta)
    return there


@cache
def _lab(recipe: Path, overrides: tuple[str, ...]) -> tuple[Lab, list[KnownPair], list[KnownPair]]:
    lab = open_lab(recipe, overrides)
    return lab, lab.pairs("train")[:POOL], lab.pairs("validation")


@cache
def _samples(recipe: Path, overrides: tuple[str, ...], seed: int) -> dict[str, Samples]:
    return {samples.shift: samples for samples in shifted_samples(_lab(recipe, overrides)[0], seed)}


def run(job: Job) -> list[dict[str, Any]]:
    """The rows of one job."""
    began = time.monotonic()
    lab, pool, validation = _lab(job.recipe, job.overrides)
    shifts = _samples(job.recipe, job.overrides, job.seed)
    pairs = [p.pair for p in relabelled(drawn(pool, NUM_PAIRS, job.seed, "pairs"), job.flip_rate, job.seed)]
    groups = [group[: job.k] for group in shifts[job.shift].groups] if job.shift else None
    fitted = time.monotonic()
    model, report = fit(lab, pairs, job.seed, meta=job.meta(lab), groups=groups)
    seen = report.as_dict()
    facts = {"displacement": seen["displacement"], "J_at_theta": seen["J_before"], "J_at_theta_prime": seen["J_after"]}
    facts["fit_seconds"] = time.monotonic() - fitted
    rows = []
    for shift in [job.shift] if job.shift else shifts:
        for deploy, strength, there in _deployed(lab, job, model, shifts[shift]):
            key = {"part": job.part, "arm": job.arm, "strength": strength, "deploy": deploy, "shift": shift, "k": job.k}
            key |= {"flip_rate": job.flip_rate, "hidden": job.hidden, "seed": job.seed}
            found = vars(outcomes(lab, there, shifts[shift], validation))
            if job.part == "ppo":
                found |= play(lab, there, shifts[shift], job.seed)
            rows.append(key | found | facts | {"seconds": time.monotonic() - began})
    return rows


AFTERWARDS = (0.5, 2.0)
"""Sizes of the one ascent that a vanilla model is given at the end, as a control for theta'."""


def _deployed(lab: Lab, job: Job, model: RewardModel, samples: Samples) -> list[tuple[str, float, RewardModel]]:
    """The weights that are judged: theta, and theta' where the arm has one."""
    groups = [group[: job.k] for group in samples.groups]
    models = [("theta", job.strength, model)]
    if job.arm == "algorithm1" or (job.arm == "order2"):
        models.append(("theta_prime", job.strength, ascended(lab, model, groups, job.strength)))
    if job.arm == "vanilla" and job.part == "reward":
        models += [("theta_prime", eta, ascended(lab, model, groups, eta)) for eta in AFTERWARDS]
    return models


def play(lab: Lab, model: RewardModel, samples: Samples, seed: int) -> dict[str, float]:
    """A short PPO against one reward model from the policy that S_k came from; samples before and after have common seeds."""
    policy = optimise(lab, language_model(samples.policy_dir), [model], lab.config.policy, derive(seed, "play"), lambda *_: False)
    answers = sample(lab, policy, lab.prompts("test"), PPO_SAMPLES, derive(seed, "answers"))
    after = measure(lab, policy, language_model(lab.files.sft_dir), answers)
    return {f"ppo_{name}": value for name, value in vars(after).items()} | {"gold_before": samples.measured.gold}


ETAS, FEW_ETAS, LAMBDAS = (0.02, 0.1, 0.5, 2.0, 8.0), (0.5, 2.0), (0.3, 1.0, 3.0)
CHOSEN_ETA, CHOSEN_LAMBDA = 0.5, 1.0
"""Chosen by the displacement on seed 100, which is not reported: J rises by 0.01 to 0.03 at theta', accuracy stays."""


def jobs(part: str, seeds: Sequence[int], base: Job) -> list[Job]:
    """The fits of one part, the important ones first."""

    def at(shift: str, arm: str, strengths: Sequence[float], **more: Any) -> list[Job]:
        return [
            replace(base, part=part, shift=shift, arm=arm, strength=strength, seed=seed, **more)
            for strength in strengths
            for seed in seeds
        ]

    if part == "reward":
        return [
            *at("", "vanilla", [0.0]),
            *(job for shift in ("3", "0") for job in at(shift, "algorithm1", ETAS)),
            *(job for shift in ("6", "1") for job in at(shift, "algorithm1", FEW_ETAS)),
        ]
    raise ValueError(part)
