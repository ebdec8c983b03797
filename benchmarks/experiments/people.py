"""Does it hold? Reward features for people, beside what else there is, on sandbox users who disagree and on real personas.

    python -m benchmarks.experiments.people sandbox [--seeds 1 2 3 4 5] [--workers 1]
    python -m benchmarks.experiments.people choose                        # epochs and penalty, on people and prompts not reported
    python -m benchmarks.experiments.people personas --data DIRECTORY --cache DIRECTORY [--seeds 1 2 3 4 5]
    python -m benchmarks.experiments.people report                        # tables and figures of what is there

sandbox: every seed has raters and 20 held-out users of its own, who in each of six matters of taste agree with the common one
with probability 0.5 (most disagreement) or 0.9. Raters label pairs of responses to training prompts as a Bradley-Terry annotator
does, and so do the held-out users in their answers; accuracy is measured on held-out prompts against their gold reward, without
noise. The oracle has the best weights that there are on a way's features, fitted to 600 answers without noise (the best of a few
penalties); the person's true weights on the true attributes are the gold reward itself and order every pair right. "The sandbox's
own attributes" has these twelve for features, which no real data would give.

Appends to benchmarks/results/people.jsonl, a row for every way and seed, and goes on where it stopped. personas: see
``benchmarks.experiments.people_personas``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.common import RESULTS, Lab, Results, open_lab, run_jobs, single_thread
from benchmarks.experiments.people_arms import Adapt, Material, as_it_is, best_weights, by_features, fit_rfm, in_units
from benchmarks.experiments.people_counterparts import conditioned, latent, lore, own_mlp
from benchmarks.experiments.people_data import ANSWERS, HIGH, LOW, PICKED_AFTER, People, Texts, draw_people, draw_texts
from benchmarks.experiments.people_in_context import in_context
from evaluation.best_of_n import soft_weights
from rm.features_config import FeaturesConfig
from rm.people import group_reward
from rm.people_config import Group
from sandbox.world import Split

PATH = RESULTS / "people.jsonl"
KEY = ("what", "arm", "persona", "agreement", "d", "raters", "labels", "epochs", "seed")
HELD_OUT = 20
EPOCHS = 2
L2 = 1.0
"""The defaults of ``features`` and of configs/people.yaml: nothing was tuned for what is reported. ``choose`` looks at others."""
SOFTNESS = (0.1, 0.25, 0.5, 1.0)
"""Of soft best of n, in standard deviations of the person's reward over the samples."""


@dataclass(frozen=True)
class Job:
    """One way for one seed.

    Args:
        arm: "shared" (with all that stands on its features), "features", "conditioned", "attributes" or "in context".
        agreement: of the users with the common taste.
        d: reward features; 0 = a way without.
        raters: to learn from.
        labels: of each.
        seed: of everything.
        epochs: of joint fits.
    """

    arm: str
    agreement: float
    d: int
    raters: int
    labels: int
    seed: int
    epochs: int = EPOCHS

    def row(self, what: str = "accuracy") -> dict[str, Any]:
        return {"what": what, "persona": None, **asdict(self)}


def jobs_of(seeds: Sequence[int]) -> list[Job]:
    """All of the sandbox's, what matters most first."""
    return [
        Job(*job, seed)
        for jobs in (
            [("shared", LOW, 1, 60, 50), ("features", LOW, 32, 60, 50), ("attributes", LOW, 12, 60, 50)],
            [("features", LOW, 8, 60, 50), ("shared", HIGH, 1, 60, 50), ("features", HIGH, 32, 60, 50)],
            [("features", LOW, 32, 15, 200), ("features", LOW, 32, 250, 12)],
            [("conditioned", LOW, 16, 60, 50), ("features", LOW, 128, 60, 50)],
            [("in context", LOW, 0, 60, 50)],
        )
        for seed in seeds
        for job in jobs
    ]  # fmt: skip


