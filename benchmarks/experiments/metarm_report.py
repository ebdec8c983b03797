"""Tables and the picture of ``benchmarks.experiments.metarm``: paired differences to vanilla with 95% t-intervals over the seeds.

python -m benchmarks.experiments.metarm_report [--figure docs/img/metarm.svg]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.common import RESULTS, Results, by_seed, interval_text, paired
from benchmarks.experiments.metarm import CHOSEN_ETA, KEY, K
from benchmarks.markdown import markdown
from benchmarks.pictures import picture
from evaluation.compare import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Row = Mapping[str, Any]
REWARD_OUTCOMES = ("J", "J_unit", "spread", "rank_wide", "rank", "accuracy", "loss", "calibration_error", "scale")
PPO_OUTCOMES = ("ppo_gold", "ppo_kl", "ppo_length", "ppo_distinct")
PRIMARY = "rank_wide"
INK, DEPLOYED, PRIME = "#22303c", "#2a7f62", "#b5483a"
NAMES = {
    "vanilla": "vanilla",
    "algorithm1": "Algorithm 1, eta {:g}",
    "order2": "second order, eta {:g}",
    "joint": "L - lambda J, lambda {:g}",
    "random": "random direction, eta {:g}",
    "descent": "sign reversed, eta {:g}",
}
VANILLA = {"arm": "vanilla", "deploy": "theta"}


def name(row: _Row) -> str:
    """An arm as the tables call it."""
    if row["arm"] == "vanilla" and row["deploy"] == "theta_prime":
        return f"vanilla, then one ascent of eta {row['strength']:g}"
    return NAMES[row["arm"]].format(row["strength"]) + (", theta' deployed" if row["deploy"] == "theta_prime" else "")


def arms(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """The columns that tell the arms apart, vanilla first."""
    order = list(NAMES)
    keys = {(order.index(row["arm"]), row["deploy"], row["strength"]) for row in rows}
    return [{"arm": order[arm], "deploy": deploy, "strength": strength} for arm, deploy, strength in sorted(keys)]


def table(rows: Sequence[_Row], outcomes: Sequence[str]) -> str:
    """An arm a line: the mean of vanilla, then differences to it over the seeds that have both."""
    levels = [by_seed(rows, outcome, VANILLA).values() for outcome in outcomes]
    lines = [["vanilla (mean)", str(len(levels[0])), *(f"{fmean(level):.3f}" for level in levels)]]
    for arm in arms(rows):
        if arm["arm"] == "vanilla" and arm["deploy"] == "theta":
            continue
        differences = [paired(rows, outcome, arm, VANILLA) for outcome in outcomes]
        lines.append([name(arm), str(len(differences[0])), *map(interval_text, differences)])
    return markdown(("arm", "seeds", *outcomes), lines)


def holm(rows: Sequence[_Row], outcome: str) -> list[tuple[float, float, str, str]]:
    """Paired t-tests of every arm and shift against vanilla, as (adjusted p, difference, shift, arm), smallest first.

    Source: Holm 1979; adjusted p of the i-th smallest of n is max over j <= i of (n - j + 1) p_j, at most 1.
    """
    from scipy.stats import ttest_1samp

    tests: list[tuple[float, float, str, str]] = []
    for shift in sorted({row["shift"] for row in rows}):
        here = [row for row in rows if row["shift"] == shift]
        for arm in arms(here):
            differences = paired(here, outcome, arm, VANILLA)
            if len(differences) > 2 and any(differences):
                tests.append((float(ttest_1samp(differences, 0.0).pvalue), fmean(differences), shift, name(arm)))
    adjusted: list[tuple[float, float, str, str]] = []
    largest = 0.0
    for index, (p, difference, shift, which) in enumerate(sorted(tests)):
        largest = max(largest, min(1.0, (len(tests) - index) * p))
        adjusted.append((largest, difference, shift, which))
    return adjusted


def report(rows: Sequence[_Row]) -> str:
    """All tables as Markdown."""
    main = [row for row in rows if row["part"] == "reward"]
    parts = [
        f"### KL {shift}\n\n" + table([row for row in main if row["shift"] == shift], REWARD_OUTCOMES)
        for shift in sorted({row["shift"] for row in main}, key=float)
    ]
    tests = holm(main, PRIMARY)
    below = [f"KL {shift}, {arm}: {difference:+.3f}, p {p:.2g}" for p, difference, shift, arm in tests if p < 0.05]
    parts.append(f"{PRIMARY}: {len(tests)} comparisons, after Holm's correction below 0.05: {'; '.join(below) or 'none'}")
    for shift in sorted({row["shift"] for row in rows if row["part"] == "ppo"}, key=float):
        here = [row for row in rows if row["part"] == "ppo" and row["shift"] == shift]
        before = fmean(by_seed(here, "gold_before", VANILLA).values())
        parts.append(f"### PPO from KL {shift} (gold before: {before:.3f})\n\n{table(here, PPO_OUTCOMES)}")
    if any(row["part"] == "sweep" for row in rows):
        parts.append("### Sweep at KL 3\n\n" + sweep(rows))
    return "\n\n".join(parts)


def sweep(rows: Sequence[_Row]) -> str:
    """Algorithm 1 at one eta against vanilla, while k, label noise and width change."""
    lines = []
    swept = [row for row in rows if row["part"] == "sweep"]
    plain = [row for row in rows if row["arm"] == "vanilla" and row["deploy"] == "theta" and row["shift"] == "3"]
    for k, flip_rate, hidden in sorted({(row["k"], row["flip_rate"], row["hidden"]) for row in swept}):
        ours = [r for r in swept if r["arm"] != "vanilla" and (r["k"], r["flip_rate"], r["hidden"]) == (k, flip_rate, hidden)]
        theirs = [r for r in plain if r["part"] != "ppo" and (r["flip_rate"], r["hidden"]) == (flip_rate, hidden)]
        if not ours or not theirs:
            continue
        for deploy in ("theta", "theta_prime"):
            arm = {"arm": "algorithm1", "deploy": deploy, "strength": CHOSEN_ETA}
            differences = [paired([*ours, *theirs], outcome, arm, VANILLA) for outcome in REWARD_OUTCOMES]
            what = f"k {k}, {flip_rate:.0%} flips" + (f", width {hidden}" if hidden else "")
            accuracy = f"{fmean(row['accuracy'] for row in theirs):.3f}"
            lines.append([what, deploy, str(len(differences[0])), accuracy, *map(interval_text, differences)])
    return markdown(("setting", "deployed", "seeds", "vanilla accuracy", *REWARD_OUTCOMES), lines)


def draw(rows: Sequence[_Row], path: Path, shift: str = "3") -> None:
    """J, scale-free spread and rank accuracy against eta, for both weights of Algorithm 1, as differences to vanilla."""
    here = [row for row in rows if row["part"] == "reward" and row["shift"] == shift]
    titles = {"J": f"J (k = {K})", "spread": "scale-free spread", PRIMARY: "share of pairs ranked as gold does"}
    with picture(path, 11, 3.4) as figure:
        axes = figure.subplots(1, 3)
        for axis, (outcome, title) in zip(axes, titles.items(), strict=True):
            _panel(axis, here, outcome)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes[0].set_ylabel("difference to vanilla, paired by seed")
        axes[0].legend(frameon=False)


def _panel(axis: Axes, rows: Sequence[_Row], outcome: str) -> None:
    for deploy, label, colour, nudge in (("theta", "theta", DEPLOYED, 0.95), ("theta_prime", "theta'", PRIME, 1.05)):
        etas = [arm["strength"] for arm in arms(rows) if arm["arm"] == "algorithm1" and arm["deploy"] == deploy]
        ours = [{"arm": "algorithm1", "deploy": deploy, "strength": eta} for eta in etas]
        found = [mean_interval(paired(rows, outcome, arm, VANILLA)) for arm in ours]
        means = [mean for mean, _, _ in found]
        bars = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
        axis.errorbar([nudge * eta for eta in etas], means, bars, color=colour, marker="o", capsize=3, label=f"{label} deployed")
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("eta")


def main() -> None:
    """Print the tables; draw the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "metarm.jsonl")
    parser.add_argument("--figure", type=Path, help="where to draw (.svg or .png)")
    options = parser.parse_args()
    rows = Results(options.results, KEY).rows()
    print(report(rows))
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
