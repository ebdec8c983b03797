"""How many answers does it save to choose the pairs that a new person is asked about?

    python -m benchmarks.experiments.asking [--seeds 1 2 3 4 5]
    python -m benchmarks.experiments.asking report            # the tables and the figure of what is there

Sandbox users who disagree (each agrees with the common taste with probability 0.5 in each of six matters of taste): 60 raters
teach the features, d = 32; 20 others are then asked about pairs of a pool, 50 one after another, chosen by information, by
Thompson sampling or at random. Asked about one pair, a person gives the same answer (of a Bradley-Terry annotator, who may err)
whoever chose it. After each answer the person is fitted again, and judged on pairs of held-out prompts against the gold reward,
without noise. Nothing was tuned here: features, penalty and people are those of `benchmarks.experiments.people`.

Appends to benchmarks/results/asking.jsonl, a row for every way and seed, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit

from benchmarks.experiments.common import RESULTS, ROOT, Results, interval_text, level, open_lab, single_thread
from benchmarks.experiments.people import EPOCHS, HELD_OUT, L2
from benchmarks.experiments.people_arms import Material, differences_of, fit_rfm
from benchmarks.experiments.people_data import LOW, People, Texts, draw_people, draw_texts
from benchmarks.markdown import markdown
from cluster.seeds import derive
from evaluation.groups import over_seeds
from evaluation.panels import common_legend, draw_curves, panels, percent
from evaluation.studies import Curve
from evaluation.svg import BLUE, GREEN, GREY, Plot
from rm.asking import choose, expected_accuracy
from rm.features_config import WAYS, By, FeaturesConfig
from rm.person import fit_person

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

PATH, KEY = RESULTS / "asking.jsonl", ("by", "seed")
D, RATERS, LABELS = 32, 60, 50
POOL, ASKED = 400, 50
"""Pairs to choose from, and answers of each person."""
SHOWN = (0, 3, 5, 10, 20, 30, 50)
TARGETS = (10, 20, 30)
"""Answers of a person who is asked at random, which the others must do with fewer."""
COLOURS = {"information": BLUE, "thompson": GREEN, "random": GREY}
IMAGES = ROOT / "docs" / "img"
_Row = Mapping[str, Any]


def rows_of(seed: int) -> list[dict[str, Any]]:
    """All ways for the people of one seed, after each answer and averaged over the people: accuracy against gold; the share of
    answers about the pool that the profile expects to foretell; and the share that it does."""
    lab = open_lab()
    people = draw_people(lab, draw_texts(lab), LOW, RATERS, HELD_OUT, seed)
    material = Material(lab, people, LABELS, EPOCHS)
    model = fit_rfm(material, FeaturesConfig(d=D))
    phi = material.hidden(model.backbone) @ model.projection.detach().double().T
    pool = pool_of(people.texts, seed)
    rows = []
    for by in WAYS:
        found = np.stack([asked(people, user, phi, pool, model.mean_weights.double(), by) for user in people.held_out])
        names = ("accuracy", "expected", "foretold")
        curves = {name: [round(float(value), 5) for value in found[:, i].mean(0)] for i, name in enumerate(names)}
        rows.append({"by": by, "seed": seed, "d": D, "raters": RATERS, "labels": LABELS, "pool": POOL, "l2": L2} | curves)
    return rows


def pool_of(texts: Texts, seed: int) -> np.ndarray:
    """[POOL, 2] int, different pairs of training prompts, none of them turned round."""
    drawn = texts.pairs("train", 2 * POOL, random.Random(derive(seed, "pool")))
    different = {frozenset(map(int, pair)): pair for pair in reversed(drawn)}
    return np.array(list(different.values())[:POOL])


def asked(people: People, user: int, phi: Tensor, pool: np.ndarray, mean: Tensor, by: By) -> np.ndarray:
    """One person asked 50 times.

    Args:
        people: who they are one of.
        user: index.
        phi: [T, d] of every text.
        pool: [N, 2] pairs to choose from.
        mean: [d] the mean rater's weights.
        by: the way to choose.

    Returns:
        [3, 51] after 0, 1, ... answers: accuracy; and of the answers that were not given yet, the share that the profile expects
        to foretell and the share that it does.
    """
    differences, judged = differences_of(phi, pool), people.judged(user)
    gap = people.gold[user, pool[:, 0]] - people.gold[user, pool[:, 1]]
    first = expit(people.beta * gap)  # probability that the first is preferred
    prefers = np.random.default_rng(derive(people.seed, "answers of", people.names[user])).random(len(pool)) < first
    marks, signed = (
        torch.zeros(len(pool), dtype=torch.bool),
        torch.where(torch.tensor(prefers)[:, None], differences, -differences),
    )
    generator = torch.Generator().manual_seed(derive(people.seed, by, people.names[user]))
    order: list[int] = []
    found = np.empty((3, ASKED + 1))
    for number in range(ASKED + 1):
        person = fit_person(signed[order], L2, mean)
        scores = person.scores(phi).numpy()
        right = (np.sign(scores[judged[:, 0]] - scores[judged[:, 1]]) + 1) / 2
        left = ~marks
        foretold = np.where((person.scores(differences) > 0).numpy(), first, 1 - first)[left.numpy()]
        found[:, number] = right.mean(), expected_accuracy(differences[left], person), foretold.mean()
        if number < ASKED:
            order.append(choose(differences, marks, person, by, generator))
            marks[order[-1]] = True
    return found


def needed(curve: Sequence[float], accuracy: float) -> float:
    """Answers until a curve first reaches an accuracy, between two of them by a straight line; infinite where it never does."""
    if curve[0] >= accuracy:
        return 0.0
    for n, (before, after) in enumerate(pairwise(curve)):
        if after >= accuracy:
            return n + (accuracy - before) / (after - before)
    return math.inf


def fewer(random_: Sequence[float], active: Sequence[float], number: int) -> float:
    """How many answers fewer a way takes to the accuracy that random has after so many, each to where it is first reached;
    ``ASKED`` stands for infinite."""
    target = random_[number]
    return needed(random_, target) - min(needed(active, target), ASKED)


def report(rows: Sequence[_Row], images: Path = IMAGES) -> None:
    """Print the tables, and draw the figure.

    Args:
        rows: of the results.
        images: directory that the figure is written to.
    """
    of = {by: {row["seed"]: row for row in rows if row["by"] == by} for by in WAYS}
    head = ("", *(f"{n} answers" for n in SHOWN))
    found = [[by, *(level([row["accuracy"][n] for row in of[by].values()]) for n in SHOWN)] for by in WAYS]
    saved = []
    for by in WAYS:
        seeds = sorted(of[by].keys() & of["random"].keys())
        both = [(of[by][seed]["accuracy"], of["random"][seed]["accuracy"]) for seed in seeds]
        if by != "random":
            found.append([f"{by} - random", *(interval_text([mine[n] - theirs[n] for mine, theirs in both]) for n in SHOWN)])
        never = sum(math.isinf(needed(mine, theirs[n])) for mine, theirs in both for n in TARGETS)
        saved.append([by, *(interval_text([fewer(theirs, mine, n) for mine, theirs in both], 1) for n in TARGETS), str(never)])
    own = [[by, *(level([row["expected"][n] - row["foretold"][n] for row in of[by].values()]) for n in SHOWN)] for by in WAYS]
    print(f"accuracy on held-out prompts\n{markdown(head, found)}")
    print("\nanswers fewer than at random, to be as accurate as random is after so many")
    print(markdown(("", *map(str, TARGETS), "never reached"), saved))
    print(f"\nshare of answers that the profile expects to foretell, minus the share that it does\n{markdown(head, own)}")
    plot = figure(of)
    (images / f"{plot.name}.png").write_bytes(plot.render()[1])


def figure(of: Mapping[By, Mapping[int, _Row]]) -> Plot:
    """Accuracy after each answer, and what the profile says of itself.

    Args:
        of: rows by way and seed.
    """
    steps = tuple(range(ASKED + 1))

    def curves(name: str) -> list[Curve]:
        return [
            Curve(by, by, 0, len(found), steps, tuple(over_seeds([row[name][n] for row in found.values()]) for n in steps))
            for by, found in of.items()
        ]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = panels(figure, 2, narrow)
        for ax, name, title in zip(axes, ("accuracy", "expected"), ("against the truth", "as the profile expects"), strict=True):
            draw_curves(ax, curves(name), [(COLOURS[by], 1.0) for by in of])
            ax.set_title(title)
            ax.set_xlabel("answers")
            percent(ax)
        common_legend(figure, axes, 3)

    return Plot("asking", "", "How the next pair is chosen", "Held-out people, held-out prompts.", 2.9, draw, 5.0)


def main() -> None:
    """Compute what is missing, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    results = Results(PATH, KEY)
    if options.what == "run":
        single_thread()
        for seed in options.seeds:
            if results.missing([(by, seed) for by in WAYS], lambda job: job):
                for row in rows_of(seed):
                    results.append(row)
                print(f"seed {seed} is there", flush=True)
    report(results.rows())


if __name__ == "__main__":
    main()
