"""Real statements: personas as raters of what they would and would not say, each held out in turn.

A file a persona, JSON lines with ``statement`` and ``answer_matching_behavior`` (" Yes": the persona would say it). Rater: the
persona; response: a statement; a pair has one that the persona would say and one that it would not. Statements are split, so
that accuracy is of statements that nobody has judged; the held-out persona's are all new to the features. A frozen sentence
encoder reads the statements (mean over the tokens), and reward features that are linear in what it reads are learnt from the
other personas. The encoder is a directory of the user's, or a small BERT that is pre-trained here on all statements without their
labels: statements to be judged are not new to it, what anybody thinks of them is.

Appends to benchmarks/results/personas.jsonl.

Letters: T statements, F size of an embedding.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiments.common import RESULTS, Results, single_thread
from benchmarks.experiments.people_arms import Adapt, best_weights, by_features, in_units, linear_features
from benchmarks.experiments.people_data import ANSWERS
from benchmarks.experiments.real import SHAPE, pretrain_encoder
from cluster.seeds import derive
from tokens.errors import UserError

PATH = RESULTS / "personas.jsonl"
KEY = ("arm", "persona", "backbone", "seed")
MADE_HERE = "pre-trained here"
STATEMENTS = 500
"""Of each persona, half of which it would say."""
TEST_SHARE = 0.2
LABELS = 400
"""Pairs of each training persona."""
JUDGED = 300
D = 8
L2 = 1.0
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Of a head of one's own on the embeddings; the one that serves the training personas best is taken."""


@dataclass(frozen=True)
class Persona:
    """Statements of one persona, as indices into the embeddings.

    Args:
        name: of it.
        yes: what it would say.
        no: what it would not.
    """

    name: str
    yes: np.ndarray
    no: np.ndarray

    def parts(self, seed: int) -> tuple[Persona, Persona]:
        """Statements to learn from, and those to be measured on."""
        rng = np.random.default_rng(derive(seed, "statements", self.name))
        orders = [rng.permutation(side) for side in (self.yes, self.no)]
        cuts = [round(TEST_SHARE * len(order)) for order in orders]
        test = Persona(self.name, *(order[:cut] for order, cut in zip(orders, cuts, strict=True)))
        return Persona(self.name, *(order[cut:] for order, cut in zip(orders, cuts, strict=True))), test

    def pairs(self, number: int, seed: int, what: str) -> np.ndarray:
        """[number, 2], what the persona would say first."""
        rng = np.random.default_rng(derive(seed, what, self.name))
        return np.stack([rng.choice(self.yes, number), rng.choice(self.no, number)], 1)


