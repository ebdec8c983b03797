"""The page of the paper's tables made again: from the raw rows alone, and what was not run reads "not run"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.experiments.common import interval_text, level
from benchmarks.markdown import markdown
from benchmarks.reproduce.arms import ARMS, CHOSEN, ITEMS, Item
from evaluation.compare import mean_interval

Row = Mapping[str, Any]
NOT_RUN = "not run"
UNTOLD = "cannot be told at this scale"


def best(row: Row) -> Mapping[str, Any]:
    """The round that validation prompts choose, as `best/` of a run does: the highest mean of the judge, of equals the first.

    Never SFT.
    """
    rounds: list[Mapping[str, Any]] = row["rounds"][1:]
    return max(rounds, key=lambda each: (each["validation"], -each["round"]))


def last(row: Row) -> Mapping[str, Any]:
    """The last round."""
    found: Mapping[str, Any] = row["rounds"][-1]
    return found


def gold(row: Row) -> float:
    """Of the best round."""
    return float(best(row)["gold"])


def final_kl(row: Row) -> float:
    """Of the last round, nats."""
    return float(last(row)["kl"])


def fallen(row: Row) -> float:
    """Gold of the last round, below the highest of all rounds; 0 where the last is it."""
    return max(float(each["gold"]) for each in row["rounds"]) - float(last(row)["gold"])


def of_arm(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    """Rows of an arm by seed; of ``CHOSEN`` arms, where all are there, the one with the best round on validation."""
    if arm not in CHOSEN:
        return {row["seed"]: row for row in rows if row["arm"] == arm}
    each = [of_arm(rows, one) for one in CHOSEN[arm]]
    seeds = set.intersection(*map(set, each))
    return {seed: max((one[seed] for one in each), key=lambda row: best(row)["validation"]) for seed in sorted(seeds)}


def paired(rows: Sequence[Row], arm: str, base: str, value: Callable[[Row], float]) -> list[float]:
    """arm - base, seed by seed, over the seeds that have both."""
    ours, theirs = of_arm(rows, arm), of_arm(rows, base)
    return [value(ours[seed]) - value(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def verdict(differences: Sequence[float], above: bool = True) -> str:
    """Whether a claim that a difference is above 0 (or below) holds: by its 95% t-interval over the seeds.

    Args:
        differences: of each seed.
        above: what the claim says.
    """
    if len(differences) < 2:
        return NOT_RUN
    _, low, high = mean_interval(list(differences))
    if low > 0 or high < 0:
        return "holds" if (low > 0) == above else "does not hold"
    return UNTOLD


def at_kl(row: Row, kl: float) -> float:
    """Gold of a run where it is as far from SFT as another: linear in sqrt(KL) between its rounds, at most its last.

    Args:
        row: of the run.
        kl: nats.
    """
    far = {0.0 if each["round"] < 0 else sqrt(max(each["kl"], 0.0)): float(each["gold"]) for each in row["rounds"]}
    points = sorted(far)
    return float(np.interp(sqrt(max(kl, 0.0)), points, [far[point] for point in points]))


def by_round(rows: Sequence[Row], arm: str) -> str:
    """Every round of an arm on the test prompts."""
    seeds = list(of_arm(rows, arm).values())
    if not seeds:
        return NOT_RUN
    lines: list[tuple[str, ...]] = [
        ("SFT", "-", "-", "-", "-", "-", level([row["rounds"][0]["gold"] for row in seeds]), "-", "-")
    ]
    for index in range(1, min(len(row["rounds"]) for row in seeds)):
        each = [row["rounds"][index] for row in seeds]
        before = [row["rounds"][index - 1] for row in seeds]
        rise = [a["gold"] - b["gold"] for a, b in zip(each, before, strict=True)]
        shares = [f"{fmean(one[name] for one in each):.0%}" for name in ("win", "tie", "lose")]
        kl, proxy = (level([one[name] for one in each], 2) for name in ("kl", "proxy"))
        margin, gold = interval_text([one["margin"] for one in each]), level([one["gold"] for one in each])
        lines.append((f"round {index}", *shares, margin, interval_text(rise), gold, kl, proxy))
    return markdown(("policy", "win", "tie", "lose", "win - lose", "gold - the round before's", "gold", "KL", "proxy"), lines)


def against(rows: Sequence[Row], item: Item) -> str:
    """Every arm of an item beside its base: the round that validation chose, and the last."""
    assert item.base is not None
    lines: list[tuple[str, ...]] = []
    for arm in item.arms:
        own = list(of_arm(rows, arm).values())
        if not own:
            lines.append((arm, NOT_RUN, *[""] * 7))
            continue
        better = paired(rows, arm, item.base, gold)
        matched = [
            best(row)["gold"] - at_kl(other, best(row)["kl"])
            for seed, row in of_arm(rows, arm).items()
            if (other := of_arm(rows, item.base).get(seed)) is not None
        ]
        grown = paired(rows, arm, item.base, final_kl)
        lines.append(
            (
                arm,
                str(len(own)),
                interval_text([best(row)["margin"] for row in own]),
                level([gold(row) for row in own]),
                "" if arm == item.base else interval_text(better),
                "" if arm == item.base else interval_text(matched),
                level([last(row)["gold"] for row in own]),
                level([fallen(row) for row in own]),
                level([final_kl(row) for row in own], 2) + ("" if arm == item.base else f" ({interval_text(grown, 2)})"),
            )
        )
    heads = (
        "arm", "seeds", "win - lose, best round", "gold, best round", f"above {item.base}", "at its KL", "gold, last round",
        "fallen from its highest", "KL, last round (above)",
    )  # fmt: skip
    return markdown(heads, lines)


def claims(rows: Sequence[Row]) -> str:
    """Paper's claim, our figure, and whether it holds."""
    iterated = list(of_arm(rows, "iterated").values())
    rise = [best(row)["gold"] - row["rounds"][1]["gold"] for row in iterated]
    fall = [last(row)["gold"] - best(row)["gold"] for row in iterated]
    said: list[tuple[str, list[float], bool]] = [
        ("Table 2: later rounds beat the first (best round's gold - first round's)", rise, True),
        ("Table 2: it falls after the best round (last round's gold - best round's)", fall, False),
        *((f"Table 3: iterated beats {other} (gold of the best round)", paired(rows, "iterated", other, gold), True)
          for other in ("vanilla PPO", "DPO", "best of 16")),
        ("Fig. 15: S_k from the new domain beats vanilla PPO there",
         paired(rows, "new domain, S_k from it", "new domain, vanilla PPO", gold), True),
        ("Fig. 15: S_k from the new domain beats S_k from the old ones",
         paired(rows, "new domain, S_k from it", "new domain, S_k from the old ones", gold), True),
        *((f"Fig. 9 and 10: KL grows less without a penalty under {method} (last KL)",
           paired(rows, f"no KL, {method}", "no KL", final_kl), False) for method in ("margin", "flip", "soft+margin")),
        *((f"Fig. 9 and 10: {method} wins (gold of the best round)", paired(rows, f"no KL, {method}", "no KL", gold), True)
          for method in ("margin", "flip", "soft+margin")),
        *((f"Fig. 12 and 13: {method} beats plain PPO (gold of the best round)",
           paired(rows, f"PPO, {method}", "PPO", gold), True) for method in ("SimCSE", "SwAV")),
        *((f"Coste et al.: {rule} is less over-optimised than one model, {flips} flips (fall from the highest gold)",
           paired(rows, f"{rule}, {flips} flips", f"single, {flips} flips", fallen), False)
          for flips in ("0%", "25%") for rule in ("mean", "worst case", "mean - std")),
        ("MetaRM: an iterated run with the ascent (eta 0.1) beats one without it (gold of the best round)",
         paired(rows, "iterated", "eta 0 (MetaRM off)", gold), True),
        ("Wolf et al.: a policy that starts from SFT each round is the robust choice (gold of the last round)",
         paired(rows, "policy starts from SFT", "iterated", lambda row: last(row)["gold"]), True),
        ("Ours: 192 fresh labels a round, those of all rounds carried on, beat none (gold of the last round)",
         paired(rows, "fresh labels, all", "iterated", lambda row: last(row)["gold"]), True),
        ("Wolf et al.: how labels are carried on matters; those of all rounds beat the newest alone (gold of the last round)",
         paired(rows, "fresh labels, all", "fresh labels, latest", lambda row: last(row)["gold"]), True),
    ]  # fmt: skip
    lines = [
        (words, interval_text(found) if len(found) > 1 else NOT_RUN, f"{len(found)}", verdict(found, above))
        for words, found, above in said
    ]
    return markdown(("claim", "here", "seeds", "verdict"), lines)


