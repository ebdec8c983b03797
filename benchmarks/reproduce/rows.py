"""What is told of the rows of the papers' tables: the round that validation chose, differences by seed, gold at one KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log, sqrt
from typing import Any

import numpy as np

from benchmarks.reproduce.arms import ARMS, CHOSEN, Item

Row = Mapping[str, Any]


def best(row: Row) -> Mapping[str, Any]:
    """The round that validation prompts choose: the highest mean of the judge, of equals the first. Never SFT."""
    rounds: list[Mapping[str, Any]] = row["rounds"][1:]
    return max(rounds, key=lambda each: (each["validation"], -each["round"]))


def last(row: Row) -> Mapping[str, Any]:
    """The last round."""
    found: Mapping[str, Any] = row["rounds"][-1]
    return found


def gold(row: Row) -> float:
    """Of the best round."""
    return float(best(row)["gold"])


def last_gold(row: Row) -> float:
    """Of the last round."""
    return float(last(row)["gold"])


def margin(row: Row) -> float:
    """Share of test prompts won against SFT, less the share lost, of the best round."""
    return float(best(row)["margin"])


def log_kl(row: Row) -> float:
    """Of the last round; a run that goes off does not drown the others."""
    return log(last(row)["kl"])


def fallen(row: Row) -> float:
    """Gold of the best round less that of the last: by how much it is worse not to have stopped."""
    return gold(row) - last_gold(row)


def has_rounds(row: Row) -> bool:
    """Whether there is more than one to choose from."""
    return len(row["rounds"]) > 2


def evenness(row: Row) -> float:
    """Share of the variance of KL over PPO steps that a straight line explains (R squared): 1 where it grows steadily."""
    kl = np.asarray(row["step_kl"], dtype=np.float64)
    return float(np.corrcoef(np.arange(len(kl)), kl)[0, 1] ** 2)


def log_jumps(row: Row) -> float:
    """Log of how much the score jumps: the standard deviation of its change from one PPO step to the next, over its range."""
    score = np.asarray(row["step_score"], dtype=np.float64)
    return log(float(np.diff(score).std() / np.ptp(score)))


def of_arm(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    """Rows of an arm by seed; of ``CHOSEN`` arms, where all are there, the one with the best round on validation."""
    if arm not in CHOSEN:
        return {row["seed"]: row for row in rows if row["arm"] == arm and row["seed"] in ARMS[arm].seeds}
    each = [of_arm(rows, one) for one in CHOSEN[arm]]
    seeds = set.intersection(*map(set, each))
    return {seed: max((one[seed] for one in each), key=lambda row: best(row)["validation"]) for seed in sorted(seeds)}


def stations(rows: Sequence[Row], arm: str) -> dict[int, list[Mapping[str, Any]]]:
    """SFT and the rounds of an arm, by seed; of a ``CHOSEN`` arm whose runs have one round, SFT and that of each of its runs."""
    found = of_arm(rows, arm)
    if arm not in CHOSEN or all(map(has_rounds, found.values())):
        return {seed: row["rounds"] for seed, row in found.items()}
    return {seed: [row["rounds"][0], *(best(of_arm(rows, one)[seed]) for one in CHOSEN[arm])] for seed, row in found.items()}


def planned(*arms: str) -> int:
    """Seeds that all of some arms have."""
    return len(set.intersection(*(set(ARMS[one].seeds) for arm in arms for one in (CHOSEN[arm] if arm in CHOSEN else (arm,)))))


def elsewhere(rows: Sequence[Row]) -> list[Row]:
    """The rows with what is known of the other domains in place of the own, where it is."""
    return [
        {**row, "rounds": [{**each, **each["elsewhere"]} for each in row["rounds"]]}
        for row in rows
        if "elsewhere" in row["rounds"][0]
    ]


def told_in(rows: Sequence[Row], item: Item) -> Sequence[Row]:
    """The rows as an item tells them: of the own domains, or of the others."""
    return elsewhere(rows) if item.elsewhere else rows


def paired(rows: Sequence[Row], arm: str, base: str, value: Callable[[Row], float]) -> list[float]:
    """arm - base, seed by seed, over the seeds that have both."""
    ours, theirs = of_arm(rows, arm), of_arm(rows, base)
    return [value(ours[seed]) - value(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def matched(rows: Sequence[Row], arm: str, base: str) -> list[float]:
    """Gold of the arm's best round less the base's, seed by seed, where both are as far from SFT as the nearer of the two."""
    found = []
    for seed in sorted(of_arm(rows, arm).keys() & of_arm(rows, base).keys()):
        one, other = way_of(rows, arm, seed), way_of(rows, base, seed)
        distance = min(one[-1][0], other[-1][0])
        found.append(at(one, distance) - at(other, distance))
    return found


def way_of(rows: Sequence[Row], arm: str, seed: int) -> list[tuple[float, float]]:
    """An arm's way from SFT to its best round, by what lies no further from SFT than that: sqrt(KL) and gold, the nearest first.

    It leads by the rounds before the best one; of a ``CHOSEN`` arm also by those of the runs that were not chosen, each up to its
    own best round: what the arm can have at a distance is not on a straight line to where it went.
    """
    runs = [of_arm(rows, one)[seed] for one in (CHOSEN[arm] if arm in CHOSEN else (arm,))]
    end = best(of_arm(rows, arm)[seed])
    passed = [each for run in runs for each in run["rounds"][1:] if each["round"] <= best(run)["round"]]
    points = {sqrt(max(each["kl"], 0.0)): float(each["gold"]) for each in passed if each["kl"] <= end["kl"]}
    return sorted(({0.0: float(runs[0]["rounds"][0]["gold"])} | points).items())


def at(way: Sequence[tuple[float, float]], distance: float) -> float:
    """Gold on a way at a distance from SFT (sqrt(KL)), linear between its points; beyond its end that of the end."""
    return float(np.interp(distance, [point for point, _ in way], [golds for _, golds in way]))