def read_personas(data: Path) -> tuple[list[Persona], list[str]]:
    """Equally many statements of both kinds of each file, each once in all of them, and their texts."""
    personas: list[Persona] = []
    texts: list[str] = []
    seen: set[str] = set()
    for path in sorted(data.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(rows)
        sides = []
        for says in (True, False):
            own = [r["statement"] for r in rows if (r["answer_matching_behavior"].strip() == "Yes") == says]
            taken = [text for text in dict.fromkeys(own) if text not in seen][: STATEMENTS // 2]
            seen |= set(taken)
            sides.append(np.arange(len(texts), len(texts) + len(taken)))
            texts += taken
        personas.append(Persona(path.stem, *sides))
    return personas, texts


def pretrained(texts: Sequence[str], cache: Path) -> Path:
    """A small encoder of the statements' language, made once.

    Args:
        texts: statements.
        cache: directory that it is kept in.
    """
    from datasets import Dataset

    from policy.sft import train_tokenizer
    from preferences.sets import PreferenceSet

    out, words = cache / "encoder", cache / "tokenizer"
    if out.is_dir():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".*.partial"):
        shutil.rmtree(left)
    train_tokenizer(texts, SHAPE.vocab_size, words)
    order = random.Random(0).sample(list(texts), len(texts))
    rows = [{"prompt": one, "chosen": other, "rejected": ""} for one, other in zip(order, [*order[1:], order[0]], strict=True)]
    return pretrain_encoder(PreferenceSet(Dataset.from_list(rows), str(cache), "explicit"), words, out)


def embed(backbone: Path, texts: Sequence[str]) -> Tensor:
    """[T, F] float64, the mean of a frozen encoder's last hidden states over the tokens, standardised."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModel.from_pretrained(backbone, use_safetensors=True, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            found[rows] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    found = found.double()
    return (found - found.mean(0)) / found.std(0)


def personas(data: Path | None, backbone: Path | None, cache: Path | None, seeds: Sequence[int]) -> None:
    """Hold out every persona once a seed, and write down what is missing.

    Args:
        data: directory of the JSON lines files.
        backbone: directory of a sentence encoder; None = one is pre-trained.
        cache: where that is kept.
        seeds: of statements, pairs and features.

    Raises:
        UserError: without data, or without either of the other two; or if the data is not what was expected.
    """
    if data is None or (backbone is None) == (cache is None):
        raise UserError(
            "personas need --data, a directory of JSON lines, and either --backbone, a sentence encoder's directory, or --cache, "
            "a directory that one is pre-trained in"
        )
    single_thread()
    known, texts = read_personas(data)
    if len(known) < 3:
        raise UserError(f"{data} holds {len(known)} files *.jsonl, expected at least three personas, a file each")
    name = MADE_HERE if backbone is None else backbone.absolute().name
    results = Results(PATH, KEY)
    missing = results.missing(
        [(seed, place) for seed in seeds for place in range(len(known))],
        lambda job: ("features", known[job[1]].name, name, job[0]),
    )
    if not missing:
        return
    embeddings = embed(backbone or pretrained(texts, cache or Path()), texts)
    for seed, place in missing:
        for row in held_out(embeddings, known, place, seed):
            results.append({"backbone": name} | row)
        print(f"personas: {known[place].name}, seed {seed}, {name}", flush=True)


def held_out(embeddings: Tensor, known: Sequence[Persona], place: int, seed: int) -> list[dict[str, Any]]:
    """What every way makes of a persona that it has not seen; the row by which it counts as done comes last."""
    split = [persona.parts(seed) for persona in known]
    raters = [train for i, (train, _) in enumerate(split) if i != place]
    labels = [rater.pairs(LABELS, seed, "labels") for rater in raters]
    rows, places = np.concatenate(labels), [i for i, own in enumerate(labels) for _ in own]
    phi, mean = in_units(linear_features(embeddings, rows, places, D, derive(seed, "features")), rows, places)
    one = in_units(linear_features(embeddings, rows, [0] * len(rows), 1, derive(seed, "features")), rows, places)
    scaled, none = embeddings / embeddings.shape[1] ** 0.5, torch.zeros(embeddings.shape[1], dtype=torch.float64)
    tests = [test for i, (_, test) in enumerate(split) if i != place]

    def on_raters(l2: float) -> float:
        way = by_features(scaled, none, l2)
        return float(np.mean([_right(way(own[:30]), test, seed) for own, test in zip(labels, tests, strict=True)]))

    ways: dict[str, tuple[Adapt, Adapt]] = {
        "shared": (lambda answers: (one[0] @ one[1]).numpy(),) * 2,
        "own linear head": (by_features(scaled, none, max(PENALTIES, key=on_raters)), best_weights(scaled, none)),
        "features": (by_features(phi, mean, L2), best_weights(phi, mean)),
    }
    train, test = split[place]
    answers, many = train.pairs(max(ANSWERS), seed, "answers"), train.pairs(LABELS, seed, "many")
    found = []
    for arm, (way, oracle) in ways.items():
        row = {"arm": arm, "persona": known[place].name, "d": D, "raters": len(rows) // LABELS, "labels": LABELS, "seed": seed}
        accuracy = {f"accuracy_{n}": _right(way(answers[:n]), test, seed) for n in ANSWERS}
        found.append(row | accuracy | {"accuracy_oracle": _right(oracle(many), test, seed)})
    return found


def _right(scores: np.ndarray, test: Persona, seed: int) -> float:
    """Share of a persona's held-out pairs that are ordered as it would; ties count one half."""
    pairs = test.pairs(JUDGED, seed, "judged")
    return float(((np.sign(scores[pairs[:, 0]] - scores[pairs[:, 1]]) + 1) / 2).mean())