def page(rows: Sequence[Row]) -> str:
    """The whole page.

    Args:
        rows: of the results.
    """
    done = sum((row["arm"] in ARMS) and row["seed"] in ARMS[row["arm"]].seeds for row in rows)
    parts = [HEAD.format(done=done, planned=sum(len(arm.seeds) for arm in ARMS.values())), "## What holds\n", claims(rows)]
    for item in ITEMS:
        parts.append(f"\n## {item.number} · {item.title}\n\n{item.source}.\n")
        parts.append(by_round(rows, item.arms[0]) if item.base is None else against(rows, item))
    return "\n".join(parts) + "\n"


HEAD = """# The papers' tables, made again in the small

Written by `make reproduce` from `benchmarks/results/reproduce.jsonl`; not by hand. **{done} of {planned} runs are done**; what
is not reads "not run". A result, not an advertisement.

Every run is `python -m cluster run configs/reproduce.yaml` with the keys of its arm: in the [sandbox](sandbox.md), a policy and
reward models of 0.1 M parameters, 3,000 pairs of which a quarter is flipped. *Gold* is the sandbox's true reward, in standard
deviations of its corpus, of one response to each *test* prompt; *win - lose* against SFT's responses, by more than 0.1. The *best
round* of an arm is the one with the highest mean of the judge on *validation* prompts, which share nothing with the test prompts;
every arm chooses so. Nothing was tuned per arm: all share the recipe's settings, vanilla PPO takes the same number of PPO steps;
DPO, which has one round, chooses among three learning rates instead. The ensembles alone are pushed further (larger steps,
answers may be cut), single model and all, on seeds of their own: a single model was not over-optimised by the recipe's settings.
*At its KL*: gold above what the arm that is compared with has, by linear interpolation in sqrt(KL) between its rounds, where it
is as far from SFT. Means with 95% t-intervals over seeds; differences are paired by seed, bold where the interval leaves zero
out; nothing is corrected for the number of comparisons. Seeds share the world and its SFT policy.

![Rounds against SFT; gold against the distance from SFT for every arm; the ablations beside the recipe](img/reproduce.svg)

*Bars and lines beside a dot are 95% intervals; of the ablations a dot is filled where its interval leaves zero out.*
"""
