"""Which coefficients and learning rates the recipes of domains have: chosen on seeds and queries that no result is reported on.

    python -m benchmarks.experiments.domain_choice sandbox [--reported 5] [--KEY VALUE ...]
    python -m benchmarks.experiments.domain_choice dsp --cache DIRECTORY [--base encoder] [--reported 3] [--KEY VALUE ...]

In the sandbox: a world of a seed that `benchmarks.experiments.domains` does not report. On dsp: the queries that none of the
reported seeds holds out, split anew; written to --cache. First the learning rates of both stages, as multiples of the recipe's,
by general fine-tuning and then the domain alone; at the best of them the coefficients of imitation (a decoder's only),
L2-to-start and elastic weight consolidation, each by the mean of general and domain accuracy at the end. Prints every candidate
and appends all of them to benchmarks/results/domains_choice.jsonl; the recipes are then changed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.domain_bases import dsp_bases, held_out_prompts, sandbox_bases
from benchmarks.experiments.domain_fits import fit_here
from benchmarks.experiments.domains import RECIPES, ROOT, on_base, with_seed
from cluster.config import RunConfig
from cluster.console import Console
from cluster.customize import customize
from cluster.load_config import load_config
from cluster.versions import versions
from evaluation.domains import Outcome, outcomes, read_domain_run
from preferences.load import load_preferences
from preferences.queries import DSP_PROMPT
from rm.domain_config import StrategyConfig

RESULTS = ROOT / "benchmarks" / "results" / "domains_choice.jsonl"
SEED = 1000
"""Of the choice; reported seeds begin at 0."""
RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Learning rates, as multiples of the recipe's."""
PLAIN = "grft-crft"
CANDIDATES: Mapping[str, Mapping[str, StrategyConfig]] = {
    "imitation": {
        f"imitation-{coef:g}": StrategyConfig(general_imitation=coef, domain_imitation=coef) for coef in (0.03, 0.1, 0.3)
    },
    "l2": {f"l2-{coef:g}": StrategyConfig(penalty="l2", penalty_coef=coef) for coef in (0.01, 0.1, 1.0)},
    "ewc": {f"ewc-{coef:g}": StrategyConfig(penalty="ewc", penalty_coef=coef) for coef in (1.0, 10.0, 100.0)},
}


def accuracy(outcome: Outcome) -> float:
    """What is chosen by: the mean of general and domain accuracy at the end."""
    assert outcome.general is not None
    return 0.5 * (outcome.general.value + outcome.domain.value)


def without_reported(config: RunConfig, reported: int, folder: Path) -> RunConfig:
    """The dsp recipe on the queries that are training queries of every reported seed.

    Args:
        config: the recipe.
        reported: number of seeds.
        folder: where the remaining queries are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = frozenset().union(*(held_out_prompts(with_seed(config, config.seed + seed)) for seed in range(reported)))
    general = {}
    for name, path in config.customize.general.items():
        pairs = load_preferences(config.data.model_copy(update={"preferences": path, "validation": None}))
        rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs.rows if row["prompt"] not in out]
        general[name] = _written(folder / f"{name}.jsonl", rows)
    given = Path(next(iter(config.customize.domains.values()))).expanduser().read_text("utf-8").splitlines()
    kept = [row for row in map(json.loads, given) if DSP_PROMPT.format(query=row["query"]) not in out]
    domains = dict.fromkeys(config.customize.domains, _written(folder / "dsp.jsonl", kept))
    return config.model_copy(update={"customize": config.customize.model_copy(update={"general": general, "domains": domains})})


def _written(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def at_rate(config: RunConfig, rate: float, strategies: Mapping[str, StrategyConfig]) -> RunConfig:
    """The recipe with other learning rates and strategies, under a name of its own.

    Args:
        config: the recipe.
        rate: multiple of both stages' learning rates.
        strategies: to fit.
    """
    customize = config.customize
    general, domain = (s.model_copy(update={"lr": rate * s.lr}) for s in (customize.general_stage, customize.domain_stage))
    changed = {"general_stage": general, "domain_stage": domain, "strategies": dict(strategies)}
    return config.model_copy(update={"name": f"{config.name}-choice-{rate:g}", "customize": customize.model_copy(update=changed)})


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> dict[str, str]:
    """Fit the candidates, print them, append them to the results.

    Args:
        arguments: None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The best by kind.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(RECIPES))
    parser.add_argument("--cache", type=Path, default=None, help="dsp: where models and the remaining queries are kept")
    parser.add_argument("--reported", type=int, default=None, help="seeds that are reported (default: 5, dsp 3)")
    parser.add_argument("--base", choices=("decoder", "encoder"), default="decoder", help="dsp: which model to choose for")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(RECIPES[options.what], overrides)
    name, id_, encoder = "choice", f"domains-choice-{options.what}", options.base == "encoder"
    if encoder:
        name, id_ = f"{name} {options.base}", f"{id_}-{options.base}"
    if options.what == "dsp":
        if options.cache is None:
            parser.error("dsp needs --cache, where models and queries are kept")
        config = with_seed(without_reported(config, options.reported or 3, options.cache / "choice"), SEED)
        base = dsp_bases(config, options.cache / "choice", (), (options.base,))[options.base]
    else:
        if encoder:
            parser.error("the sandbox has no encoder: --base encoder goes with dsp")
        config = with_seed(config, SEED)
        base = sandbox_bases(config, ("plain",))["plain"]
    plain = {PLAIN: StrategyConfig()}

    def fitted(rate: float, strategies: Mapping[str, StrategyConfig]) -> dict[str, Outcome]:
        own = on_base(at_rate(config, rate, strategies), name, base)
        fit_here(own)
        directory = customize(own, Console())
        return {outcome.strategy: outcome for outcome in outcomes(read_domain_run(directory))}

    found: dict[str, dict[str, Outcome]] = {"rate": {f"{rate:g}": fitted(rate, plain)[PLAIN] for rate in RATES}}
    rate = max(found["rate"], key=lambda name: accuracy(found["rate"][name]))
    every = fitted(float(rate), plain | {name: each for of in CANDIDATES.values() for name, each in of.items()})
    fits = {kind: {each: every[each] for each in of if each in every} for kind, of in CANDIDATES.items()}
    found |= {kind: of for kind, of in fits.items() if of}
    best = {kind: max(of, key=lambda name: accuracy(of[name])) for kind, of in found.items()}
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        for kind, of in found.items():
            for candidate, outcome in of.items():
                mark = "*" if best[kind] == candidate else " "
                print(f"{mark} {kind:<10} {candidate:<16} mean {accuracy(outcome):.3f}, domain {outcome.domain.value:.3f}")
                row = {
                    "id": id_, "kind": kind, "candidate": candidate, "chosen": best[kind] == candidate,
                    "accuracy": accuracy(outcome), "domain": outcome.domain.value, "seed": SEED, "versions": versions(),
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
    return best


if __name__ == "__main__":
    main()
