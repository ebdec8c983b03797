"""One fit of a study: a reward model trained on a part of the pairs, measured while it is. A Ray task each, side by side."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import ray

from actors.board import Teller
from actors.process import ProcessSetup
from actors.ranks import own_rank
from rm.config import MetaConfig, RewardConfig
from tokens.records import Pair

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often the process of one fit may die before the study gives up."""


@dataclass(frozen=True, eq=False)
class Treated:
    """Which of N pairs are trained on, and what is done to them.

    Args:
        rows: [n] int64, indices of different pairs.
        flipped: [n] bool, chosen and rejected exchanged.
        margin: [n] float64, mu after any exchange; 0 without a margin.
        smoothing: [n] float64, alpha; 0 without smoothing.
    """

    rows: np.ndarray
    flipped: np.ndarray
    margin: np.ndarray
    smoothing: np.ndarray

    def of(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs as they are trained on.

        Args:
            pairs: all N.

        Returns:
            n pairs.
        """
        return [
            replace(
                pairs[row],
                chosen_ids=pairs[row].rejected_ids if flipped else pairs[row].chosen_ids,
                rejected_ids=pairs[row].chosen_ids if flipped else pairs[row].rejected_ids,
                margin=margin,
                smoothing=smoothing,
            )
            for row, flipped, margin, smoothing in zip(
                self.rows.tolist(), self.flipped.tolist(), self.margin.tolist(), self.smoothing.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, eq=False)
class StudyJob:
    """One fit.

    Args:
        name: for logs, messages and progress.
        base: model directory to start from, with its tokenizer.
        reward: how to fit; neither contrastive nor stopped early.
        seed: of the head and of the order of the pairs.
        every: steps between two measurements.
        treated: what it is trained on.
    """

    name: str
    base: Path
    reward: RewardConfig
    seed: int
    every: int
    treated: Treated


@dataclass(frozen=True)
class StudyReport:
    """What a fit came to.

    Args:
        name: of the job.
        looks: step, and numbers by name: ``validation/<set>/accuracy``, ``/loss``, ``/ece``, and from the first step on
            ``train/accuracy`` and ``train/loss``, means over the steps since the last look.
    """

    name: str
    looks: tuple[tuple[int, dict[str, float]], ...]


def repeated(pairs: Sequence[Pair], number: int) -> list[Pair]:
    """The pairs over and over, ``number`` in all: a fit on them takes as many steps as one on ``number`` different pairs.

    Args:
        pairs: at least one.
        number: at least as many.
    """
    return [pairs[i % len(pairs)] for i in range(number)]


@ray.remote(max_retries=MAX_DEATHS)
def fit_arm(
    setup: ProcessSetup, job: StudyJob, pairs: Sequence[Pair], validation: Mapping[str, Sequence[Pair]], board: Any
) -> StudyReport:
    """Fit one reward model and measure it before the first step, every so many steps, and after the last.

    Args:
        setup: of the process; equal for all fits.
        job: what to fit.
        pairs: all N training pairs; the fit takes the steps that N pairs take, see ``repeated``.
        validation: held-out pairs by the name of their set.
        board: told how far the fit is.

    Returns:
        The report.
    """
    tell = Teller(board, job.name)
    rank, reward = own_rank(setup), job.reward
    import torch
    from transformers import AutoTokenizer

    from rm.lora import add_lora
    from rm.model import RewardModel
    from rm.records import RewardStep
    from rm.training import Watch, fit_reward_model
    from rm.validation import measure, score_sets

    pad_id = AutoTokenizer.from_pretrained(job.base).pad_token_id
    seen = repeated(job.treated.of(pairs), len(pairs))
    total = reward.epochs * len(seen)
    model = RewardModel.from_any(job.base, pooling=reward.pooling, seed=job.seed, dtype=torch.float32, pad_id=pad_id)
    if reward.lora.rank:
        add_lora(model, reward.lora, seed=job.seed)
    rank.place(model)
    looks: list[tuple[int, dict[str, float]]] = []
    since: list[RewardStep] = []

    def look(step: int) -> float:
        numbers = measure(score_sets(model, validation, reward.microbatch_size, pad_id))
        board.beat.remote()
        if since:
            numbers |= {"train/loss": fmean(s.loss for s in since), "train/accuracy": fmean(s.accuracy for s in since)}
            since.clear()
        looks.append((step, numbers))
        return numbers[f"validation/{next(iter(validation))}/accuracy"]

    def on_step(step: RewardStep) -> None:
        since.append(step)
        tell(min(step.step * reward.batch_size, total), step.step == step.num_steps)

    began = time.perf_counter()
    try:
        with rank.compute():
            look(0)
            watch = Watch(job.every, look, None)
            fit_reward_model(model, seen, None, reward, MetaConfig(enabled=False), job.seed, pad_id, on_step, watch=watch)
    except FloatingPointError as error:
        raise FloatingPointError(f"{job.name}: {error}") from error
    tell.end()
    log.info("%s: %d different pairs, %.1f s", job.name, len(job.treated.rows), time.perf_counter() - began)
    return StudyReport(job.name, tuple(looks))


def measured_every(config: RewardConfig, num_pairs: int, looks: int) -> int:
    """Steps between two measurements: as configured, else so that there are about ``looks`` of them.

    Args:
        config: how the models are fitted.
        num_pairs: that they are fitted on.
        looks: in all.
    """
    num_steps = config.epochs * math.ceil(num_pairs / config.batch_size)
    return config.evaluate_every or max(1, math.ceil(num_steps / looks))
