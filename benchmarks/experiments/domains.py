"""Which of "Everyone Deserves A Reward"'s claims hold here: customised reward models by several strategies.

    python -m benchmarks.experiments.domains sandbox [--seeds 5] [--KEY VALUE ...]
    python -m benchmarks.experiments.domains dsp --cache DIRECTORY [--seeds 3] [--backbone PATH ...] [--KEY VALUE ...]

sandbox: configs/domains.yaml, eight domains. dsp: configs/domains_dsp.yaml on real data, with a small decoder and a small encoder
that are pre-trained here on the texts of all sets without their scores (kept in --cache), and with every --backbone, a model
directory of the user's own. Both go through every strategy of the recipe, once on the plain language model and once on one that
was fine-tuned on the preferred responses of the general pairs ("tuned": the paper's choice between LLaMA and Alpaca).

It is the command `customize` that does the work, so the same command again continues where it stopped. Keys after the options go
into the recipe (`--customize.seeds`, `--world.num_pairs`, ...). Prints each table, what the claims came to, and the CPU seconds
of an arm; appends to benchmarks/results/domains_strategies.jsonl. Length alone stands in every table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.real import pretrain_decoder, pretrain_encoder
from cluster.config import RunConfig
from cluster.console import Console
from cluster.customize import customize
from cluster.inputs import open_source
from cluster.load_config import load_config
from cluster.run_directory import versions
from cluster.storage import storage_root
from evaluation.domain_report import table_text, write_domain_report
from evaluation.domains import DOMAIN_STAGE, DomainRun, Outcome, outcomes, read_domain_run
from evaluation.groups import over_seeds
from policy.config import SFTConfig
from policy.sft import fit_language_model
from preferences.config import DataConfig
from preferences.encode import encode_prompt, encode_response
from preferences.load import load_preferences
from rm.checkpoints import kind_of

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "domains_strategies.jsonl"
RECIPES = {"sandbox": ROOT / "configs" / "domains.yaml", "dsp": ROOT / "configs" / "domains_dsp.yaml"}
TUNED = SFTConfig(epochs=1, lr=5e-4, batch_size=16)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a difference between two strategies, positive where it holds.

    Args:
        text: the sentence.
        better: the strategy that should be ahead.
        other: the other.
        of: "general" for accuracy on the general sets at the end, "domain" for that on the own domain, "kept" for minus what is
            forgotten in the domain stage.
    """

    text: str
    better: str
    other: str
    of: str


CLAIMS = (
    Claim("General fine-tuning first helps the domain", "grft-crft", "direct", "domain"),
    Claim("Imitation in the general stage preserves general accuracy", "imitate-general", "grft-crft", "kept"),
    Claim("Imitation in the domain stage preserves general accuracy", "imitate-domain", "grft-crft", "kept"),
    Claim("Imitation preserves more in the domain stage than in the general stage", "imitate-domain", "imitate-general", "kept"),
    Claim("More general data (1.5x) preserves general accuracy", "enriched-1.5", "grft-crft", "kept"),
    Claim("More general data (2.5x) preserves general accuracy", "enriched-2.5", "grft-crft", "kept"),
    Claim("More general data (4 to 4.5x) preserves general accuracy", "enriched-4", "grft-crft", "kept"),
    Claim("More general data (6.5x) preserves general accuracy", "enriched-6.5", "grft-crft", "kept"),
    Claim("Rehearsal preserves general accuracy", "rehearsal", "grft-crft", "kept"),
    Claim("EWC preserves general accuracy", "ewc", "grft-crft", "kept"),
    Claim("L2-to-start preserves general accuracy", "l2", "grft-crft", "kept"),
)


def per_seed(run: DomainRun, strategy: str, of: str) -> list[float]:
    """A quantity of a strategy, seed by seed; none where the strategy is not there or has no such quantity."""
    found = []
    for seed in sorted({row.seed for row in run.rows}):
        rows = tuple(row for row in run.rows if row.seed == seed and row.strategy == strategy)
        outcome = next((o for o in outcomes(replace(run, rows=rows)) if o.strategy == strategy), None)
        value = None if outcome is None else _quantity(outcome, of)
        if value is not None:
            found.append(value)
    return found


def _quantity(outcome: Outcome, of: str) -> float | None:
    if of == "domain":
        return outcome.domain.value
    if of == "general":
        return None if outcome.general is None else outcome.general.value
    return None if outcome.forgotten is None else -outcome.forgotten.value