def fitted(job: Job, lab: Lab, texts: Texts, l2: float = L2) -> list[dict[str, Any]]:
    """Rows of one job; the one by which the job counts as done comes last."""
    people = draw_people(lab, texts, job.agreement, job.raters, HELD_OUT, job.seed)
    material = Material(lab, people, job.labels, job.epochs)
    measure = partial(measured, people)
    if job.arm == "features":
        model = fit_rfm(material, FeaturesConfig(d=job.d))
        hidden = material.hidden(model.backbone)
        phi, mean = hidden @ model.projection.detach().double().T, model.mean_weights.double()
        adapt = by_features(phi, mean, l2)
        return [*groups(job, people, adapt), job.row() | measure(adapt, best_weights(phi, mean))]
    if job.arm == "conditioned":
        return [job.row() | measure(conditioned(material), None)]
    if job.arm == "in context":
        return [job.row() | measure(in_context(material), None)]
    if job.arm == "attributes":
        phi, mean = in_units(torch.tensor(texts.attributes), material.rows, material.places)
        return [job.row() | measure(by_features(phi, mean, l2), best_weights(phi, mean))]
    shared = fit_rfm(material, FeaturesConfig(d=1, shared=True))
    hidden = material.hidden(shared.backbone)
    scores = (hidden @ shared.projection.detach().double().T)[:, 0]
    if job.agreement != LOW:
        return [job.row() | measure(as_it_is(scores), None)]
    own, mean = in_units(hidden, material.rows, material.places)
    ways: dict[str, Adapt] = {
        "shared": as_it_is(scores),
        "own linear head": by_features(own, mean, l2),
        "LoRe-like": lore(material, hidden),
        "own MLP (Park et al.)": own_mlp(material, hidden),
        "latent user (VPL-like)": latent(material, hidden),
    }
    return [job.row() | {"arm": name} | measure(way, None) for name, way in reversed(ways.items())]


def measured(people: People, adapt: Adapt, oracle: Adapt | None, split: Split = "test") -> dict[str, Any]:
    """How well a way knows the held-out users.

    Args:
        people: whom.
        adapt: the way.
        oracle: of its features; None = it has none.
        split: whose prompts are judged.

    Returns:
        Accuracy after 0, 3, ... answers and of the oracle, "against": where a user's order is not the common taste's; of each
        user the gold reward of the picks of best of n, of a mean sample and of the truly best.
    """
    pool, outcome = people.texts.split(split), {"disagreement": people.disagreement}
    picks: dict[str, list[float]] = {name: [] for name in ("gold_0", f"gold_{PICKED_AFTER}", "gold_mean", "gold_best")}
    soft: dict[str, list[float]] = {f"soft_{softness:g}": [] for softness in SOFTNESS}
    accuracy: dict[str, list[float]] = {}
    for user in people.held_out:
        judged, answers = people.judged(user, split=split), people.answers(user)
        against = people.common[judged[:, 0]] < people.common[judged[:, 1]]
        found = {str(n): adapt(answers[:n]) for n in ANSWERS}
        if oracle is not None:
            found["oracle"] = oracle(people.many(user))
        for name, scores in found.items():
            right = (np.sign(scores[judged[:, 0]] - scores[judged[:, 1]]) + 1) / 2
            accuracy.setdefault(f"accuracy_{name}", []).append(float(right.mean()))
            if against.any():
                accuracy.setdefault(f"against_{name}", []).append(float(right[against].mean()))
        gold = people.gold[user][pool]  # [P, K]
        for n in (0, PICKED_AFTER):
            picks[f"gold_{n}"].append(float(np.take_along_axis(gold, found[str(n)][pool].argmax(1)[:, None], 1).mean()))
        picks["gold_mean"].append(float(gold.mean()))
        picks["gold_best"].append(float(gold.max(1).mean()))
        own = found[str(PICKED_AFTER)]
        for softness in SOFTNESS:
            weights = np.array([soft_weights(row, softness) for row in own[pool] / own[pool].std()])
            soft[f"soft_{softness:g}"].append(float((weights * gold).sum(1).mean()))
    return outcome | {name: float(np.mean(values)) for name, values in (accuracy | soft).items()} | picks


