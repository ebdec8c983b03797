"""Does a run that is driven too far stop by itself, and is the round that it keeps as good as its best one?

    python -m benchmarks.experiments.over [--seeds 0 1 2] [--KEY VALUE ...]
    python -m benchmarks.experiments.over --evaluation.judge held_out
    python -m benchmarks.experiments.over --seeds 3 4 5 --evaluation.judge held_out \
        --evaluation.disqualify "[truncation, length_hacking, sameness, repetition, kl_budget]"

Each seed is a whole run of configs/over.yaml by the command that users start. SFT's and every round's policy then answer each
*test* prompt, once and ANSWERS times; none of these prompts was judged in the run. The gold reward there says what the round in
`best/`, which validation prompts chose, is worth: its gain over SFT as a share of the gain of the round that is best on the test
prompts themselves. That one is the highest of several noisy means, so that a little less than 1 is what a perfect choice would
reach; with more answers less so.

Prints a line for each seed and appends a row for it to benchmarks/results/over.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiments.common import RESULTS, ROOT, append_row
from benchmarks.on_test_prompts import answers, golds, policies_of, prompts_of
from benchmarks.seeds import judge
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.storage import storage_root
from cluster.versions import versions
from evaluation.best import best_of
from sandbox.world import World

RECIPE = ROOT / "configs" / "over.yaml"
ANSWERS = 8
"""Responses to each test prompt, of the finer of the two means."""


def share_of_best(golds: Sequence[float], sft: float, chosen: int | None) -> float | None:
    """The gain of the chosen round over SFT, by the largest gain there is.

    Args:
        golds: of the rounds, on the test prompts.
        sft: of SFT.
        chosen: a round; None = SFT.

    Returns:
        Their ratio; None where no round is better than SFT.
    """
    most = max(golds) - sft
    if most <= 0:
        return None
    return (0.0 if chosen is None else golds[chosen] - sft) / most


def many(config: RunConfig, world: World, place: Path) -> float:
    """Mean gold reward of ANSWERS responses to each test prompt of the domains that the policy was trained on.

    Args:
        config: of the run.
        world: of the prompts.
        place: of the policy.
    """
    prompts = prompts_of(world) * ANSWERS
    return fmean(golds(world, prompts, answers(place, prompts, config)))


def play(seed: int, overrides: Sequence[str], recipe: Path = RECIPE) -> dict[str, Any]:
    """Run what is not there yet, and judge its rounds on the test prompts.

    Args:
        seed: of the run.
        overrides: keys on top of the recipe.
        recipe: of the run.

    Returns:
        The row of the results.
    """
    asked = load_config(recipe, list(overrides)).evaluation
    kind = f"{asked.judge}-without-alarmed" if asked.disqualify else asked.judge
    words = [*overrides, "--seed", str(seed), "--name", f"over-{kind}-{seed}"]
    config = load_config(recipe, words)
    subprocess.run([sys.executable, "-m", "cluster", "run", str(recipe), *words], check=True, cwd=ROOT, env=os.environ)
    root = storage_root(config)
    run = root / "runs" / config.name
    ledger = json.loads((run / "ledger.json").read_text())
    source = SandboxSource(config, root / "cache")
    sft, *rounds = judge(config, source.world, source.load().sft_dir, run, seed)
    found = [outcome.gold for outcome in rounds]
    fine_sft, *fine = (many(config, source.world, place) for place in (source.load().sft_dir, *policies_of(run)))
    best = best_of(ledger)
    return {
        "id": "over", "seed": seed, "overrides": list(overrides), "judge": best.judge, "rounds": len(found),
        "asked": config.rounds.num_rounds, "ended": ledger["rounds"][-1]["ended"], "chosen": best.round, "sft": sft.gold,
        "golds": found, "share": share_of_best(found, sft.gold, best.round),
        "answers": ANSWERS, "sft_fine": fine_sft, "golds_fine": fine, "share_fine": share_of_best(fine, fine_sft, best.round),
        "validation": [entry["evaluation"]["gold"] for entry in ledger["rounds"]],
        "kl": [entry["evaluation"]["kl"] for entry in ledger["rounds"]],
        "alarms": [[alarm["name"] for alarm in entry["alarms"]] for entry in ledger["rounds"]],
        "versions": versions(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for a reader."""
    golds = row["golds"]
    share = "no round is better than SFT"
    if row["share"] is not None and row["share_fine"] is not None:
        share = f"{row['share']:.0%} of the best round's gain, {row['share_fine']:.0%} by {row['answers']} answers a prompt"
    chosen = "SFT" if row["chosen"] is None else f"round {row['chosen']} ({golds[row['chosen']]:+.2f})"
    top = golds.index(max(golds))
    return (
        f"seed {row['seed']}, {row['judge']}: {row['rounds']} of {row['asked']} rounds; gold on test prompts: "
        f"SFT {row['sft']:+.2f}, best/ {chosen}, best round {top} ({golds[top]:+.2f}), last {golds[-1]:+.2f}: {share}"
    )


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> None:
    """Play the seeds.

    Args:
        arguments: None takes the process's own.
        results: folder of the rows.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, overrides = parser.parse_known_args(arguments)
    for seed in options.seeds:
        row = play(seed, overrides)
        print(line(row), flush=True)
        append_row(results / "over.jsonl", row)


if __name__ == "__main__":
    main()
