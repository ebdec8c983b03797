"""What is won by flipping, smoothing, margins and dropping, at 0, 10, 25 and 40% flipped labels?

    python -m benchmarks.experiments.cleaning [--seeds 1 2 3 4 5] [--workers 2]

Each seed draws 3,000 pairs, flips that share of the annotator's answers, votes on them with an in-sample ensemble of five
(ten find hardly more wrong labels here: ``benchmarks.experiments.strength``), and trains one model for every method of
``data.denoise`` at its default settings, all with the same head and order. ``clean`` is the model trained on labels without
error: what there is to win. Second part: the late decline (the paper's figure 8), four epochs at 25% flips, measured
along the way. Third: label smoothing's alpha, and flips chosen by cross-fitted strength, at 25%. Appends to
benchmarks/results/cleaning.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.experiments.common import (
    RESULTS,
    KnownPair,
    Lab,
    Results,
    by_seed,
    clean_scores,
    fit,
    interval_text,
    level,
    open_lab,
    paired,
    run_jobs,
)
from benchmarks.experiments.strength import FOLDS, differences, pairs_of
from benchmarks.experiments.strength import Job as Ensemble
from benchmarks.markdown import markdown
from cluster.seeds import derive
from preferences.config import DenoiseConfig
from rm.training import Watch
from tokens.records import Pair

RATES = (0.0, 0.1, 0.25, 0.4)
METHODS = ("none", "flip", "soft", "margin", "flip+margin", "soft+margin", "drop")
MEMBERS = 5
LONG_EPOCHS = 4
LONG_ARMS = ("none", "flip", "soft", "margin", "soft+margin", "clean")
ALPHAS = (0.2, 0.3)
OUTCOMES = ("accuracy", "calibration_error", "loss", "held_out_accuracy")


@dataclass(frozen=True)
class Job:
    """One fit: ``part`` is rates, long, alpha or cross-fitted."""

    part: str
    seed: int
    flip_rate: float
    arm: str


def cleaned(known: Sequence[KnownPair], d: np.ndarray[Any, Any], config: DenoiseConfig) -> list[Pair]:
    """The pairs as ``data.denoise`` leaves them: its own function decides, on rows that stand for the pairs."""
    import pyarrow as pa
    from datasets import Dataset

    from preferences.denoise import denoise
    from preferences.sets import PreferenceSet
    from preferences.strength import Strengths
    from preferences.strength_files import text_key

    ids = [pair.pair.id for pair in known]
    columns = {"id": ids, "prompt": ids, "chosen": ["c"] * len(ids), "rejected": ["r"] * len(ids), "domain": [""] * len(ids)}
    rows = Dataset(pa.table({name: pa.array(values, pa.large_string()) for name, values in columns.items()}))
    texts = tuple(text_key(name, "c", "r") for name in ids)
    strengths = Strengths(tuple(ids), d, np.zeros_like(d), ("train",) * len(ids), "the ensemble", None, texts)
    done = denoise(PreferenceSet(rows, "the experiment", "explicit"), strengths, config)
    if config.method == "none":
        return [pair.pair for pair in known]
    return [
        replace(
            pair.swapped().pair if row["chosen"] == "r" else pair.pair,
            margin=row["margin"],
            smoothing=row["smoothing"],
        )
        for pair, row in zip(known, done.rows, strict=True)
        if row["keep"]
    ]


def training_pairs(lab: Lab, job: Job) -> list[Pair]:
    """D of one arm."""
    known = pairs_of(lab, job.seed, job.flip_rate)
    if job.arm == "clean":
        return [(pair.swapped() if pair.wrong else pair).pair for pair in known]
    if job.arm == "none":
        return [pair.pair for pair in known]
    folds = FOLDS if job.part == "cross-fitted" else 1
    d = differences(lab, Ensemble(job.seed, job.flip_rate, 1, folds, MEMBERS))
    method, _, alpha = job.arm.partition("@")
    config = DenoiseConfig.model_validate({"method": method} | ({"smoothing": float(alpha)} if alpha else {}))
    return cleaned(known, d, config)


def outcomes(job: Job) -> list[dict[str, Any]]:
    """A row per measurement; ``step`` -1 is the end."""
    import torch

    from rm.config import MetaConfig
    from rm.model import RewardModel
    from rm.training import fit_reward_model

    lab = open_lab()
    validation, held_out = lab.pairs("validation"), lab.pairs("validation_held_out")
    pairs = training_pairs(lab, job)
    seed = derive(job.seed, "cleaning")

    def row(model: RewardModel, step: int) -> dict[str, Any]:
        scores = clean_scores(lab, model, validation)
        measured = {
            "accuracy": scores.accuracy,
            "loss": scores.loss,
            "calibration_error": scores.calibration_error,
            "scale": scores.scale,
            "held_out_accuracy": clean_scores(lab, model, held_out).accuracy,
        }
        return {"part": job.part, "seed": job.seed, "flip_rate": job.flip_rate, "arm": job.arm, "step": step} | measured

    if job.part != "long":
        model, _ = fit(lab, pairs, seed)
        return [row(model, -1)]
    reward = lab.config.reward.model_copy(update={"epochs": LONG_EPOCHS})
    model = RewardModel.from_language_model(
        lab.files.sft_dir, pooling=reward.pooling, seed=derive(seed, "head"), dtype=torch.float32, pad_id=lab.pad_id
    )
    rows: list[dict[str, Any]] = []

    def measure(step: int) -> float:
        rows.append(row(model, step))
        return float(rows[-1]["accuracy"])

    every = -(-len(pairs) // reward.batch_size) // 2
    fit_reward_model(
        model, pairs, None, reward, MetaConfig(enabled=False), derive(seed, "order"), lab.pad_id, lambda step: None,
        watch=Watch(every, measure, None),
    )  # fmt: skip
    return [*rows, rows[-1] | {"step": -1}]


def jobs_of(seeds: Sequence[int]) -> list[Job]:
    """All fits, the ones at 25% first."""
    rates = sorted(RATES, key=lambda rate: rate != 0.25)
    return [
        *(Job("rates", seed, rate, arm) for rate in rates for seed in seeds for arm in (*METHODS, "clean")),
        *(Job("cross-fitted", seed, 0.25, arm) for seed in seeds for arm in ("flip", "soft+margin")),
        *(Job("alpha", seed, 0.25, f"soft@{alpha}") for seed in seeds for alpha in ALPHAS),
        *(Job("long", seed, 0.25, arm) for seed in seeds for arm in LONG_ARMS),
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Level of the baseline, and each method's paired difference to it."""
    parts = []
    for outcome in OUTCOMES:
        lines = []
        for arm in (*METHODS, "clean"):
            cells = []
            for rate in RATES:
                which = {"part": "rates", "flip_rate": rate, "step": -1}
                if arm == "none":
                    cells.append(level(list(by_seed(rows, outcome, which | {"arm": arm}).values())))
                else:
                    cells.append(interval_text(paired(rows, outcome, which | {"arm": arm}, which | {"arm": "none"})))
            lines.append([arm if arm != "none" else "none (level)", *cells])
        parts.append(f"{outcome}\n\n" + markdown(["method", *(f"{rate:.0%} flips" for rate in RATES)], lines))
    none = {"part": "rates", "flip_rate": 0.25, "step": -1, "arm": "none"}
    others = [("cross-fitted", "flip"), ("cross-fitted", "soft+margin"), *(("alpha", f"soft@{alpha}") for alpha in ALPHAS)]
    lines = [
        [part, arm, interval_text(paired(rows, "accuracy", {"part": part, "arm": arm, "flip_rate": 0.25, "step": -1}, none))]
        for part, arm in others
    ]
    parts.append("25% flips, accuracy minus none\n\n" + markdown(["", "arm", "difference"], lines))
    return "\n\n".join([*parts, late(rows)])