def groups(job: Job, people: People, adapt: Adapt) -> list[dict[str, Any]]:
    """One pick for all held-out users together, as their mean, minimum or a quantile says: the gold reward that each gets."""
    pool = people.texts.split("test")
    own = torch.tensor(np.stack([adapt(people.answers(user)[:PICKED_AFTER])[pool.ravel()] for user in people.held_out], 1))
    own = (own - own.mean(0)) / own.std(0, correction=0)
    rows = []
    ways: dict[str, tuple[Group, float | None]] = {
        "mean": ("mean", None), "min": ("min", None), "quantile 0.25": ("quantile", 0.25),
    }  # fmt: skip
    for name, (group, quantile) in ways.items():
        scores = group_reward(own, group, quantile).reshape(pool.shape).numpy()
        picked = pool[np.arange(len(pool)), scores.argmax(1)]
        gold = [float(people.gold[user][picked].mean()) for user in people.held_out]
        base = [float(people.gold[user][pool].mean()) for user in people.held_out]
        rows.append(job.row("group") | {"arm": name, "gold": gold, "gold_mean": base})
    return rows


def work(job: Job) -> list[dict[str, Any]]:
    """A job in a process of its own."""
    lab = open_lab()
    return fitted(job, lab, draw_texts(lab))


def choose(seed: int = 0) -> None:
    """Accuracy of a few settings on validation prompts, for people whom no reported seed has."""
    lab = open_lab()
    people = draw_people(lab, draw_texts(lab), LOW, 60, HELD_OUT, seed)
    for config in (FeaturesConfig(d=32), FeaturesConfig(d=1, shared=True)):
        for epochs in (1, 2, 4):
            material = Material(lab, people, 50, epochs)
            model = fit_rfm(material, config)
            hidden = material.hidden(model.backbone)
            phi, mean = hidden @ model.projection.detach().double().T, model.mean_weights.double()
            ways: dict[str, Adapt] = {"shared": as_it_is(phi[:, 0])} if config.shared else {}
            if config.shared:
                phi, mean = in_units(hidden, material.rows, material.places)
            ways |= {f"l2 {l2:g}": by_features(phi, mean, l2) for l2 in (0.03, 0.1, 0.3, 1.0)}
            for name, way in ways.items():
                row = measured(people, way, None, "validation")
                found = " ".join(f"{row[f'accuracy_{n}']:.3f}" for n in ANSWERS)
                print(f"d {config.d}, {epochs} epochs, {name}: {found}", flush=True)


def key_of(job: Job) -> tuple[Any, ...]:
    """Of the job's own row."""
    row: Mapping[str, Any] = job.row()
    return tuple(row[name] for name in KEY)


def main() -> None:
    """Compute what is missing, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sandbox", "choose", "personas", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", type=Path, default=None, help="personas: directory of the JSON lines files")
    parser.add_argument("--backbone", type=Path, default=None, help="personas: a sentence encoder's directory")
    parser.add_argument("--cache", type=Path, default=None, help="personas: where an encoder is pre-trained instead")
    options = parser.parse_args()
    results = Results(PATH, KEY)
    if options.what == "choose":
        single_thread()
        choose()
        return
    if options.what == "sandbox":
        draw_texts(open_lab())
        for rows in run_jobs(work, results.missing(jobs_of(options.seeds), key_of), options.workers):
            for row in rows:
                results.append(row)
            print(", ".join(f"{name} {rows[0][name]}" for name in KEY[1:]), flush=True)
    elif options.what == "personas":
        from benchmarks.experiments.people_personas import personas

        personas(options.data, options.backbone, options.cache, options.seeds)
    from benchmarks.experiments.people_personas import KEY as OF_PERSONAS
    from benchmarks.experiments.people_personas import PATH as PERSONAS
    from benchmarks.experiments.people_report import report

    report(results.rows(), Results(PERSONAS, OF_PERSONAS).rows())


if __name__ == "__main__":
    main()
