"""Which of "Everyone Deserves A Reward"'s claims hold here: customised reward models by several strategies.

    python -m benchmarks.experiments.domains sandbox [--seeds 5] [--KEY VALUE ...]
    python -m benchmarks.experiments.domains dsp --cache DIRECTORY [--seeds 3] [--backbone PATH ...] [--KEY VALUE ...]

sandbox: configs/domains.yaml, eight domains. dsp: configs/domains_dsp.yaml on real data, with a small decoder and a small
encoder that are pre-trained here on the texts of all queries that are trained on, without their scores (kept in --cache), and
with every --backbone, a model directory of the user's own. Both go through every strategy of the recipe on the plain language
model, and through those that the claims about bases name on one that was fine-tuned on the preferred responses of the general
training pairs ("tuned": the paper's choice between LLaMA and Alpaca).

Every seed is a customisation of its own: in the sandbox another world (language model, pairs, tastes), on dsp another split of
the queries, with the bases made anew from its training part. Differences are paired over these, so that their intervals hold
for other data, not for another order of the same.

It is the command `customize` that does the work, so the same command again continues where it stopped. --here N fits in N
processes of this program instead, a seed each, without Ray: the same numbers for less. Keys after the options go into the recipe
(`--seed`, `--world.num_pairs`, ...). Prints each table, what the claims came to, and the CPU seconds of an arm; appends to
benchmarks/results/domains_strategies.jsonl. Length alone stands in every table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiments.domain_bases import MADE, TUNED_BASES, dsp_bases, sandbox_bases
from benchmarks.experiments.domain_claims import BASE_CLAIMS, judged, merged
from benchmarks.experiments.domain_fits import fit_here, side_by_side
from cluster.config import RunConfig
from cluster.console import Console
from cluster.customize import customize
from cluster.load_config import load_config
from cluster.versions import versions
from evaluation.domain_figures import domain_plots
from evaluation.domain_report import table_text, write_domain_report
from evaluation.domains import DOMAIN_STAGE, outcomes, read_domain_run
from evaluation.preference_report import draw_figures
from rm.checkpoints import kind_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "domains_strategies.jsonl"
BROUGHT_LR = 1e-5
"""Peak learning rate of both stages on a --backbone: the recipe's was chosen for models of 0.4 M weights."""
RECIPES = {"sandbox": ROOT / "configs" / "domains.yaml", "dsp": ROOT / "configs" / "domains_dsp.yaml"}


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The recipe on a seed: another split, pool and order of real data; in the sandbox a world of its own.

    Args:
        config: the recipe.
        seed: number of it.
    """
    world, customize = (
        config.world.model_copy(update={"seed": seed}),
        config.customize.model_copy(update={"seeds": 1}),
    )
    return config.model_copy(update={"seed": seed, "world": world, "customize": customize})


def at_own_rates(config: RunConfig, name: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe at the learning rates that a base is fitted at: its own are those of the small bases made here, a brought one
    takes ``BROUGHT_LR`` where the command says nothing else.

    Args:
        config: the recipe, with the overrides in it.
        name: of the base.
        overrides: of the command.
    """
    if name in MADE:
        return config
    said = {flag.split("=", 1)[0].replace("-", "_").lstrip("_") for flag in overrides}
    stages = {
        key: stage.model_copy(update={"lr": BROUGHT_LR})
        for key, stage in (("general_stage", config.customize.general_stage), ("domain_stage", config.customize.domain_stage))
        if not said & {"customize", f"customize.{key}", f"customize.{key}.lr"}
    }
    return config.model_copy(update={"customize": config.customize.model_copy(update=stages)})


def on_base(config: RunConfig, name: str, base: Path | None) -> RunConfig:
    """The recipe with a base, under a name of its own; an encoder loses the strategies that imitate, and pools by itself; a tuned
    base keeps those that the claims about bases name."""
    suffix = "".join(character if character.isalnum() else "-" for character in name)
    changed: dict[str, Any] = {"name": f"{config.name}-{suffix}-{config.seed}"}
    if name in TUNED_BASES:
        named = {strategy for claim in BASE_CLAIMS for strategy in (claim.better, claim.other)}
        strategies = {key: value for key, value in config.customize.strategies.items() if key in named}
        changed["customize"] = config.customize.model_copy(update={"strategies": strategies})
    if base is not None:
        reward = config.reward.model_copy(update={"base": str(base)})
        if kind_of(base) == "encoder":
            reward = reward.model_copy(update={"pooling": "last"})
            kept = {
                key: value
                for key, value in config.customize.strategies.items()
                if not (value.general_imitation or value.domain_imitation)
            }
            changed["customize"] = config.customize.model_copy(update={"strategies": kept})
        changed["reward"] = reward
    return config.model_copy(update=changed)


