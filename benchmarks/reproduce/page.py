"""The page of the paper's tables made again: from the raw rows alone, and what was not run reads "not run"."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.experiments.common import interval_text, level
from benchmarks.markdown import markdown
from benchmarks.reproduce.arms import AGAIN, ARMS, ITEMS, OTHER_COEFS, Item
from benchmarks.reproduce.claims import NOT_RUN, table
from benchmarks.reproduce.rows import (
    Row,
    fallen,
    gold,
    has_rounds,
    last,
    last_gold,
    margin,
    matched,
    of_arm,
    paired,
    planned,
    told_in,
)
from evaluation.compare import mean_interval


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
        margins, golds = interval_text([one["margin"] for one in each]), level([one["gold"] for one in each])
        lines.append((f"round {index}", *shares, margins, interval_text(rise), golds, kl, proxy))
    return markdown(("policy", "win", "tie", "lose", "win - lose", "gold - the round before's", "gold", "KL", "proxy"), lines)


def against(rows: Sequence[Row], item: Item) -> str:
    """Every arm of an item beside its base: the round that validation chose, and the last."""
    assert item.base is not None
    lines: list[tuple[str, ...]] = []
    for arm in item.arms:
        own = list(of_arm(rows, arm).values())
        of_base = arm == item.base
        if len(own) < 2:
            lines.append((arm, f"{len(own)} of {planned(arm)}" if own else NOT_RUN, *[""] * 7))
            continue
        lines.append(
            (
                arm,
                str(len(own)),
                interval_text([margin(row) for row in own]),
                level([gold(row) for row in own]),
                "" if of_base else interval_text(paired(rows, arm, item.base, gold)),
                "" if of_base else interval_text(matched(rows, arm, item.base)),
                level([last_gold(row) for row in own])
                + ("" if of_base else f" ({interval_text(paired(rows, arm, item.base, last_gold))})"),
                level([fallen(row) for row in own]) if all(map(has_rounds, own)) else "-",
                level([last(row)["kl"] for row in own], 2),
            )
        )
    heads = (
        "arm", "seeds", "win - lose, best round", "gold, best round", f"above {item.base}", "at one KL",
        f"gold, last round (above {item.base})", "fallen from its best", "KL, last round",
    )  # fmt: skip
    return markdown(heads, lines)


def page(rows: Sequence[Row]) -> str:
    """The whole page.

    Args:
        rows: of the results.
    """
    done = [row for row in rows if row["arm"] in ARMS and row["seed"] in ARMS[row["arm"]].seeds]
    head = HEAD.format(done=len(done), planned=sum(len(arm.seeds) for arm in ARMS.values()), luck=_luck(rows), edge=_edge(rows))
    parts = [head, "## What holds\n", table(rows)]
    for item in ITEMS:
        parts.append(f"\n## {item.number} · {item.title}\n\n{item.source}.\n")
        told = told_in(rows, item)
        parts.append(by_round(told, item.arms[0]) if item.base is None else against(told, item))
    parts.append(f"\n## Which run is of which commit\n\n{by_commit(done)}")
    return "\n".join(parts) + "\n"


def _luck(rows: Sequence[Row]) -> str:
    """What the recipe differs from itself by."""
    found = paired(rows, AGAIN, "iterated", gold)
    if len(found) < planned(AGAIN, "iterated"):
        return NOT_RUN
    said = f"its best rounds are {interval_text(found)} above the first's"
    _, low, high = mean_interval(found)
    if low <= 0 <= high:
        return said
    return f"{said}. So {len(found)} seeds tell apart what is the same, and a bold difference of that size says little"


def _edge(rows: Sequence[Row]) -> str:
    """How often a tuned arm took the smallest KL coefficient, beyond which no run was made."""
    tuned = [row["arm"] for name in ("iterated, tuned", "vanilla PPO, tuned") for row in of_arm(rows, name).values()]
    smallest = min(OTHER_COEFS, key=float)
    num = sum(arm.endswith(smallest) for arm in tuned)
    return f"; {num} of {len(tuned)} times that is {smallest}, and a smaller one might be better still" if num else ""


def by_commit(rows: Sequence[Row]) -> str:
    """The arms and seeds that each commit of the project has run, in the order in which they were."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        found.setdefault(row["versions"]["git_commit"][:7], {}).setdefault(row["arm"], []).append(row["seed"])
    lines = [
        (commit, "; ".join(f"{arm}: {', '.join(map(str, sorted(seeds)))}" for arm, seeds in arms.items()))
        for commit, arms in found.items()
    ]
    return markdown(("commit", "arms: seeds"), lines)


