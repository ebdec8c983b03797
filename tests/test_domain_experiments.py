"""The benchmark and the experiments of domains, at a size at which nothing can be learned from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks import domains as bench
from benchmarks.experiments.domain_bases import MADE, SHAPE, dsp_bases, held_out_prompts, with_domain_texts
from benchmarks.experiments.domain_choice import at_rate, without_reported
from benchmarks.experiments.domain_claims import BASE_CLAIMS, CLAIMS, judged, merged, per_seed
from benchmarks.experiments.domain_fits import fit_here, side_by_side
from benchmarks.experiments.domains import RECIPES, arm_seconds, at_own_rates, on_base, with_seed
from cluster.console import Console
from cluster.customize import customize
from cluster.domain_data import load_data
from cluster.load_config import load_config
from evaluation.domains import DOMAIN_STAGE, GENERAL_STAGE, DomainRow, DomainRun, read_domain_run
from policy.sft import make_model, train_tokenizer
from preferences.config import DataConfig
from preferences.load import load_preferences
from preferences.queries import DSP_PROMPT, load_queries
from tests.cluster.test_customize import base_model, configured, write_rows
from tokens.errors import UserError


def run_of(kept: dict[str, list[float]]) -> DomainRun:
    """One domain and one general set; each strategy loses so much general accuracy, seed by seed."""
    rows = []
    for strategy, losses in kept.items():
        for seed, lost in enumerate(losses):
            for stage, domain in ((GENERAL_STAGE, ""), (DOMAIN_STAGE, "law")):
                for samples, general in ((0, 0.8), (10, 0.8 - (lost if domain else 0))):
                    rows.append(DomainRow(strategy, stage, domain, seed, samples, "hh", general, 1.0))
                    rows.append(DomainRow(strategy, stage, domain, seed, samples, "law", 0.5 + samples / 100, 1.0))
    return DomainRun(Path(), ("hh",), ("law",), dict.fromkeys(kept, ""), {"hh": 0.5, "law": 0.5}, tuple(rows))


def test_claims_are_paired_differences_with_a_verdict() -> None:
    run = run_of({"grft-crft": [0.10, 0.12, 0.11], "rehearsal": [0.02, 0.03, 0.02], "enriched-4.5": [0.11, 0.10, 0.12]})
    found = {row["claim"]: row for row in judged(run)}
    assert list(found) == [claim.text for claim in CLAIMS]
    assert {row["claim"] for row in found.values() if row["verdict"] != "not run"} == {
        claim.text for claim in CLAIMS if claim.better in ("rehearsal", "enriched-4.5")
    }
    rehearsal = found["Rehearsal preserves general accuracy"]
    assert rehearsal["verdict"] == "holds" and rehearsal["difference"] == pytest.approx((0.08 + 0.09 + 0.09) / 3)
    assert rehearsal["general"]["difference"] == pytest.approx(rehearsal["difference"])
    assert found["More general data (4.5x) preserves general accuracy"]["verdict"] == "not told"
    few = judged(run_of({"grft-crft": [0.1], "rehearsal": [0.2]}))
    assert "too few seeds" in {row["verdict"] for row in few}
    tuned = run_of({"grft-crft": [0.01, 0.02, 0.01]})
    kept = judged(tuned, run, BASE_CLAIMS)[-1]
    assert kept["verdict"] == "holds" and kept["difference"] == pytest.approx((0.09 + 0.10 + 0.10) / 3)
    with pytest.raises(ValueError, match=r"the same seeds, got \[0\] and \[0, 1, 2\]"):
        judged(run_of({"grft-crft": [0.1]}), run, BASE_CLAIMS)


def test_seeds_are_customisations_of_their_own() -> None:
    one, two = run_of({"grft-crft": [0.1]}), run_of({"grft-crft": [0.3]})
    both = merged([one, replace(two, length_alone={"hh": 0.7, "law": 0.5})])
    assert per_seed(both, "grft-crft", "kept") == {0: pytest.approx(-0.1), 1: pytest.approx(-0.3)}
    assert both.length_alone["hh"] == pytest.approx(0.6)
    recipe = load_config(RECIPES["sandbox"])
    first, second = with_seed(recipe, 0), with_seed(recipe, 1)
    assert first.world != second.world and first.seed != second.seed
    assert on_base(first, "plain", None).name != on_base(second, "plain", None).name


@pytest.mark.parametrize("what", RECIPES)
def test_recipes_name_the_strategies_of_the_claims(what: str) -> None:
    config = load_config(RECIPES[what])
    named = {name for claim in (*CLAIMS, *BASE_CLAIMS) for name in (claim.better, claim.other)}
    assert named <= config.customize.strategies.keys()
    assert on_base(config, "decoder, tuned", None).name == f"{config.name}-decoder--tuned-{config.seed}"


def test_seconds_of_an_arm(tmp_path: Path) -> None:
    seconds = {"general, enrichment-1-imitation-0, seed 0": 4.0, "law, plain, seed 0": 1.0, "art, plain, seed 0": 2.0}
    (tmp_path / "card.json").write_text(json.dumps({"cpu_seconds": seconds}))
    assert arm_seconds([tmp_path]) == {"general_stage": 4.0, "domain_stage": 1.5, "all": 7.0}


def test_texts_to_pretrain_on_hold_every_set(tmp_path: Path) -> None:
    pairs, dsp = tmp_path / "pairs.jsonl", tmp_path / "dsp.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(3)))
    responses = {"law": "c", "art": "d", "trade": "e", "news": "f", "normal": "g"}
    dsp.write_text("".join(json.dumps({"query": query, "responses": responses}) + "\n" for query in ("q", "held out")))
    given = load_preferences(DataConfig(preferences=str(pairs)))
    texts = with_domain_texts(given, str(dsp), {DSP_PROMPT.format(query="held out")})
    assert [(row["chosen"], row["rejected"]) for row in texts.rows][3:] == [("c", "d"), ("e", "f"), ("g", "")]


def test_the_real_recipe_has_the_data_that_its_strategies_ask_for(shared_data: Path, tmp_path: Path) -> None:
    """With the tokenizer of the models that are pre-trained for it; their weights say nothing here."""
    recipe = load_config(RECIPES["dsp"])
    hh, dsp = shared_data / "hh_helpful" / "pairs.jsonl", shared_data / "dsp" / "responses.jsonl"
    domains = dict.fromkeys(recipe.customize.domains, str(dsp))
    customize = recipe.customize.model_copy(update={"general": {"hh": str(hh)}, "domains": domains})
    config = with_seed(recipe.model_copy(update={"customize": customize}), 0)
    out = held_out_prompts(config)
    pairs = load_preferences(config.data.model_copy(update={"preferences": str(hh)}))
    texts = with_domain_texts(pairs, str(dsp), out)
    base = tmp_path / "base"
    columns = [texts.rows[name] for name in ("prompt", "chosen", "rejected")]
    tokenizer = train_tokenizer([text for column in columns for text in column], SHAPE.vocab_size, base)
    make_model(tokenizer, SHAPE, 0).save_pretrained(base)
    reward = config.reward.model_copy(update={"base": str(base)})
    data = load_data(config.model_copy(update={"reward": reward}), tmp_path, Console())
    assert len(data.pool) >= 6.5 * config.customize.general_queries > 1000
    assert {each.name for each in data.domains} == set(domains)
    trained = {query.prompt_ids for each in (*data.general, *data.domains) for query in each.train}
    assert not trained & {query.prompt_ids for each in (*data.general, *data.domains) for query in each.test}
    assert all(len(each.train) > 340 and len(each.test) > 80 for each in data.domains)


def test_fits_of_an_experiment_leave_nothing_for_the_command(tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i % 7} w{i % 5}", "chosen": f"w2{i % 10} w21", "rejected": f"w1{i % 10} w11"} for i in range(40)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    material = {"base": str(base_model(tmp_path / "base")), "general": pairs, "dsp": pairs}
    strategies = {"plain": {}, "l2": {"penalty": "l2"}}
    config = configured(material, tmp_path, domains={"law": pairs}, general_queries=16, strategies=strategies)
    fit_here(config)
    run = read_domain_run(customize(config, Console()))
    assert not ray.is_initialized(), "all of it was there"
    ends = {row.strategy for row in run.rows if row.domain == "law" and row.set == "law" and row.samples > 0}
    assert ends == {"plain", "l2"}


def test_a_tuned_base_goes_through_what_its_claims_name() -> None:
    recipe = load_config(RECIPES["sandbox"])
    assert list(on_base(recipe, "tuned", None).customize.strategies) == ["direct", "grft-crft"]
    assert on_base(recipe, "plain", None).customize.strategies == recipe.customize.strategies


def test_a_brought_backbone_goes_through_everything_at_a_rate_of_its_own(tmp_path: Path) -> None:
    recipe = load_config(RECIPES["dsp"])
    name = "llama-finetuned"
    assert on_base(recipe, name, None).customize.strategies == recipe.customize.strategies
    stages = ("general_stage", "domain_stage")

    def rates(base: str, *overrides: str) -> list[float]:
        customize = at_own_rates(load_config(RECIPES["dsp"], overrides), base, overrides).customize
        return [getattr(customize, stage).lr for stage in stages]

    for base in MADE:
        assert rates(base) == [3e-3, 3e-3]
    assert rates(name) == [1e-5, 1e-5]
    assert rates(name, "--customize.domain_stage.lr", "2e-4") == [1e-5, 2e-4]
    assert rates(name, "--customize.general-stage.lr=3e-3") == [3e-3, 1e-5], "the recipe's own rate, said"
    found = dsp_bases(recipe, tmp_path / "cache", [tmp_path / name], [name])
    assert found == {name: tmp_path / name} and not (tmp_path / "cache").exists(), "nothing is made, or read, for it"


def test_seeds_side_by_side_come_back_in_order() -> None:
    assert side_by_side(abs, [-3, -1, -2], 2) == [3, 1, 2] == side_by_side(abs, [-3, -1, -2], 1)


def test_bases_of_one_name_are_refused(tmp_path: Path) -> None:
    recipe = load_config(RECIPES["dsp"])
    same = (tmp_path / "a" / "small", tmp_path / "b" / "small")
    for given, name in ((same, "small"), ((tmp_path / "encoder",), "encoder"), ((tmp_path / "tuned",), "tuned")):
        with pytest.raises(UserError, match=f"two bases are named {name}, and results go by the name"):
            dsp_bases(recipe, tmp_path, given)


def test_what_is_chosen_on_has_no_query_that_is_reported(shared_data: Path, tmp_path: Path) -> None:
    recipe = load_config(RECIPES["dsp"])
    domains = dict.fromkeys(recipe.customize.domains, str(shared_data / "dsp" / "responses.jsonl"))
    general = {"hh": str(shared_data / "hh_helpful" / "pairs.jsonl")}
    customize = recipe.customize.model_copy(update={"general": general, "domains": domains})
    config = recipe.model_copy(update={"customize": customize})
    left = without_reported(config, 2, tmp_path)
    reported = held_out_prompts(with_seed(config, 0)) | held_out_prompts(with_seed(config, 1))
    for name, path in {**left.customize.general, **left.customize.domains}.items():
        queries = load_queries(name, left.data.model_copy(update={"preferences": path})).queries
        assert len(queries) > 200 and not reported & {query.prompt for query in queries}
    stages = at_rate(left, 3.0, {}).customize
    assert stages.general_stage.lr == 3 * customize.general_stage.lr and stages.domain_stage.lr == 3 * customize.domain_stage.lr


def test_the_benchmark_compares_like_with_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--hidden",
        "32",
        "--layers",
        "1",
        "--texts",
        "12",
        "--tokens",
        "12",
        "--rounds",
        "1",
        "--domains",
        "3",
        "--rank",
        "2",
    ]
    row = bench.main(small, tmp_path / "results.jsonl")
    assert row["mixed_ratio"] > 0 and row["all_ratio"] > 0 and row["grouped_ratio"] > 0
    assert json.loads((tmp_path / "results.jsonl").read_text())["domains"] == 3
    assert "mixed_ratio" in capsys.readouterr().out
    found = bench.texts(12, 12, 4)
    assert [len({prompt for prompt, _ in found[start : start + 4]}) for start in (0, 4, 8)] == [1, 1, 1]
    assert len({prompt for prompt, _ in found}) == 3 and len({response for _, response in found}) == 12
    assert bench.main([*small, "--responses", "4"], tmp_path / "results.jsonl")["responses"] == 4


def test_a_backbone_that_cannot_mix_is_refused_by_the_benchmark(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, int] = {"vocab_size": 1000, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    config = OPTConfig(**shape, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    asked = [
        "--backbone",
        str(tmp_path / "opt"),
        "--texts",
        "4",
        "--tokens",
        "12",
        "--rounds",
        "1",
        "--domains",
        "2",
        "--rank",
        "2",
    ]
    with pytest.raises(UserError, match="opt cannot mix domains in a batch"):
        bench.main(asked, tmp_path / "results.jsonl")
