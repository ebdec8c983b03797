"""What cheaper members of a strength ensemble cost, and how far their strengths are those of whole models.

    python -m benchmarks.members configs/quickstart.yaml --strength.num_members 4 --seeds 1 2 3

Trains full, lora and heads on the same pairs and scores the same pairs with each, by the command's own code (a run that is there
is read, not made again). For each: CPU seconds of training, peak memory of a training process above what it holds without a
model, bytes of weights and CPU seconds per scored pair, all as ratios to full; Spearman's correlation of mu and of sigma with
full's; how well -mu finds wrong labels, and the accuracy on validation pairs. The two halves of full's members against each
other say how far two ensembles of the same kind agree: no other kind can be asked for more.

With `--seeds` all of it once for each seed of the config; ratios and correlations are to full of the same seed, and the table at
the end has their means and their least and greatest values. A row without `seed` in the results is of the config's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from cluster.config import RunConfig
from cluster.console import Console
from cluster.load_config import load_config
from cluster.strength import strength
from cluster.versions import versions
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


SHOWN = (
    "train_ratio",
    "memory_ratio",
    "weight_ratio",
    "score_ratio",
    "spearman_mu",
    "spearman_sigma",
    "mean_sigma",
    "auroc_wrong",
    "validation_accuracy",
)
"""What the table over the seeds has of each row."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and range over the seeds of every kind, as a Markdown table.

    Args:
        rows: of all seeds, as ``compare`` gives them; a value that one of a kind's rows lacks is not shown for that kind.
    """
    kinds = [kind for kind in KINDS if any(row["what"] == kind for row in rows)]
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for key in SHOWN:
        cells = []
        for kind in kinds:
            values = [row[key] for row in rows if row["what"] == kind]
            if any(value is None for value in values):
                cells.append("-")
            else:
                cells.append(f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Make or read the three runs of every seed, print and append what they say.

    Args:
        arguments: CONFIG, ``--seeds`` and overrides; None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The rows, seed by seed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of the config, one after another (default: its own)")
    options, overrides = parser.parse_known_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds or [None]:
        words = overrides
        if seed is not None:
            words = [*overrides, "--seed", str(seed), "--name", f"{load_config(options.config, overrides).name}-seed-{seed}"]
        rows += of_seed(load_config(options.config, words), seed, results)
    if options.seeds:
        print(table(rows))
    return rows


def of_seed(config: RunConfig, seed: int | None, results: Path) -> list[dict[str, Any]]:
    """The same for one seed.

    Args:
        config: of the three runs, with that seed.
        seed: noted in the rows; None = the config's own, and nothing is noted.
        results: JSON lines to append to.
    """
    cards: dict[str, dict[str, Any]] = {}
    found: dict[str, Strengths] = {}
    for kind in KINDS:
        path = strength(of_kind(config, kind), Console())
        cards[kind], found[kind] = json.loads((path / "card.json").read_text()), read_strengths(path)
    rows = [row | ({} if seed is None else {"seed": seed}) for row in compare(cards, found)]
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