HEAD = """# The papers' tables, made again in the small

Written by `make reproduce` from `benchmarks/results/reproduce.jsonl`; not by hand. **{done} of {planned} runs are done**; what
is not reads "not run". A result, not an advertisement.

Every run is `python -m cluster run configs/reproduce.yaml` with the keys of its arm: in the [sandbox](sandbox.md), a policy and
reward models of 0.1 M parameters, 3,000 pairs of which a quarter is flipped. *Gold* is the sandbox's true reward, in standard
deviations of its corpus, of one response to each *test* prompt; *win - lose* against SFT's responses, by more than 0.1. The
*best round* of an arm is the one with the highest gold on *validation* prompts, which share nothing with the test prompts: the
judge of these runs is the truth, on other prompts, for every arm. Without a truth, see [what a held-out judge
does](best_round.md).

What is compared: *iterated* is paid by the mean less the standard deviation of three reward models, of which r_k is retrained
with MetaRM in each round and two are trained once; the papers' method, r_k alone, is *M = 1*. *Vanilla PPO* is paid by one that
is trained once, and takes as many PPO steps (60 of 64 prompts, 120 updates). *DPO* takes one pass over the pairs (94 updates of
32 pairs), and chooses among five learning rates, on validation prompts, where the others choose among rounds. *Best of 16* is
chosen by the three reward models of the first round. *Tuned*: of three KL coefficients, the recipe's 0.1, 0.03 and 0.3, the one
with the best round on validation prompts, seed by seed, for iterated runs and for vanilla PPO alike{edge}. That is 15 policies
to choose from, where DPO has five and its beta of 0.1. Every other arm has the recipe's settings, untuned; its KL coefficient
and eta are the quickstart's, which were chosen by looking at iterated runs ([log](log.md)). *Starts from SFT, 60 steps a round*
takes 300 steps in all, 60 since SFT in the last round, as the others have. Wolf et al. find restarts robust where other starts
do not recover from over-optimisation; nothing is over-optimised by this recipe, so that is not tested. Coste et al. take the
variance from the mean, we the standard deviation. The ensembles alone are pushed further (larger steps, no KL penalty, answers
may be cut), single model and all, on seeds of their own: a single model was not over-optimised by the recipe's settings. The
new domain's arms are keys on the same recipe, not `configs/new_domain.yaml`, whose model is larger.

*At one KL*: where the further of the two is as far from SFT as the other's best round, in gold that is linear in sqrt(KL)
between SFT and its rounds, which is too low before the first of them; of what was chosen among runs, between the rounds of all
these. KL is that on validation prompts of the run's own domains. *Fallen*: gold of the best round less that of the last. Means
with 95% t-intervals over seeds; differences are paired by seed, bold where the interval leaves zero out; nothing is corrected
for the number of comparisons. A claim *holds* where the interval leaves zero out in its favour; it *does not* where the
interval leaves out an effect in its favour: of 0.05 in gold and in shares of prompts, of a tenth in KL and in jumps, of 0.02 in
R squared. Seeds share the world and its SFT policy; one seed gives arms the same data and first weights, not the same luck, nor
always the same commit ([below](#which-run-is-of-which-commit)).

**How much is luck**: the ablations stand beside the recipe run a second time (*the same again*), by the same keys and seeds:
{luck}. That the ablations are compared with the second run, not the first, was decided when this was seen.

![Rounds against SFT; gold against the distance from SFT for every arm; the ablations beside the recipe](img/reproduce.svg)

*Bars and lines beside a dot are 95% intervals; of the ablations a dot is filled where its interval leaves zero out. DPO's largest
learning rate lies outside: far from SFT, and worse than it.*
"""
