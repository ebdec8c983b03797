"""What a strength run came to, in numbers: the card that is written last, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actors.members import MemberReport
from cluster.config import RunConfig
from cluster.strength_scores import Scored

GOLD = ("gold_chosen", "gold_rejected")
"""Columns of the sandbox: the truth about both responses."""
FLIPPED = "flipped"


def read_columns(strengths: Path) -> dict[str, np.ndarray]:
    """Numbers of all pairs, without their texts and members.

    Args:
        strengths: directory of part files.

    Returns:
        By name: ``split``, ``mean``, ``std`` and, where they are, the sandbox's columns.
    """
    import pyarrow.dataset as ds

    from preferences.strength_files import MEAN, STD

    data = ds.dataset(sorted(str(path) for path in strengths.glob("part-*.parquet")))
    names = {"split": "split", "mean": MEAN, "std": STD}
    names |= {name: name for name in (*GOLD, FLIPPED) if name in data.schema.names}
    table = data.to_table(columns=list(names.values()))
    return {ours: np.asarray(table[theirs].to_numpy(zero_copy_only=False)) for ours, theirs in names.items()}


def area_under_curve(wrong: np.ndarray, mean: np.ndarray) -> float | None:
    """How well low strength finds the pairs that are wrong: AUROC of -mu; 0.5 = not at all, 1 = every one lies below every other.

    Args:
        wrong: [N] bool.
        mean: [N] strength.

    Returns:
        The area; None where all are wrong or none is.
    """
    from sklearn.metrics import roc_auc_score

    return None if wrong.all() or not wrong.any() else float(roc_auc_score(wrong, -mean))


def summaries(columns: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """What there is to say of each split.

    Args:
        columns: as ``read_columns`` gives them.

    Returns:
        By split: number of pairs, mean and standard deviation of mu, share of pairs with mu < 0, mean sigma (None with one
        member); in the sandbox how well low mu finds labels that contradict the truth, and those that were flipped on purpose.
    """
    found: dict[str, dict[str, float | None]] = {}
    for split in ("train", "validation"):
        rows = columns["split"] == split
        if not rows.any():
            continue
        mean, std = columns["mean"][rows], columns["std"][rows].astype(float)
        found[split] = {
            "num_pairs": int(rows.sum()),
            "mean": float(mean.mean()),
            "std": float(mean.std()),
            "negative": float((mean < 0).mean()),
            "sigma": None if np.isnan(std).any() else float(std.mean()),
        }
        if set(GOLD) <= columns.keys():
            chosen, rejected = (columns[name][rows] for name in GOLD)
            found[split] |= {"wrong": float((chosen < rejected).mean()), "auroc_wrong": area_under_curve(chosen < rejected, mean)}
        if FLIPPED in columns:
            found[split]["auroc_flipped"] = area_under_curve(columns[FLIPPED][rows].astype(bool), mean)
    return found


def card_of(
    config: RunConfig,
    identity: dict[str, str],
    columns: dict[str, np.ndarray],
    reports: Sequence[MemberReport],
    scored: Scored,
    num_distinct: int,
    dropped: dict[str, int],
    prepare_s: float,
) -> dict[str, Any]:
    """The card.

    Args:
        config: of the run.
        identity: digests of config and data.
        columns: as ``read_columns`` gives them.
        reports: of all fits.
        scored: what this call scored; what earlier calls did is not in its time.
        num_distinct: pairs of different text, in all.
        dropped: pairs that were not scored, by reason.
        prepare_s: seconds that making the SFT model took in this call.
    """
    return {
        "kind": "strength",
        **identity,
        "num_pairs": len(columns["mean"]),
        "num_distinct": num_distinct,
        "dropped": dropped,
        "num_members": config.strength.num_members,
        "members": config.strength.members,
        "folds": config.strength.folds,
        "seconds": {
            "prepare": round(prepare_s, 3),
            "train": round(sum(report.seconds for report in reports), 3),
            "train_cpu": round(sum(report.cpu_seconds for report in reports), 3),
            "score": round(scored.seconds, 3),
        },
        "scored": {
            "pairs": scored.num_pairs,
            "distinct_pairs": scored.num_distinct,
            "distinct_sequences": scored.num_sequences,
            "pairs_per_second": _rate(scored.num_pairs, scored.seconds),
            "pairs_per_second_of_a_process": _rate(scored.num_pairs, scored.worker_seconds),
            "pairs_per_cpu_second": _rate(scored.num_pairs, scored.cpu_seconds),
        },
        "memory_bytes": max(report.peak_bytes for report in reports),
        "memory_above_start_bytes": max(report.peak_bytes - report.start_bytes for report in reports),
        "weight_bytes": sum(report.weight_bytes for report in reports),
        "splits": summaries(columns),
    }


def table_of(card: dict[str, Any]) -> Table:
    """The card as a person reads it."""
    table = Table(title=f"{card['num_members']} members ({card['members']}), {_folds(card['folds'])}", title_justify="left")
    names = {
        "num_pairs": "pairs",
        "mean": "mean mu",
        "std": "std mu",
        "negative": "mu < 0",
        "sigma": "mean sigma",
        "auroc_wrong": "AUROC wrong labels",
    }
    shown = {key: name for key, name in names.items() if any(key in split for split in card["splits"].values())}
    table.add_column("split")
    for name in shown.values():
        table.add_column(name, justify="right")
    for split, numbers in card["splits"].items():
        table.add_row(split, *(_number(key, numbers[key]) for key in shown))
    seconds, rate = card["seconds"], card["scored"]["pairs_per_second_of_a_process"]
    speed = f", {rate:,.1f} pairs/s a process" if rate else ""
    table.caption = (
        f"training {seconds['train']:,.1f} s in all, peak {card['memory_bytes'] / 2**30:.2f} GiB a process, "
        f"weights {card['weight_bytes'] / 2**20:,.1f} MiB; scoring {seconds['score']:,.1f} s{speed}"
    )
    table.caption_justify = "left"
    return table


def _folds(folds: int) -> str:
    return "each scores what it was trained on" if folds == 1 else f"cross-fitted in {folds} folds"


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,d}" if key == "num_pairs" else f"{value:.1%}" if key == "negative" else f"{value:.3f}"


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds else None