def arm_seconds(directories: Sequence[Path]) -> dict[str, float]:
    """CPU seconds of one arm by kind: a general stage and a domain stage, means over those that were fitted.

    Args:
        directories: of the customisations, a seed each.
    """
    cards = [json.loads((directory / "card.json").read_text())["cpu_seconds"] for directory in directories]
    seconds = [(name, float(value)) for card in cards for name, value in card.items()]
    general = [value for name, value in seconds if name.startswith("general, ")]
    domain = [value for name, value in seconds if not name.startswith("general, ")]
    return {
        "general_stage": fmean(general) if general else 0.0,
        "domain_stage": fmean(domain),
        "all": sum(value for _, value in seconds),
    }


def _in_words(row: Mapping[str, Any]) -> str:
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else ""
    return f"{row['verdict']:<14} " + (f"{row['difference']:+.3f}{interval}" if "difference" in row else "")


def of_seed(options: argparse.Namespace, config: RunConfig) -> dict[str, Path]:
    """Customise on every base of a seed.

    Args:
        options: of the command.
        config: the recipe on the seed.

    Returns:
        The customisations' directories by the name of the base.
    """
    if options.what == "sandbox":
        found = sandbox_bases(config, options.bases)
    else:
        found = dsp_bases(config, options.cache, options.backbone, options.bases)
    directories = {}
    for name, base in found.items():
        if options.bases is None or name in options.bases:
            own = on_base(at_own_rates(config, name, options.overrides), name, base)
            if options.here:
                fit_here(own)
            directories[name] = customize(own, Console())
            print(f"report: {write_domain_report(directories[name])}", flush=True)
    return directories


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Fit what is missing, print the tables, append to the results.

    Args:
        arguments: None takes the process's own.
        results: JSON lines to append to.

    Returns:
        A row a base.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=tuple(RECIPES))
    parser.add_argument("--seeds", type=int, default=None, help="fits of each (default: 5 in the sandbox, 3 on dsp)")
    parser.add_argument("--cache", type=Path, default=None, help="dsp: where the pre-trained models are kept")
    parser.add_argument("--backbone", type=Path, action="append", default=[], help="dsp: a model directory; may be repeated")
    parser.add_argument("--bases", nargs="+", default=None, help="only these bases, by name")
    parser.add_argument("--here", type=int, default=0, metavar="N", help="fit in N processes of this program, without Ray")
    parser.add_argument("--figures", type=Path, default=None, help="a directory for the figures over all seeds, by base")
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    seeds = options.seeds or {"sandbox": 5, "dsp": 3}[options.what]
    recipe = load_config(RECIPES[options.what], overrides)
    if options.what == "dsp" and options.cache is None:
        parser.error("dsp needs --cache, where the pre-trained models are kept")

    directories: dict[str, list[Path]] = {}
    configs = [with_seed(recipe, recipe.seed + number) for number in range(seeds)]
    for made in side_by_side(partial(of_seed, options), configs, options.here or 1):
        for name, directory in made.items():
            directories.setdefault(name, []).append(directory)
    runs = {name: merged([read_domain_run(directory) for directory in of]) for name, of in directories.items()}
    plain = next(iter(runs))
    rows = []
    for name, run in runs.items():
        found, claims, seconds = outcomes(run), judged(run), arm_seconds(directories[name])
        if name in TUNED_BASES and plain != name:
            claims += judged(runs[plain], run, BASE_CLAIMS)
        print(f"\n{options.what}, {name}\n{table_text(run, found)}")
        for claim in claims:
            print(f"  {_in_words(claim)}  {claim['claim']}")
            if "general" in claim:
                print(f"  {_in_words(claim['general'])}      the same of general accuracy at the end")
        if options.figures is not None:
            (options.figures / name).mkdir(parents=True, exist_ok=True)
            draw_figures(options.figures / name, domain_plots(run, found))
        print(f"  CPU seconds: {', '.join(f'{key} {value:.1f}' for key, value in seconds.items())}")
        rows.append(
            {
                "id": f"domains-{options.what}", "base": name, "seeds": seeds, "claims": claims, "cpu_seconds": seconds,
                "outcomes": [asdict(outcome) for outcome in found], "length_alone": run.length_alone,
                "num_measurements": sum(row.stage == DOMAIN_STAGE for row in run.rows),
            }
        )  # fmt: skip
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "config": recipe.name, "versions": versions()}) + "\n")
    return rows


if __name__ == "__main__":
    main()