def late(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy over four epochs, the fall from each seed's own best to the end, and the end beside the baseline's."""
    steps = sorted({row["step"] for row in rows if row["part"] == "long" and row["step"] > 0})
    none = {"part": "long", "arm": "none", "step": -1}
    lines = []
    for arm in LONG_ARMS:
        which = {"part": "long", "arm": arm}
        levels = [f"{np.mean(list(by_seed(rows, 'accuracy', which | {'step': step}).values())):.3f}" for step in steps]
        best: dict[int, float] = {}
        for step in steps:
            for seed, value in by_seed(rows, "accuracy", which | {"step": step}).items():
                best[seed] = max(value, best[seed]) if seed in best else value
        end = by_seed(rows, "accuracy", which | {"step": -1})
        fall = interval_text([end[seed] - best[seed] for seed in sorted(end)])
        gain = "" if arm == "none" else interval_text(paired(rows, "accuracy", which | {"step": -1}, none))
        lines.append([arm, *levels, fall, gain])
    return "four epochs, 25% flips: accuracy by step\n\n" + markdown(
        ["method", *map(str, steps), "end minus best", "end minus none's"], lines
    )


def main() -> None:
    """Fit what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    open_lab()
    results = Results(RESULTS / "cleaning.jsonl", ("part", "seed", "flip_rate", "arm", "step"))
    jobs = results.missing(jobs_of(options.seeds), lambda job: (job.part, job.seed, job.flip_rate, job.arm, -1))
    voted = [job for job in jobs if job.arm not in ("none", "clean")]
    ensembles = {(job.part == "cross-fitted", job.seed, job.flip_rate): job for job in voted}
    for _ in run_jobs(vote, list(ensembles.values()), options.workers):  # once each, before two workers could both begin
        pass
    for rows in run_jobs(outcomes, jobs, options.workers):
        for row in rows:
            results.append(row)
    print(table([row for row in results.rows() if row["seed"] in options.seeds]))


def vote(job: Job) -> list[dict[str, Any]]:
    """Train the ensemble that the job's arms share."""
    training_pairs(open_lab(), replace(job, arm="flip"))
    return []


if __name__ == "__main__":
    main()
