"""The benchmark and the experiments of domains, at a size at which nothing can be learned from them."""

import json
from pathlib import Path

import pytest

from benchmarks import domains as bench
from benchmarks.experiments.domains import CLAIMS, RECIPES, arm_seconds, judged, on_base, with_domain_texts
from cluster.load_config import load_config
from evaluation.domains import DOMAIN_STAGE, GENERAL_STAGE, DomainRow, DomainRun
from preferences.config import DataConfig
from preferences.load import load_preferences


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
    assert list(found) == [claim.text for claim in CLAIMS if claim.better in ("rehearsal", "enriched-4")]
    rehearsal = found["Rehearsal preserves general accuracy"]
    assert rehearsal["verdict"] == "holds" and rehearsal["difference"] == pytest.approx((0.08 + 0.09 + 0.09) / 3)
    assert found["More general data (4 to 4.5x) preserves general accuracy"]["verdict"] == "not told"
    few = judged(run_of({"grft-crft": [0.1], "rehearsal": [0.2]}))
    assert [row["verdict"] for row in few] == ["too few seeds"]


@pytest.mark.parametrize("what", RECIPES)
def test_recipes_name_the_strategies_of_the_claims(what: str) -> None:
    config = load_config(RECIPES[what])
    assert {"direct", "grft-crft"} <= config.customize.strategies.keys()
    assert on_base(config, "decoder, tuned", None).name == f"{config.name}-decoder--tuned"


def test_seconds_of_an_arm(tmp_path: Path) -> None:
    seconds = {"general, enrichment-1-imitation-0, seed 0": 4.0, "law, plain, seed 0": 1.0, "art, plain, seed 0": 2.0}
    (tmp_path / "card.json").write_text(json.dumps({"cpu_seconds": seconds}))
    assert arm_seconds(tmp_path) == {"general_stage": 4.0, "domain_stage": 1.5, "all": 7.0}


def test_texts_to_pretrain_on_hold_every_set(tmp_path: Path) -> None:
    pairs, dsp = tmp_path / "pairs.jsonl", tmp_path / "dsp.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(3)))
    dsp.write_text(json.dumps({"query": "q", "responses": {"law": "c", "art": "d", "trade": "e", "normal": "f"}}) + "\n")
    texts = with_domain_texts(load_preferences(DataConfig(preferences=str(pairs))), str(dsp))
    assert [(row["chosen"], row["rejected"]) for row in texts.rows][3:] == [("c", "d"), ("e", "f")]


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
