"""What ``benchmarks.experiments.generalize`` prints: every arm beside pooled training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.experiments.common import interval_text, level
from benchmarks.markdown import markdown

BETAS = (1.0, 4.0)
BASELINE = f"pooled {BETAS[0]:g}"
ARMS = (
    *(f"{name} {beta:g}" for beta in BETAS for name in ("pooled", "bilevel")),
    *("metarm", "both", "nearest", "oracle", "sft", "dpo"),
)
AGAINST = {f"bilevel {beta:g}": f"pooled {beta:g}" for beta in BETAS} | {"both": "metarm"}
"""What an arm differs from in one thing alone: the references' offset."""
OUTCOMES = ("reward", "policy", "gold", "tuned")


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every arm with its 95% interval, its difference to pooled, and in how many domains it is above pooled.

    Args:
        rows: of the results. The interval is over seeds where there are several (of each, the mean over domains), else over
            domains.
    """
    parts = []
    for outcome in OUTCOMES:
        lines = []
        for arm in ARMS:
            own = [row for row in rows if row["arm"] == arm and outcome in row and row[outcome] is not None]
            if own:
                gains = _gains(rows, outcome, own, BASELINE)
                by_domain = [fmean(g for _, d, g in gains if d == name) for name in sorted({d for _, d, _ in gains})]
                alone = _gains(rows, outcome, own, AGAINST[arm]) if arm in AGAINST else []
                values = [(row["seed"], row["domain"], row[outcome]) for row in own]
                lines.append(
                    (
                        arm,
                        level(_spread(values)),
                        "" if arm == BASELINE else interval_text(_spread(gains)),
                        "" if arm == BASELINE else f"{sum(g > 0 for g in by_domain)} of {len(by_domain)}",
                        f"{interval_text(_spread(alone))} ({AGAINST[arm]})" if alone else "",
                    )
                )
        if lines:
            heads = (outcome, "mean", f"above {BASELINE}", "domains won", "the offset alone")
            parts.append(f"{outcome}\n" + markdown(heads, lines))
    return "\n\n".join(parts)


def _gains(
    rows: Sequence[Mapping[str, Any]], outcome: str, own: Sequence[Mapping[str, Any]], against: str
) -> list[tuple[int, str, float]]:
    other = {(row["seed"], row["domain"]): row[outcome] for row in rows if row["arm"] == against}
    return [(row["seed"], row["domain"], row[outcome] - other[row["seed"], row["domain"]]) for row in own]


def _spread(values: Sequence[tuple[int, str, float]]) -> list[float]:
    seeds = sorted({seed for seed, _, _ in values})
    if len(seeds) > 1:
        return [fmean(value for at, _, value in values if at == seed) for seed in seeds]
    return [value for _, _, value in values]
