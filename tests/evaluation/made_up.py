"""Directories of a strength run and a reward run that no run made: formulas and a seed, laid out as the real ones."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from evaluation.json_node import lines_of
from evaluation.studies import AMBIGUOUS_BAND, FLIPPED_BAND, STRONGEST, TREATED_BAND, WEAKEST, StudyRow

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quotes\" $x^2$"
WORDS = ("thank", "you", "for", "asking", "the", "kettle", "boils", "at", "noon", "bread", "keeps", "well", "in", "a", "box")
CONFIG = "name: made-up\nreward: {epochs: 2}\n# <b>not bold</b>\n"
META_FIT: dict[str, float | None] = {
    "J_before": 0.478, "J_after": 0.488, "displacement": 0.0312, "displacement_deployed": None, "alignment_cos": 0.09,
    "duplicate_share": 0.0125, "J_heldout_start": 0.419, "J_heldout_before": 0.467, "J_heldout_after": 0.477, "J_heldout": 0.471,
    "spread_heldout_start": 0.702, "spread_heldout_before": 0.748, "spread_heldout_after": 0.768, "spread_heldout": 0.751,
}  # fmt: skip
"""MetaRM's numbers of a whole fit, by the ledger's names."""
VERSIONS = json.dumps({"rondo": "0.1.0", "python": "3.11.2", "git_commit": None})


def _sentence(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high)))).capitalize() + "."


def make_strength_run(
    directory: Path, *, num: int = 3000, num_members: int = 10, truth: bool = True, label: bool = True, studies: bool = True
) -> Path:
    """STORAGE/strengths/NAME as `strength` leaves it; one pair in ten is for validation."""
    rng = np.random.default_rng(0)
    gap = np.abs(rng.normal(size=num)) + 0.05
    wrong = rng.random(num) < 1 / (1 + np.exp(3 * gap - 0.4))
    signed = np.where(wrong, -gap, gap)
    centre = 2.2 * signed + 0.7 + 0.5 * rng.normal(size=num)
    noise = 0.3 + 0.15 * np.abs(centre - 1.5)  # a U
    margin = centre[:, None] + noise[:, None] * rng.normal(size=(num, num_members))
    rejected = rng.normal(size=(num, num_members))
    chosen = rejected + margin
    prompts = [f"How do I {_sentence(rng, 4, 9).lower()[:-1]}?" for _ in range(num)]
    texts = [[_sentence(rng, 6, 40) for _ in range(num)] for _ in range(2)]
    lowest = int(np.argmin(np.where(np.arange(num) % 10 == 0, np.inf, margin.mean(1))))
    prompts[lowest], texts[0][lowest], texts[1][lowest] = f"{EVIL} prompt", EVIL, "word " * 2000
    columns: dict[str, object] = {
        "id": [f"p{i}" for i in range(num)],
        "prompt": prompts,
        "chosen": texts[0],
        "rejected": texts[1],
        "domain": [""] * num,
        "split": ["validation" if i % 10 == 0 else "train" for i in range(num)],
        "mean preference difference": margin.mean(1),
        "std preference difference": margin.std(1) if num_members > 1 else pa.nulls(num, pa.float64()),
        "chosen score list": list(chosen),
        "rejected score list": list(rejected),
    }
    if truth:
        columns |= {"gold_chosen": signed, "gold_rejected": np.zeros(num)}
    if label:
        says = np.where(rng.random(num) < 0.88, ~wrong, wrong).astype(int)
        columns["GPT4 label"] = [int(v) if i % 10 == 0 and i % 70 else -1 for i, v in enumerate(says)]
    table = pa.table(columns)
    (directory / "strengths").mkdir(parents=True)
    half = num // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, directory / "strengths" / f"part-{number:05d}.parquet")
    card = {
        "kind": "strength", "config_sha256": "0" * 64, "data_sha256": "0" * 64, "num_pairs": num, "num_members": num_members,
        "members": "full", "folds": 1, "memory_bytes": 10**9,
        "seconds": {"prepare": 212.0, "train": 312.0, "train_cpu": 290.0, "score": 41.5},
        "splits": {"train": _split(margin.mean(1), wrong if truth else None)},
    }  # fmt: skip
    _common(directory, card)
    if studies:
        (directory / "studies").mkdir()
        for name, rows in make_studies().items():
            (directory / "studies" / f"{name}.jsonl").write_text(lines_of(rows), "utf-8")
    return directory


def _split(mean: np.ndarray, wrong: np.ndarray | None) -> dict[str, float]:
    """What the card says of the training pairs."""
    train = np.arange(len(mean)) % 10 != 0
    known = {} if wrong is None else {"auroc_wrong": float(roc_auc_score(wrong[train], -mean[train]))}
    return {"num_pairs": int(train.sum()), "negative": float((mean[train] < 0).mean()), **known}


def make_studies(num_seeds: int = 3) -> dict[str, list[StudyRow]]:
    """Rows of every study: accuracies that rise to a level, some of which fall again."""
    rng = np.random.default_rng(1)
    found: dict[str, list[StudyRow]] = {}
    for study, arms in _arms().items():
        sets = {"original": 0.0, "held_out": -0.05} if study == "methods" else {"original": 0.0}
        found[study] = [
            row
            for (arm, (level, decline)), seed, step in product(arms.items(), range(num_seeds), range(0, 201, 20))
            for row in _study_rows(study, arm, seed, step, level, decline, sets, float(rng.normal()))
        ]
    return found


def _study_rows(
    study: str, arm: str, seed: int, step: int, level: float, decline: float, sets: dict[str, float], noise: float
) -> list[StudyRow]:
    risen, fallen = 1 - np.exp(-step / 40), decline * max(0.0, step - 80) / 60
    rows = []
    for where, shift in sets.items():
        value = float(0.5 + (level + shift - 0.5) * risen - fallen + 0.008 * noise)
        rows.append(StudyRow(study, arm, seed, step, 270, where, value, float(1.35 - value + 2 * fallen), 0.05))
    if step:
        loss = float((0.33 if "soft" in arm else 0.02) + 0.67 * (1 - risen))
        rows.append(StudyRow(study, arm, seed, step, 270, "train", 0.9, loss, None))
    return rows


def _arms() -> dict[str, dict[str, tuple[float, float]]]:
    """The level and the late decline of every arm of every study."""
    levels = (0.31, 0.38, 0.46, 0.52, 0.58, 0.63, 0.67, 0.69, 0.70, 0.675)
    bands = {f"{10 * i}-{10 * i + 10}%": level for i, level in enumerate(levels)}
    methods = {
        "none": 0.71,
        "flip": 0.745,
        "soft": 0.735,
        "margin": 0.715,
        "flip+margin": 0.75,
        "soft+margin": 0.748,
        "drop": 0.742,
    }
    kept = ("flip", "flip+soft", "flip+margin", "flip+soft+margin")
    return {
        "deciles": {name: (level, 0.0) for name, level in bands.items()},
        "lowest": {
            f"{name}: {how}": (level, 0.0)
            for name, both in (("0-10%", (0.31, 0.66)), ("10-20%", (0.38, 0.63)))
            for how, level in zip(("none", "flip"), both, strict=True)
        },
        "top": {"none": (0.675, 0.02), "soft": (0.70, 0.0), "margin": (0.68, 0.015), "soft+margin": (0.715, 0.0)},
        "margin": {"none": (0.71, 0.02), "margin": (0.725, 0.015)},
        "methods": {name: (level, 0.025 if name in ("none", "margin") else 0.0) for name, level in methods.items()},
        "growing": {f"{WEAKEST}: {10 * i}%": (0.3 + 0.41 * (i / 10) ** 1.5, 0.01) for i in range(1, 11)}
        | {f"{STRONGEST}: {10 * i}%": (0.68 + 0.06 * float(np.sin(i / 3.4)), 0.02 * (i > 7)) for i in range(1, 11)},
        "bands": {f"{FLIPPED_BAND}: {how}": (level, 0.0) for how, level in zip(kept, (0.66, 0.665, 0.67, 0.685), strict=True)}
        | {f"{AMBIGUOUS_BAND}: {how}": (level, 0.0) for how, level in (("none", 0.53), ("soft", 0.532), ("margin", 0.545))}
        | {f"{TREATED_BAND}: {how}": (level, 0.0) for how, level in (("none", 0.71), ("flip", 0.74), ("soft", 0.73))},
    }


def make_reward_run(directory: Path, *, shifted: bool = True, features: bool = True, validation: bool = True) -> Path:
    """STORAGE/rewards/NAME as `reward` leaves it: two epochs, the second of which overfits."""
    rng, of_meta = np.random.default_rng(2), np.random.default_rng(3)
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, 189):
        memory = 0.09 if step > 94 else 0.0
        loss = 0.45 + 0.25 * np.exp(-step / 30) - memory + 0.05 * rng.normal()
        accuracy = 0.78 - 0.28 * np.exp(-step / 30) + memory + 0.05 * rng.normal()
        lines.append({"phase": "reward", "step": step, "reward/loss": loss, "reward/accuracy": min(1.0, accuracy)})
        if shifted:
            lines[-1] |= meta_metrics(step, of_meta)
    levels = {"original": 0.775, "relabelled": 0.79, "agreement": 0.83, "held_out": 0.71}
    for step in range(0, 189, 9) if validation else ():
        risen, fallen = 1 - np.exp(-step / 35), 0.03 * max(0, step - 94) / 94
        row: dict[str, object] = {"phase": "validation", "step": step}
        for name, level in levels.items():
            row[f"validation/{name}/accuracy"] = 0.5 + (level - 0.5) * risen - fallen + 0.004 * rng.normal()
            row[f"validation/{name}/loss"] = 0.69 - 0.45 * (level - 0.5) * risen + 3 * fallen
            row[f"validation/{name}/ece"] = 0.03 + 1.5 * fallen + 0.004 * abs(rng.normal())
        inflation = 0.4 * risen + (0.9 if step > 94 else 0.0)
        row |= {
            "scores/chosen_mean": inflation + 0.6 * risen,
            "scores/rejected_mean": inflation - 0.6 * risen,
            "scores/std": 0.3 + risen,
        }
        lines.append(row)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    measured: dict[str, float] = {}
    if validation:
        rows = []
        for name, level in levels.items():
            measured[f"validation/{name}/ece"] = 0.04 + 0.1 * (0.8 - level)
            rejected = rng.normal(size=400)
            chosen = rejected + rng.normal(2.2 * (level - 0.5) / 0.27, 1.6, 400)
            rows += [
                {"id": f"v{i}", "set": name, "chosen": c, "rejected": r}
                for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
            ]
        pq.write_table(pa.Table.from_pylist(rows), directory / "scores.parquet")
    if validation and features:
        vectors = rng.normal(size=(2, 200, 16)) + np.array([0.9, -0.9])[:, None, None] * np.eye(16)[0]
        sides = [
            {"id": f"v{i}", "side": side, "vector": vectors[j, i].astype(np.float32)}
            for j, side in enumerate(("chosen", "rejected"))
            for i in range(200)
        ]
        pq.write_table(pa.Table.from_pylist(sides), directory / "features.parquet")
    if shifted:
        rows = [
            {
                "prompt_id": f"m{i}",
                "sample": j,
                "score_vanilla": base + 0.25 * rng.normal(),
                "score_metarm": base + 0.6 * rng.normal(),
                "kept_back": i % 10 == 3,
            }
            for i in range(100)
            for base in [rng.normal()]
            for j in range(5)
        ]
        pq.write_table(pa.Table.from_pylist(rows), directory / "shifted.parquet")
    card = {"kind": "reward", "config_sha256": "0" * 64, "num_steps": 188, "planned_steps": 188, "validation": measured}
    fit = {"loss": 0.5, "accuracy": 0.75, "num_steps": 188, "best_step": None} | (
        META_FIT if shifted else dict.fromkeys(META_FIT)
    )
    _common(directory, card | {"fit": fit})
    return directory


def meta_metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    """MetaRM's numbers of one step: the ascent raises J on the prompts kept back, and the spread with it."""
    risen = 1 - np.exp(-step / 60)
    row = {
        "reward/J": 0.42 + 0.06 * risen + 0.01 * rng.normal(),
        "reward/displacement": 0.02 + 0.01 * risen + 0.001 * rng.normal(),
        "reward/alignment_cos": 0.1 * risen + 0.03 * rng.normal(),
        "reward/duplicates": 1.0,
    }
    if step % 10 == 1:
        row |= {"reward/J_ascended": row["reward/J"] + 0.01}
        row |= {"reward/J_heldout": 0.42 + 0.05 * risen, "reward/J_heldout_ascended": 0.425 + 0.055 * risen}
        row |= {"reward/spread_heldout": 0.7 + 0.05 * risen, "reward/spread_heldout_ascended": 0.71 + 0.06 * risen}
    return {name: float(value) for name, value in row.items()}


def _common(directory: Path, card: dict[str, object]) -> None:
    (directory / "card.json").write_text(json.dumps(card), "utf-8")
    (directory / "config.yaml").write_text(CONFIG, "utf-8")
    (directory / "versions.json").write_text(VERSIONS, "utf-8")
