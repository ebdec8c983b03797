"""Does the ensemble find the wrong labels? AUROC of -mu against the truth, in-sample and cross-fitted, for M = 1, 3, 5 and 10.

    python -m benchmarks.experiments.strength [--seeds 1 2 3 4 5] [--workers 2]

Each seed draws 3,000 pairs of the world, flips 25% of the annotator's answers, and trains the members on them: whole models with
heads and orders of their own. Cross-fitted: five folds by prompt, each member is five models, and a pair is scored by the one
that did not see its prompt. A label is wrong if the gold reward contradicts it. With one epoch (the paper's) and with three,
where there is more to memorise. Appends to benchmarks/results/strength.jsonl; the strengths themselves stay in the cache, where
``benchmarks.experiments.cleaning`` finds them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.experiments.common import (
    RESULTS,
    KnownPair,
    Lab,
    Results,
    by_seed,
    drawn,
    fit,
    interval_text,
    level,
    open_lab,
    paired,
    relabelled,
    run_jobs,
)
from benchmarks.markdown import markdown
from cluster.seeds import derive
from rm.batches import pair_sequences, score_sequences
from tokens.records import Pair

NUM_PAIRS = 3000
NUM_DRAWN_FROM = 4000
FOLDS = 5
SIZES = (1, 3, 5, 10)
OUTCOMES = ("auroc", "auroc_clear", "wrong_in_lowest", "negative")
CLEAR_GAP = 0.5
"""Gold difference above which a pair is called clear, standard deviations of gold."""


@dataclass(frozen=True)
class Job:
    """One ensemble: members 0..M-1 on the pairs of one seed."""

    seed: int
    flip_rate: float
    epochs: int
    folds: int
    num_members: int


def pairs_of(lab: Lab, seed: int, flip_rate: float) -> list[KnownPair]:
    """The seed's pairs with the seed's flips."""
    return relabelled(drawn(lab.pairs("train")[:NUM_DRAWN_FROM], NUM_PAIRS, seed, "pairs"), flip_rate, seed)


def fold_of(pair: Pair, folds: int) -> int:
    """By prompt, so that no member sees the prompt of a pair that it scores."""
    return int(hashlib.sha256(repr(pair.prompt_ids).encode()).hexdigest(), 16) % folds


def differences(lab: Lab, job: Job) -> np.ndarray[Any, Any]:
    """d [N, M] of an ensemble, from the cache or trained now.

    Args:
        lab: the world.
        job: the ensemble; folds 1 = members score what they were trained on.
    """
    name = f"strength-{job.seed}-{job.flip_rate:g}-{job.epochs}-{job.folds}-{job.num_members}.npy"
    path = lab.cache / name
    if path.exists():
        return np.load(path)
    pairs = [known.pair for known in pairs_of(lab, job.seed, job.flip_rate)]
    reward = lab.config.reward.model_copy(update={"epochs": job.epochs})
    found = np.full((len(pairs), job.num_members), np.nan)
    fold = np.array([fold_of(pair, job.folds) for pair in pairs])
    for member in range(job.num_members):
        for part in range(job.folds):
            train = [pair for pair, f in zip(pairs, fold, strict=True) if job.folds == 1 or f != part]
            model, _ = fit(lab, train, derive(job.seed, "member", member, part), reward)
            own = np.flatnonzero(fold == part)
            scores = score_sequences(model, pair_sequences([pairs[i] for i in own]), 256, lab.pad_id).double()
            chosen, rejected = scores.chunk(2)
            found[own, member] = (chosen - rejected).numpy()
    assert np.isfinite(found).all()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{name}")
    np.save(partial_path, found)
    partial_path.rename(path)
    return found


def outcomes(job: Job, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """A row per number of members: the first M of the job's."""
    from sklearn.metrics import roc_auc_score

    lab = open_lab()
    known = pairs_of(lab, job.seed, job.flip_rate)
    wrong = np.array([pair.wrong for pair in known])
    gap = np.array([abs(pair.gold_chosen - pair.gold_rejected) for pair in known])
    d = differences(lab, job)
    rows = []
    for size in sizes:
        if size > job.num_members:
            continue
        mu = d[:, :size].mean(1)
        lowest = np.argsort(mu, kind="stable")[: round(0.2 * len(mu))]
        clear = gap > CLEAR_GAP
        rows.append(
            {
                "seed": job.seed,
                "flip_rate": job.flip_rate,
                "epochs": job.epochs,
                "folds": job.folds,
                "members": size,
                "auroc": float(roc_auc_score(wrong, -mu)),
                "auroc_clear": float(roc_auc_score(wrong[clear], -mu[clear])),
                "wrong": float(wrong.mean()),
                "wrong_in_lowest": float(wrong[lowest].mean()),
                "negative": float((mu < 0).mean()),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """AUROC and what the lowest fifth holds, in-sample and cross-fitted, and their paired difference."""
    lines = []
    for epochs in sorted({row["epochs"] for row in rows}):
        for size in SIZES:
            arm = {"epochs": epochs, "members": size}
            ways = [arm | {"folds": 1}, arm | {"folds": FOLDS}]
            if not all(by_seed(rows, "auroc", way) for way in ways):
                ways = [way for way in ways if by_seed(rows, "auroc", way)]
            for way in ways:
                label = "in-sample" if way["folds"] == 1 else f"{FOLDS} folds"
                values = [level(list(by_seed(rows, name, way).values())) for name in OUTCOMES]
                other = paired(rows, "auroc", way, arm | {"folds": 1}) if way["folds"] != 1 else []
                lines.append([str(epochs), str(size), label, *values, interval_text(other)])
    measured = ("AUROC", f"AUROC, gold gap > {CLEAR_GAP}", "wrong in lowest 20%", "share mu < 0", "AUROC minus in-sample")
    return markdown(("epochs", "M", "strength", *measured), lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    open_lab()
    results = Results(RESULTS / "strength.jsonl", ("seed", "flip_rate", "epochs", "folds", "members"))
    jobs = [
        Job(seed, 0.25, epochs, folds, members)
        for epochs, folds, members in ((1, 1, 10), (1, FOLDS, 10), (3, 1, 5), (3, FOLDS, 1))
        for seed in options.seeds
    ]
    key = lambda job: (job.seed, job.flip_rate, job.epochs, job.folds, job.num_members)  # noqa: E731
    for rows in run_jobs(partial(outcomes), results.missing(jobs, key), options.workers):
        for row in rows:
            results.append(row)
        print(f"seed {rows[0]['seed']}, {rows[0]['epochs']} epochs, {rows[0]['folds']} folds: done", flush=True)
    print(table([row for row in results.rows() if row["seed"] in options.seeds]))


if __name__ == "__main__":
    main()
