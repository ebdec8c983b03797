"""Learning reward features as a Ray task: one model of all raters, and how well it serves those who were held out."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.board import Teller
from actors.fit_saves import FitSaves
from actors.process import ProcessSetup
from actors.ranks import Rank
from rm.config import RewardConfig
from rm.features_config import FeaturesConfig
from tokens.guards import GuardsConfig
from tokens.records import Pair

if TYPE_CHECKING:
    from rm.feature_check import RaterAccuracy
    from rm.feature_fit import FeatureStep
    from rm.features import FeatureModel

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often the process of a fit may die before the command gives up; the next one goes on from the last save."""
COUNTS = (0, 3, 10, 30, 50)
"""Answers after which a rater who was held out is measured."""


@dataclass(frozen=True)
class Labels:
    """Labels and who gave them; may be none.

    Args:
        pairs: N.
        raters: N places among the raters.
    """

    pairs: tuple[Pair, ...]
    raters: tuple[int, ...]


@dataclass(frozen=True)
class NewRater:
    """A rater whom the model was not trained with.

    Args:
        name: theirs.
        answers: labels of training prompts, in the order in which they are given.
        tests: labels of held-out prompts, at least one.
    """

    name: str
    answers: tuple[Pair, ...]
    tests: tuple[Pair, ...]


@dataclass(frozen=True)
class FeatureJob:
    """A fit.

    Args:
        name: for logs and progress.
        base: model directory to start from, with its tokenizer.
        directory: where the model belongs; what an earlier process left there is removed.
        features: d, start, loss, adaptation.
        reward: of the backbone and of AdamW.
        seed: of all draws and of the order of the labels.
        guards: how many steps whose numbers went wrong may be left out.
        saves: where the fit saves how far it has come, and how often; None = it does not.
    """

    name: str
    base: Path
    directory: Path
    features: FeaturesConfig
    reward: RewardConfig
    seed: int
    guards: GuardsConfig
    saves: FitSaves | None


@dataclass(frozen=True)
class FeatureReport:
    """What a fit came to.

    Args:
        steps: metrics of each step, by name.
        trained: accuracy of the raters that were trained on, on held-out prompts.
        new: of those held out, after so many answers.
        fingerprint: of the model as it was saved.
        seconds: of the fit and the measurements.
    """

    steps: tuple[dict[str, float], ...]
    trained: tuple[RaterAccuracy, ...]
    new: tuple[RaterAccuracy, ...]
    fingerprint: str
    seconds: float


@ray.remote(max_retries=MAX_DEATHS)
def learn_features(
    setup: ProcessSetup,
    job: FeatureJob,
    raters: Sequence[str],
    train: Labels,
    tests: Labels,
    new: Sequence[NewRater],
    board: Any,
) -> FeatureReport:
    """Fit and store one model; see ``run_job``.

    Args:
        setup: of the process.
        job: what to fit.
        raters: names.
        train: their labels.
        tests: their labels of held-out prompts.
        new: raters held out.
        board: told how far the fit is.
    """
    tell = Teller(board, job.name)
    report = run_job(Rank(setup), job, raters, train, tests, new, tell)
    tell.end()
    return report


def run_job(
    rank: Rank,
    job: FeatureJob,
    raters: Sequence[str],
    train: Labels,
    tests: Labels,
    new: Sequence[NewRater],
    tell: Callable[[int], None],
) -> FeatureReport:
    """Fit, measure and save one model in this process.

    Args:
        rank: this process.
        job: what to fit.
        raters: names.
        train: their labels.
        tests: their labels of held-out prompts.
        new: raters held out.
        tell: how many labels have been seen.

    Returns:
        The report.
    """
    import torch
    from transformers import AutoTokenizer

    from rm.feature_check import trained_raters
    from rm.feature_fit import Judged, fit_features
    from rm.feature_start import start_features
    from rm.features import BACKBONE, fingerprint
    from rm.lora import add_lora
    from rm.model import RewardModel

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    pad_id, batch_size = tokenizer.pad_token_id, job.reward.microbatch_size
    backbone = RewardModel.from_any(job.base, pooling=job.reward.pooling, seed=job.seed, dtype=torch.float32, pad_id=pad_id)
    if job.reward.lora.rank:
        add_lora(backbone, job.reward.lora, seed=job.seed)
    rank.place(backbone)
    seen = Judged(train.pairs, train.raters)
    steps: list[dict[str, float]] = []

    def on_step(step: FeatureStep) -> None:
        steps.append(step.as_dict())
        tell(step.labels)
        log.info("%s: %d labels, loss %.4f, accuracy %.3f", job.name, step.labels, step.loss, step.accuracy)

    with rank.compute():
        model = start_features(backbone, raters, seen, job.features, job.seed, batch_size, pad_id)
        whole = (
            str(job.base), job.seed, job.features.model_dump(), job.reward.model_dump(), tuple(raters), seen.pairs, seen.raters,
        )  # fmt: skip
        saves = None if job.saves is None else job.saves.of(whole, job.name)
        fit_features(model, seen, job.features, job.reward, job.seed, pad_id, on_step, job.guards, saves)
        trained = trained_raters(model, seen, Judged(tests.pairs, tests.raters), batch_size, pad_id) if tests.pairs else []
        measured = [row for rater in new for row in _measure(model, rater, job, pad_id)]
    shutil.rmtree(job.directory, ignore_errors=True)  # of a process that died
    model.save(job.directory)
    tokenizer.save_pretrained(job.directory / BACKBONE)
    seconds = time.perf_counter() - began
    return FeatureReport(tuple(steps), tuple(trained), tuple(measured), fingerprint(job.directory), seconds)


def _measure(model: FeatureModel, rater: NewRater, job: FeatureJob, pad_id: int) -> list[RaterAccuracy]:
    from rm.feature_check import new_rater

    size, mean = job.reward.microbatch_size, model.mean_weights.cpu()
    answers, tests = (model.differences(pairs, size, pad_id) for pairs in (rater.answers, rater.tests))
    towards = mean if job.features.towards == "mean" else None
    counts = COUNTS[:1] if job.features.shared else COUNTS  # one reward for all is adapted to nobody
    return new_rater(rater.name, answers, tests, counts, job.features.l2, towards, mean)
