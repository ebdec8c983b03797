"""What cheaper members of a strength ensemble cost, and how far their strengths are those of whole models.

    python -m benchmarks.members configs/quickstart.yaml --strength.num_members 4

Trains full, lora and heads on the same pairs and scores the same pairs with each, by the command's own code (a run that is there
is read, not made again). For each: CPU seconds of training, peak memory of a training process above what it holds without a
model, bytes of weights and CPU seconds per scored pair, all as ratios to full; Spearman's correlation of mu and of sigma with
full's; how well -mu finds wrong labels, and the accuracy on validation pairs. The two halves of full's members against each
other say how far two ensembles of the same kind agree: no other kind can be asked for more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from cluster.config import RunConfig
from cluster.console import Console
from cluster.load_config import load_config
from cluster.run_directory import versions
from cluster.strength import strength
from preferences.strength import Strengths, read_strengths
from rm.config import MemberKind

KINDS: tuple[MemberKind, ...] = ("full", "lora", "heads")
RESULTS = Path(__file__).parent / "results" / "members.jsonl"


def of_kind(config: RunConfig, kind: MemberKind) -> RunConfig:
    """The same run with other members, under a name of its own."""
    members = config.strength.model_copy(update={"members": kind})
    return config.model_copy(update={"name": f"{config.name}-members-{kind}", "strength": members})


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two columns."""
    return round(float(spearmanr(one, other).statistic), 4)


def in_order(strengths: Strengths) -> tuple[Strengths, Strengths]:
    """Training and validation pairs, by id: parts are written as they come."""
    order = sorted(range(len(strengths)), key=lambda i: strengths.ids[i])
    train, validation = ([i for i in order if strengths.splits[i] == split] for split in ("train", "validation"))
    return strengths.select(train), strengths.select(validation)


def compare(cards: dict[str, dict[str, Any]], found: dict[str, Strengths]) -> list[dict[str, Any]]:
    """One row a kind.

    Args:
        cards: of each kind.
        found: strengths of each kind.
    """
    base, (whole, _) = cards["full"], in_order(found["full"])
    rows = []
    for kind, card in cards.items():
        train, validation = in_order(found[kind])
        assert train.ids == whole.ids
        several = train.num_members > 1
        rows.append(
            {
                "id": "members",
                "what": kind,
                "num_members": card["num_members"],
                "num_pairs": card["num_pairs"],
                "train_seconds": card["seconds"]["train"],
                "train_cpu_seconds": card["seconds"]["train_cpu"],
                "train_ratio": round(card["seconds"]["train_cpu"] / base["seconds"]["train_cpu"], 4),
                "memory_bytes": card["memory_above_start_bytes"],
                "memory_ratio": round(card["memory_above_start_bytes"] / base["memory_above_start_bytes"], 4),
                "weight_bytes": card["weight_bytes"],
                "weight_ratio": round(card["weight_bytes"] / base["weight_bytes"], 4),
                "score_ratio": _per_pair(card, base),
                "spearman_mu": correlation(train.mean, whole.mean),
                "spearman_sigma": correlation(train.std, whole.std) if several else None,
                "mean_sigma": round(float(train.std.mean()), 4) if several else None,
                "auroc_wrong": card["splits"]["train"]["auroc_wrong"] if "auroc_wrong" in card["splits"]["train"] else None,
                "validation_accuracy": round(float((validation.mean > 0).mean()), 4) if len(validation) else None,
            }
        )
    return rows


def _per_pair(card: dict[str, Any], base: dict[str, Any]) -> float | None:
    ours, theirs = (each["scored"]["pairs_per_cpu_second"] for each in (card, base))
    return round(theirs / ours, 4) if ours and theirs else None


def halves(strengths: Strengths) -> float | None:
    """Correlation of mu by the first half of the members with mu by the second."""
    middle = strengths.num_members // 2
    if not middle:
        return None
    margin = in_order(strengths)[0].margin
    return correlation(margin[:, :middle].mean(1), margin[:, middle : 2 * middle].mean(1))


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Make or read the three runs, print and append what they say.

    Args:
        arguments: CONFIG and overrides; None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The rows.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    config = load_config(Path(given[0]), given[1:])
    cards: dict[str, dict[str, Any]] = {}
    found: dict[str, Strengths] = {}
    for kind in KINDS:
        path = strength(of_kind(config, kind), Console())
        cards[kind], found[kind] = json.loads((path / "card.json").read_text()), read_strengths(path)
    rows = compare(cards, found)
    agreement = halves(found["full"])
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items() if key != "id"))
    print(f"the halves of full's members agree on mu to {agreement}")
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "halves_of_full": agreement, "config": config.name, "versions": versions()}) + "\n")
    return rows


if __name__ == "__main__":
    main()
