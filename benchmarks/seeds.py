"""Does the final policy beat SFT? Several seeds of a sandbox recipe, on test prompts that no run and no setting saw.

    python -m benchmarks.seeds configs/quickstart.yaml --seeds 1 2 3 4 5

Keys of the config may follow; a --name among them keeps the runs of two settings apart, and --against compares with an earlier
record of the same config and seeds, named by its keys ("" = none):

    python -m benchmarks.seeds configs/quickstart.yaml --name ahead --policy.max_lag 1 --against ""

Each seed is a whole run (its reward models, rollouts and order of data differ; the world and its SFT policy are shared).
Then the SFT policy and every round's policy answer each *test* prompt once, by transformers' ``generate`` at the run's
temperature, and the gold reward decides. Prints a table with 95% t-intervals over the seeds, and appends the outcomes to
benchmarks/results/seeds.jsonl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.experiments.common import append_row, rows_of
from benchmarks.on_test_prompts import against_sft, answers, policies_of, prompts_of
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.storage import storage_root
from cluster.versions import versions
from evaluation.compare import mean_interval
from sandbox.world import World

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "seeds.jsonl"


@dataclass(frozen=True)
class Outcome:
    """One policy of one seed on the test prompts."""

    seed: int
    round: int
    win: float
    tie: float
    lose: float
    margin: float
    gold: float


def judge(config: RunConfig, world: World, sft: Path, run: Path, seed: int) -> list[Outcome]:
    """Every round of one run against SFT, on the test prompts of the domains that the policy was trained on."""
    prompts = prompts_of(world)
    texts = (answers(policy, prompts, config) for policy in policies_of(run))
    found = against_sft(world, prompts, answers(sft, prompts, config), texts, config.evaluation.tie)
    return [Outcome(seed, i - 1, each.win, each.tie, each.lose, each.margin, each.gold) for i, each in enumerate(found)]


def main() -> None:
    """Run the seeds that are not done yet, judge all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--against", help="keys of an earlier record, as they were given; its seeds are paired with these")
    options, overrides = parser.parse_known_args()
    earlier = None if options.against is None else recorded(options.config.name, options.against.split(), options.seeds)
    outcomes: list[Outcome] = []
    for seed in options.seeds:
        name = f"{load_config(options.config, overrides).name}-seed-{seed}"
        words = [*overrides, "--seed", str(seed), "--name", name]
        config = load_config(options.config, words)
        command = [sys.executable, "-m", "cluster", "run", str(options.config.resolve()), *words]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ)
        root = storage_root(config)
        source = SandboxSource(config, root / "cache")
        judged = judge(config, source.world, source.load().sft_dir, root / "runs" / name, seed)
        print(f"seed {seed}: " + ", ".join(f"round {o.round} {o.margin:+.2f}" for o in judged[1:]), flush=True)
        outcomes += judged
    record = {"id": "seeds", "config": options.config.name, "overrides": overrides, "versions": versions()}
    append_row(RESULTS, record | {"outcomes": [asdict(one) for one in outcomes]})
    print(table(outcomes, options.seeds))
    if earlier is not None:
        print(difference(outcomes, earlier))


def recorded(config: str, overrides: list[str], seeds: list[int]) -> list[Outcome]:
    """The outcomes of the latest record of these seeds."""
    for record in reversed(rows_of(RESULTS)):
        found = [Outcome(**outcome) for outcome in record["outcomes"]]
        if (record["config"], record["overrides"]) == (config, overrides) and {o.seed for o in found} >= set(seeds):
            return found
    raise SystemExit(f"{RESULTS} has no record of {config} with the keys {' '.join(overrides) or '(none)'} and seeds {seeds}")


def difference(ours: list[Outcome], theirs: list[Outcome]) -> str:
    """Gold reward of the last round that both have, ours - theirs, seed by seed, with a 95% t-interval."""
    last = min(max(o.round for o in both) for both in (ours, theirs))
    golds = {o.seed: o.gold for o in theirs if o.round == last}
    each = [o.gold - golds[o.seed] for o in ours if o.round == last]
    mean, low, high = mean_interval(each)
    return f"gold of round {last} against the earlier record: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(each)} pairs of seeds"


def table(outcomes: list[Outcome], seeds: list[int]) -> str:
    """The outcomes as a Markdown table; intervals over the seeds."""
    head = ("policy", "win", "tie", "lose", "win - lose (95% interval)", "gold", "win - lose of each seed")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for index in sorted({o.round for o in outcomes}):
        rows = [o for o in outcomes if o.round == index]
        gold = fmean(o.gold for o in rows)
        if index < 0:
            lines.append(f"| SFT | - | - | - | - | {gold:.2f} | |")
            continue
        mean, low, high = mean_interval([o.margin for o in rows])
        shares = " | ".join(f"{fmean(values):.0%}" for values in zip(*((o.win, o.tie, o.lose) for o in rows), strict=True))
        each = ", ".join(f"{o.margin:+.2f}" for o in rows)
        lines.append(f"| round {index} | {shares} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] | {gold:.2f} | {each} |")
    return "\n".join(lines) + f"\n\nseeds {', '.join(map(str, seeds))}"


if __name__ == "__main__":
    main()
