"""Does contrastive reward modelling help, on the domains that were trained on and on domains that were not?

    python -m benchmarks.experiments.contrastive [--seeds 1 ... 10] [--workers 2]

SimCSE and SwAV, each on pairs and on differences, at the paper's settings, beside the plain preference loss, and beside the
plain loss under the same dropout (one view): whatever dropout does by itself is not the contrast's doing. Same pairs, heads
and orders.
Appends to benchmarks/results/contrastive.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.common import (
    RESULTS,
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
from benchmarks.experiments.strength import pairs_of
from benchmarks.markdown import markdown
from cluster.seeds import derive
from rm.config import ContrastiveConfig, RewardConfig

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, dropout 0.05": {"dropout": 0.05},
    "SimCSE, pairs": {"contrastive": ContrastiveConfig(method="simcse", on="pairs")},
    "SimCSE, differences": {"contrastive": ContrastiveConfig(method="simcse", on="differences")},
    "SwAV, pairs": {"contrastive": ContrastiveConfig(method="swav", on="pairs")},
    "SwAV, differences": {"contrastive": ContrastiveConfig(method="swav", on="differences")},
}
OUTCOMES = ("accuracy", "held_out_accuracy", "calibration_error", "scale")
FLIP_RATE = 0.25


@dataclass(frozen=True)
class Job:
    """One fit."""

    seed: int
    arm: str


def outcomes(job: Job) -> list[dict[str, Any]]:
    """The row of one fit."""
    lab = open_lab()
    reward: RewardConfig = lab.config.reward.model_copy(update=ARMS[job.arm])
    pairs = [known.pair for known in pairs_of(lab, job.seed, FLIP_RATE)]
    model, _ = fit(lab, pairs, derive(job.seed, "contrastive"), reward)
    scores = clean_scores(lab, model, lab.pairs("validation"))
    return [
        {
            "seed": job.seed,
            "arm": job.arm,
            "accuracy": scores.accuracy,
            "held_out_accuracy": clean_scores(lab, model, lab.pairs("validation_held_out")).accuracy,
            "calibration_error": scores.calibration_error,
            "scale": scores.scale,
        }
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Level of the plain loss, and each arm's paired difference to it."""
    lines = []
    for arm in ARMS:
        if arm == "plain":
            cells = [level(list(by_seed(rows, name, {"arm": arm}).values())) for name in OUTCOMES]
        else:
            cells = [interval_text(paired(rows, name, {"arm": arm}, {"arm": "plain"})) for name in OUTCOMES]
        lines.append([arm if arm != "plain" else "plain (level)", *cells])
    return markdown(["arm", "accuracy", "accuracy, held-out domains", "calibration error", "score scale"], lines)


def main() -> None:
    """Fit what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    open_lab()
    results = Results(RESULTS / "contrastive.jsonl", ("seed", "arm"))
    jobs = results.missing([Job(seed, arm) for seed in options.seeds for arm in ARMS], lambda job: (job.seed, job.arm))
    for rows in run_jobs(outcomes, jobs, options.workers):
        for row in rows:
            results.append(row)
    print(table([row for row in results.rows() if row["seed"] in options.seeds]))


if __name__ == "__main__":
    main()