def judged(run: DomainRun, claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Each claim whose two strategies are there: the mean difference over the seeds, paired, with its 95% interval.

    Args:
        run: as read.
        claims: to look at; a strategy's name may have digits after what stands here ("enriched-4" is "enriched-4.5" too).
    """
    rows = []
    for claim in claims:
        better = next((name for name in run.strategies if name == claim.better or name.startswith(f"{claim.better}.")), None)
        if better is None or claim.other not in run.strategies:
            continue
        pairs = list(zip(per_seed(run, better, claim.of), per_seed(run, claim.other, claim.of), strict=False))
        if not pairs:
            continue
        differences = [a - b for a, b in pairs]
        row: dict[str, Any] = {"claim": claim.text, "of": claim.of, "difference": fmean(differences), "seeds": len(differences)}
        if len(differences) >= 3:
            interval = over_seeds(differences)
            row |= {"low": interval.low, "high": interval.high}
            row["verdict"] = "holds" if interval.low > 0 else "does not hold" if interval.high < 0 else "not told"
        else:
            row["verdict"] = "too few seeds"
        rows.append(row)
    return rows


def tuned_base(plain: Path, pairs: PreferenceSet, out: Path, data: DataConfig) -> Path:
    """The plain model fine-tuned on the preferred responses of general pairs, as Alpaca is LLaMA on instructions.

    Args:
        plain: a causal language model.
        pairs: general ones.
        out: where it belongs; what is there is taken.
        data: longest prompt and response; longer pairs are left out.
    """
    if out.is_dir():
        return out
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(plain)
    examples = []
    for row in pairs.rows:
        prompt, response = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row["chosen"])
        if len(prompt) <= data.max_prompt_tokens and len(response) <= data.max_response_tokens:
            examples.append((list(prompt), list(response)))
    partial = out.with_name(f".{out.name}.partial")
    fit_language_model(examples, tokenizer, partial, TUNED.model_copy(update={"model": str(plain)}), seed=0)
    partial.rename(out)
    return out


def sandbox_bases(config: RunConfig) -> dict[str, Path | None]:
    """The sandbox's own language model (None = as the recipe has it), and one tuned on its preferred responses."""
    root = storage_root(config)
    source = open_source(config, root, policy=False)
    if source.recipe is not None and not source.prepared:
        source.recipe(lambda unit, done, total: None)
    train, _ = source.preferences()
    out = root / "cache" / f"tuned-{source.sft_dir.parent.name}"
    return {"plain": None, "tuned": tuned_base(source.sft_dir, train, out, config.data)}


def dsp_bases(config: RunConfig, cache: Path, backbones: Sequence[Path]) -> dict[str, Path | None]:
    """A decoder and an encoder that are pre-trained here, the decoder tuned, and the user's own."""
    cache.mkdir(parents=True, exist_ok=True)
    general = next(iter(config.customize.general.values()))
    pairs = load_preferences(config.data.model_copy(update={"preferences": general, "validation": None}))
    texts = with_domain_texts(pairs, next(iter(config.customize.domains.values())))
    decoder = pretrain_decoder(texts, cache / "decoder")
    encoder = pretrain_encoder(texts, decoder, cache / "encoder")
    found: dict[str, Path | None] = {
        "decoder": decoder,
        "decoder, tuned": tuned_base(decoder, pairs, cache / "decoder-tuned", config.data),
        "encoder": encoder,
    }
    return found | {path.name: path for path in backbones}


def with_domain_texts(pairs: PreferenceSet, dsp: str) -> PreferenceSet:
    """The pairs, and the responses of a file of DSP two by two: texts to pre-train on, whatever is preferred.

    Args:
        pairs: general ones.
        dsp: the file.
    """
    from datasets import Dataset

    from preferences.queries import DSP_PROMPT

    rows = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected", "domain")} for row in pairs.rows]
    for number, line in enumerate(Path(dsp).expanduser().read_text("utf-8").splitlines()):
        found = json.loads(line)
        texts = list(found["responses"].values())
        for start in range(0, len(texts) - 1, 2):
            prompt = DSP_PROMPT.format(query=found["query"])
            rows.append(
                {
                    "id": f"dsp-{number}-{start}",
                    "prompt": prompt,
                    "chosen": texts[start],
                    "rejected": texts[start + 1],
                    "domain": "",
                }
            )
    return replace(pairs, rows=Dataset.from_list(rows))


def on_base(config: RunConfig, name: str, base: Path | None) -> RunConfig:
    """The recipe with a base, under a name of its own; an encoder loses the strategies that imitate, and pools by itself."""
    suffix = "".join(character if character.isalnum() else "-" for character in name)
    changed: dict[str, Any] = {"name": f"{config.name}-{suffix}"}
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


def arm_seconds(directory: Path) -> dict[str, float]:
    """CPU seconds of one arm by kind: a general stage and a domain stage, means over those that were fitted.

    Args:
        directory: of the customisation.
    """
    seconds: Mapping[str, float] = json.loads((directory / "card.json").read_text())["cpu_seconds"]
    general = [value for name, value in seconds.items() if name.startswith("general, ")]
    domain = [value for name, value in seconds.items() if not name.startswith("general, ")]
    return {
        "general_stage": fmean(general) if general else 0.0,
        "domain_stage": fmean(domain),
        "all": sum(seconds.values()),
    }


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
    options, overrides = parser.parse_known_args(arguments)
    seeds = options.seeds or {"sandbox": 5, "dsp": 3}[options.what]
    config = load_config(RECIPES[options.what], [*overrides, "--customize.seeds", str(seeds)])
    if options.what == "dsp" and options.cache is None:
        parser.error("dsp needs --cache, where the pre-trained models are kept")
    bases = sandbox_bases(config) if options.what == "sandbox" else dsp_bases(config, options.cache, options.backbone)
    rows = []
    for name, base in bases.items():
        if options.bases is not None and name not in options.bases:
            continue
        directory = customize(on_base(config, name, base), Console())
        print(f"report: {write_domain_report(directory)}")
        run = read_domain_run(directory)
        found, claims, seconds = outcomes(run), judged(run), arm_seconds(directory)
        print(f"\n{options.what}, {name}\n{table_text(run, found)}")
        for claim in claims:
            interval = f" [{claim['low']:+.3f}, {claim['high']:+.3f}]" if "low" in claim else ""
            print(f"  {claim['verdict']:<14} {claim['difference']:+.3f}{interval}  {claim['claim']}")
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
            file.write(json.dumps({**row, "config": config.name, "versions": versions()}) + "\n")
    return rows


if __name__ == "__main__":
    main()
