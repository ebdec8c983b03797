"""The three stages of customisation: what is made of a config, that it goes on, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from actors.customize import ADAPTER, MODEL, StageJob, StageReport, run_stage
from actors.process import ProcessSetup
from actors.ranks import Rank
from actors.reward_trainer import RewardTrainer
from actors.scorer import EnsembleScorer, vote
from cluster.config import RunConfig
from cluster.console import Console
from cluster.customize import Stages, _write, in_words, is_done
from cluster.domain_checks import check_settings
from cluster.domain_data import DomainData, QueryData, load_data
from cluster.domain_directory import DomainDirectory
from cluster.domain_models import export, export_all, find_domain, find_domains, with_domain_reward
from cluster.inputs import check_domains, open_source
from cluster.load_config import checked
from cluster.run_directory import config_text
from cluster.sandbox_source import SandboxSource
from evaluation.domain_report import write_domain_report
from evaluation.domains import outcomes, pareto, read_domain_run
from preferences.config import DataConfig
from preferences.queries import load_queries, split_queries
from rm.batches import score_sequences
from rm.config import MetaConfig, ScorerConfig
from rm.domain_bank import open_bank
from rm.domain_config import ADAPTERS
from rm.model import RewardModel
from sandbox.tokenizer import make_tokenizer
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tests.cluster.refused import refused
from tokens.durable import commit_directory
from tokens.errors import UserError
from tokens.guards import GuardsConfig
from tokens.queries import Query
from tokens.records import Pair, Prompt, Rollout

WORDS = [f"w{i}" for i in range(30)]
STRATEGIES: dict[str, Any] = {
    "direct": {"general": False},
    "plain": {},
    "imitate": {"general_imitation": 0.1, "domain_imitation": 0.1},
    "enriched": {"enrichment": 1.5, "rehearsal": 0.5},
}


def base_model(folder: Path, encoder: bool = False) -> Path:
    """A random model with a tokenizer of thirty words."""
    tokenizer = make_tokenizer(WORDS)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = BertForMaskedLM(BertConfig(**shape)) if encoder else LlamaForCausalLM(LlamaConfig(**shape, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, general pairs in which late words are good, and a file of DSP with two domains."""
    folder = tmp_path_factory.mktemp("material")
    pairs = [{"prompt": f"w{i % 7} w{i % 5}", "chosen": f"w2{i % 10} w21", "rejected": f"w{10 + i % 10} w11"} for i in range(60)]
    rows = [
        {"query": f"w{i % 10} w{i // 10}", "responses": {"law": f"w1{i % 10} w3", "trade": f"w2{i % 10} w4 w5", "normal": "w6"}}
        for i in range(30)
    ]
    return {
        "base": str(base_model(folder / "base")),
        "general": write_rows(folder / "general.jsonl", pairs),
        "dsp": write_rows(folder / "dsp.jsonl", rows),
    }


def configured(material: dict[str, Any], storage: Path, **changes: Any) -> RunConfig:
    customize: dict[str, Any] = {
        "general": {"hh": material["general"]},
        "domains": {"law": material["dsp"], "trade": material["dsp"]},
        "general_stage": {"lr": 3e-3, "batch_size": 8},
        "domain_stage": {"lr": 3e-3, "batch_size": 8},
        "general_queries": 30,
        "strategies": STRATEGIES,
        "test_fraction": 0.2,
        **changes,
    }
    tree = {
        "name": "two",
        "storage": str(storage),
        "data": {"max_prompt_tokens": 16, "max_response_tokens": 40},
        "rollout": {"max_new_tokens": 8},
        "reward": {"base": material["base"], "pooling": "mean", "microbatch_size": 8},
        "resources": {"reward": {"num_cpus": 0.5, "threads": 1}},
        "customize": customize,
    }
    return checked(tree, "test")


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Rank:
    threads = torch.get_num_threads()
    return Rank(ProcessSetup("here", tmp_path_factory.mktemp("logs") / "here.log", threads, "cpu", "float32", 0, 1, False))


PARTS: tuple[Callable[[QueryData], Sequence[Query]], ...] = (lambda each: each.train, lambda each: each.test)


class Killed(Exception):
    """The process is gone."""


def fitted(rank: Rank, job: StageJob, data: DomainData, die_at: int | None = None) -> StageReport:
    def tell(samples: int, last: bool) -> None:
        if samples == die_at:
            raise Killed

    domains = {each.name: each.train for each in data.domains}
    return run_stage(rank, job, data.pool, domains, data.tests, commit_directory, tell, lambda: None)


def everything(rank: Rank, config: RunConfig) -> tuple[DomainDirectory, Stages]:
    """All stages in this process, as the command hands them to Ray."""
    directory = DomainDirectory(config)
    with directory.open():
        data = load_data(config, Path(config.storage or ""), Console(), directory.settled())
        directory.refuse_other_inputs(data.fingerprint(), data.base, data.sets)
        stages = Stages(config, directory, data)
        for job in (*stages.general(), *stages.domains()):
            if not job.directory.is_dir():
                fitted(rank, job, data)
        _write(directory, data, stages, Console())
    return directory, stages


@pytest.fixture(scope="module")
def whole(material: dict[str, Any], rank: Rank, tmp_path_factory: pytest.TempPathFactory) -> DomainDirectory:
    return everything(rank, configured(material, tmp_path_factory.mktemp("storage")))[0]


def test_general_stages_are_shared_and_every_domain_is_measured(whole: DomainDirectory) -> None:
    assert sorted(path.name for path in (whole.path / "general").iterdir()) == [
        "enrichment-1-imitation-0", "enrichment-1-imitation-0.1", "enrichment-1.5-imitation-0"
    ]  # fmt: skip
    run = read_domain_run(whole.path)
    assert run.general == ("hh",) and run.domains == ("law", "trade") and tuple(run.strategies) == tuple(STRATEGIES)
    assert {(row.strategy, row.domain) for row in run.rows if row.stage == "domain"} == {
        (strategy, domain) for strategy in STRATEGIES for domain in ("law", "trade")
    }
    for row in run.rows:
        assert row.set in ("hh", "law", "trade") and 0 <= row.accuracy <= 1
    seen = {row.samples for row in run.rows if row.strategy == "enriched" and row.stage == "general"}
    assert min(seen) == 0 and max(seen) == 45
    seen = {row.samples for row in run.rows if row.strategy == "enriched" and row.domain == "law"}
    assert max(seen) == 24 + 12  # half as many general queries beside the domain's own
    found = {outcome.strategy: outcome for outcome in outcomes(run)}
    assert found["direct"].forgotten is None and found["plain"].forgotten is not None
    ends = [row.accuracy for row in run.rows if row.strategy == "plain" and row.domain == row.set and row.samples == 24]
    assert found["plain"].domain.value == pytest.approx(sum(ends) / 2)
    starts = [row for row in run.rows if row.strategy == "plain" and row.domain and row.set == "hh" and row.samples == 0]
    lasts = [row for row in run.rows if row.strategy == "plain" and row.domain and row.set == "hh" and row.samples == 24]
    lost = sum(row.accuracy for row in starts) / 2 - sum(row.accuracy for row in lasts) / 2
    assert found["plain"].forgotten.value == pytest.approx(lost)


def test_the_domain_stage_begins_where_the_general_stage_ended(whole: DomainDirectory) -> None:
    rows = read_domain_run(whole.path).rows
    end = {row.set: row.loss for row in rows if row.strategy == "imitate" and row.stage == "general" and row.samples == 30}
    start = {row.set: row.loss for row in rows if row.strategy == "imitate" and row.domain == "law" and row.samples == 0}
    assert start == pytest.approx(end, abs=1e-5)


def test_the_report_has_a_table_curves_and_a_front(whole: DomainDirectory) -> None:
    page = write_domain_report(whole.path).read_text()
    assert "length alone" in page and "Pareto front" in page and "enriched" in page and "<script" not in page
    names = sorted(path.name for path in (whole.path / "figures").iterdir())
    assert names == ["domain-stage.png", "each-domain.png", "general-stage.png", "pareto.png"]
    assert (whole.path / "table.md").read_text().count("\n") == 2 + len(STRATEGIES) + 1
    assert write_domain_report(whole.path).read_text() == page


@pytest.mark.parametrize(
    ("points", "front"),
    [([(1, 1), (2, 0.5), (0.5, 0.5)], [True, True, False]), ([(1, 1), (1, 1)], [True, True]), ([(1, 2), (1, 1)], [True, False])],
)
def test_the_front_holds_what_nothing_beats(points: list[tuple[float, float]], front: list[bool]) -> None:
    assert pareto(points) == front


def test_a_stage_that_died_goes_on_and_ends_the_same(
    whole: DomainDirectory, material: dict[str, Any], rank: Rank, tmp_path: Path
) -> None:
    config = configured(material, tmp_path)
    directory = DomainDirectory(config)
    with directory.open():
        data = load_data(config, tmp_path, Console())
        job = next(job for job in Stages(config, directory, data).general() if job.imitation)
        with pytest.raises(Killed):
            fitted(rank, job, data, die_at=24)
        assert not job.directory.exists()
        report = fitted(rank, job, data)
    assert report.resumed_at == 16
    there = whole.path / job.directory.relative_to(directory.path)
    assert report.looks == StageReport.read(there).looks
    for name in ("model.safetensors", "language_head/head.safetensors"):
        got, expected = (load_file(folder / MODEL / name) for folder in (job.directory, there))
        assert got.keys() == expected.keys() and all(torch.equal(got[key], value) for key, value in expected.items())
    assert [path.name for path in job.directory.parent.iterdir()] == [job.directory.name]  # checkpoints are gone


@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        ({"penalty": "ewc", "penalty_coef": 10.0, "rehearsal": 0.5}, 0),
        ({"penalty": "l2", "penalty_coef": 0.1}, 0),
        ({"domain_imitation": 0.1}, 2),
    ],
)
def test_a_domain_stage_that_died_goes_on_and_ends_the_same(
    material: dict[str, Any], rank: Rank, tmp_path: Path, strategy: dict[str, Any], lora: int
) -> None:
    reports, kept = [], []
    for name, die_at in (("whole", None), ("cut", 16)):
        config = configured(material, tmp_path / name, strategies={"one": strategy}, lora={"rank": lora}, fisher_queries=8)
        directory = DomainDirectory(config)
        with directory.open():
            data = load_data(config, tmp_path / name, Console())
            stages = Stages(config, directory, data)
            fitted(rank, stages.general()[0], data)
            job = stages.domains()[0]
            if die_at is not None:
                with pytest.raises(Killed):
                    fitted(rank, job, data, die_at=die_at)
            reports.append(fitted(rank, job, data))
        kept.append(load_file(next(job.directory.glob("*/*model.safetensors"))))
    assert [report.resumed_at for report in reports] == [0, 8] and reports[0].looks == reports[1].looks
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[1][key], value) for key, value in kept[0].items())


def test_a_strategy_that_imitates_may_be_added(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    everything(rank, configured(material, tmp_path, strategies={"plain": {}}))
    both = {"plain": {}, "imitate": {"domain_imitation": 0.1}}
    directory, _ = everything(rank, configured(material, tmp_path, strategies=both))
    assert [path.name for path in (directory.path / "general").iterdir()] == ["enrichment-1-imitation-0"]
    assert {row.strategy for row in read_domain_run(directory.path).rows} == set(both)


def test_a_strategy_that_comes_back_otherwise_is_not_the_old_one(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    def stages(**strategies: Any) -> tuple[DomainData, list[StageJob]]:
        config = configured(material, tmp_path, strategies=strategies)
        with DomainDirectory(config).open() as directory:
            found = Stages(config, directory, data := load_data(config, tmp_path, Console()))
            directory.keep_config()
        return data, found.domains()

    data, jobs = stages(direct={"general": False}, other={"general": False})
    fitted(rank, jobs[0], data)
    with pytest.raises(Killed):
        fitted(rank, jobs[1], data, die_at=24)
    assert is_done(jobs[0]) and not is_done(jobs[1])
    stages(other={"general": False})  # direct is taken out
    data, jobs = stages(direct={"general": False, "domain_imitation": 0.1}, other={"general": False})
    with pytest.raises(UserError, match=r"imitation: 0.0 there, 0.1 here.*Another strategy needs another name"):
        is_done(jobs[0])
    half = replace(jobs[1], imitation=0.1)
    with pytest.raises(UserError, match="is of another fit"):
        fitted(rank, half, data)


def test_adapters_are_found_by_name_and_served(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    config = configured(material, tmp_path, lora={"rank": 2}, strategies={"plain": {}})
    directory, stages = everything(rank, config)
    moved = directory.path.rename(tmp_path / "domains" / "moved")  # an adapter knows its backbone by its place in the directory
    backbone = find_domain(tmp_path, "law").backbone
    assert backbone.is_dir() and backbone.is_relative_to(moved)
    moved.rename(directory.path)
    law, trade = (find_domain(tmp_path, name) for name in ("law", "two/plain/trade"))
    assert law.adapter == directory.domain("plain", 0, "law") / ADAPTER and law.backbone == trade.backbone
    assert trade.adapter is not None and law.adapter is not None
    model = RewardModel.from_pretrained(law.backbone, torch.float32)
    bank = open_bank(model, [("law", law.adapter), ("trade", trade.adapter)])
    run = read_domain_run(directory.path)
    for name in ("law", "trade"):
        test = stages.data.domain(name).test
        sequences = [(query.prompt_ids, ids) for query in test for ids in query.responses]
        scores = bank.scores(sequences, [name] * len(sequences), 8, 0)
        rows, wins = iter(scores.tolist()), []
        for query in test:
            own = [next(rows) for _ in query.responses]
            wins += [0.5 * (1 + (own[j] > own[k]) - (own[j] < own[k])) for j, k in query.comparisons]
        last = max(row.samples for row in run.rows if row.domain == name)
        measured = next(row for row in run.rows if row.domain == row.set == name and row.samples == last)
        assert sum(wins) / len(wins) == pytest.approx(measured.accuracy)
    whole = RewardModel.from_pretrained(export(law, tmp_path / "cache"), torch.float32)
    one = [(query.prompt_ids, query.responses[0]) for query in stages.data.domain("law").test]
    merged = score_sequences(whole, one, 4, 0)
    torch.testing.assert_close(merged, bank.scores(one, ["law"] * len(one), 4, 0), rtol=1e-4, atol=1e-5)
    paid = config.model_copy(update={"scorer": ScorerConfig(reward_model="domain:law", num_members=1, aggregate="primary")})
    assert with_domain_reward(paid, tmp_path).reward.base == str(export(law, tmp_path / "cache"))
    assert with_domain_reward(config, tmp_path) is config
    together = export_all(find_domains(tmp_path, "two"), tmp_path / "cache")
    assert sorted(path.name for path in (together / ADAPTERS).iterdir()) == ["law", "trade"]
    assert with_domain_reward(
        paid.model_copy(update={"scorer": paid.scorer.model_copy(update={"reward_model": "domains:two/plain"})}), tmp_path
    ).reward.base == str(together)
    with pytest.raises(UserError, match="expected one strategy of a customisation, there are plain"):
        find_domains(tmp_path, "two/other")
    other, cache = tmp_path / "domains" / "again", tmp_path / "cache"
    shutil.copytree(directory.path, other)
    run = tmp_path / "runs" / paid.name / "config.yaml"
    run.parent.mkdir(parents=True)
    run.write_text(config_text(with_domain_reward(paid.model_copy(update={"scorer": paid.scorer.model_copy(
        update={"reward_model": "domain:two/law"})}), tmp_path)))  # fmt: skip
    with pytest.raises(UserError, match="could be again/plain/law"):
        with_domain_reward(paid, tmp_path)
    run.write_text(
        config_text(paid.model_copy(update={"reward": paid.reward.model_copy(update={"base": str(export(law, cache))})}))
    )
    assert with_domain_reward(paid, tmp_path).reward.base == str(export(law, cache)), "a run keeps the model it was begun with"
    with pytest.raises(UserError, match="could be again/plain/law, two/plain/law: more than one adapter has this name"):
        find_domain(tmp_path, "law")
    with pytest.raises(UserError, match=r"there is no such domain in .*; there are law, trade"):
        find_domain(tmp_path, "art")
    with pytest.raises(UserError, match="no name of a domain"):
        find_domain(tmp_path, "a/b/c/law")


def given_general(whole: DomainDirectory, folder: Path, ignored: str = "") -> str:
    """A copy of a general reward model that a customisation left."""
    there = whole.path / "general" / "enrichment-1-imitation-0" / "seed_0" / MODEL
    return str(shutil.copytree(there, folder, ignore=shutil.ignore_patterns(ignored)))


def test_a_general_reward_model_that_is_there_is_gone_on_from(
    whole: DomainDirectory, material: dict[str, Any], rank: Rank, tmp_path: Path
) -> None:
    base = given_general(whole, tmp_path / "given")
    strategies = {"direct": {"general": False}, "imitate": {"general": False, "domain_imitation": 0.1}}
    directory, stages = everything(rank, configured(material | {"base": base}, tmp_path, strategies=strategies, lora={"rank": 2}))
    assert not (directory.path / "general").exists()
    run = read_domain_run(directory.path)
    ends = {
        row.loss for row in read_domain_run(whole.path).rows if (row.strategy, row.domain) == ("plain", "") and row.samples == 30
    }
    for row in run.rows:
        if row.samples == 0:
            assert min(abs(row.loss - end) for end in ends) < 1e-5, "adapters start at 0, so it judges as it did"
    for outcome in outcomes(run):
        lost = [
            start.accuracy - end.accuracy
            for start in run.rows
            for end in run.rows
            if (start.strategy, start.set, start.samples) == (outcome.strategy, "hh", 0)
            and (end.strategy, end.set, end.domain, end.samples) == (outcome.strategy, "hh", start.domain, 24)
        ]
        assert len(lost) == 2 and outcome.forgotten is not None and outcome.forgotten.value == pytest.approx(sum(lost) / 2)
    assert run.strategies["direct"] == "from the given reward model"
    assert "from the given reward model" in write_domain_report(directory.path).read_text()
    found = find_domains(tmp_path, "two/direct")
    assert {model.backbone for model in found} == {Path(base)} and [model.name for model in found] == ["law", "trade"]
    adapters = [(model.name, model.adapter) for model in found if model.adapter is not None]
    bank = open_bank(RewardModel.from_pretrained(found[0].backbone, torch.float32), adapters)
    texts = [(query.prompt_ids, query.responses[0]) for query in stages.data.domain("law").test]
    merged = RewardModel.from_pretrained(export(found[0], tmp_path / "cache"), torch.float32)
    served = bank.scores(texts, ["law"] * len(texts), 8, 0)
    torch.testing.assert_close(score_sequences(merged, texts, 8, 0), served, rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in (export_all(found, tmp_path / "cache") / ADAPTERS).iterdir()) == ["law", "trade"]
    (Path(base) / "optimizer.pt").write_text("not of the model")
    assert not [*export_all(found, tmp_path / "cache").glob("*.pt")]
    weights = Path(base) / "model.safetensors"
    trained = weights.read_bytes()
    weights.write_bytes(trained[:-1] + bytes([trained[-1] ^ 1]))
    with pytest.raises(UserError, match=r"given is not the general reward model that its adapter was trained on any more"):
        find_domain(tmp_path, "two/direct/law")
    weights.write_bytes(trained)
    assert find_domain(tmp_path, "two/direct/law").backbone == Path(base)
    Path(base).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the general reward model that its adapter was trained on is not in"):
        find_domain(tmp_path, "two/direct/law")


def test_a_general_reward_model_holds_its_weights_and_imitates_with_the_head_beside_it(
    whole: DomainDirectory, material: dict[str, Any], rank: Rank, tmp_path: Path
) -> None:
    base = given_general(whole, tmp_path / "given")
    strategies = {"ewc": {"general": False, "penalty": "ewc"}, "again": {"domain_imitation": 0.1}}
    directory, _ = everything(rank, configured(material | {"base": base}, tmp_path, strategies=strategies))
    assert {row.strategy for row in read_domain_run(directory.path).rows} == set(strategies)
    bare = material | {"base": given_general(whole, tmp_path / "bare", "language_head")}
    imitate = {"imitate": {"general": False, "domain_imitation": 0.1}}
    with pytest.raises(UserError, match=r"holds a reward model without a language head. Start from .* that `customize` made of"):
        load_data(configured(bare, tmp_path, strategies=imitate), tmp_path, Console())
    load_data(configured(bare, tmp_path, strategies={"direct": {"general": False}}, lora={"rank": 2}), tmp_path, Console())


def test_another_domain_later(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    own = material | {"dsp": str(shutil.copy(material["dsp"], tmp_path / "dsp.jsonl"))}
    strategies = {"plain": {}, "direct": {"general": False}}
    first, before = everything(rank, configured(own, tmp_path, domains={"law": own["dsp"]}, strategies=strategies))
    kept = {path: path.read_bytes() for path in first.path.rglob("stage.json")}
    given = load_queries("hh", DataConfig(preferences=own["general"]))
    learnt, out = ({query.prompt for query in part} for part in split_queries(given, 0.2, 0))
    files = {"art": sorted(out) + sorted(learnt)[:4], "music": sorted(learnt)[:14] + [f"w9 w8 w{i}" for i in range(14)]}
    rows = {
        name: [{"prompt": text, "responses": ["w7", "w8"], "scores": [1, 0]} for text in texts] for name, texts in files.items()
    }
    further = {name: write_rows(tmp_path / f"{name}.jsonl", rows[name]) for name in files}
    more = configured(own, tmp_path, domains=further | {"law": own["dsp"]}, strategies=strategies)
    directory, stages = everything(rank, more)
    assert {path: path.read_bytes() for path in kept} == kept and len(kept) == 3
    assert len([*directory.path.rglob("stage.json")]) == 7, "a stage of each further domain for each strategy, and no other"
    assert stages.data.pool == before.data.pool and stages.data.domain("law").train == before.data.domain("law").train
    run = read_domain_run(directory.path)
    assert run.domains == (*files, "law") and all(outcome.per_domain.keys() == {*files, "law"} for outcome in outcomes(run))
    assert "Each domain" in write_domain_report(directory.path).read_text()
    assert {find_domain(tmp_path, f"two/plain/{name}").name for name in run.domains} == {*files, "law"}
    art, music = (stages.data.domain(name) for name in files)
    assert art.held_out_elsewhere > 0 and music.trained_before > 0, "their prompts are the general ones"
    trained, held_out = ({query.prompt_ids for each in stages.data.sets for query in part(each)} for part in PARTS)
    assert not trained & held_out
    counts = json.loads((directory.path / "card.json").read_text())["queries"]
    for name, texts in files.items():
        assert sum(counts[name][key] for key in ("train", "held_out", "trained_before", "held_out_elsewhere")) == len(texts)
    assert "not measured on, as they were trained on before this set came" in music.in_words()
    again = load_data(more, tmp_path, Console(), directory.settled())
    assert [each.fingerprint() for each in again.sets] == [each.fingerprint() for each in stages.data.sets]
    write_rows(tmp_path / "dsp.jsonl", [json.loads(line) for line in Path(own["dsp"]).read_text().splitlines()][1:])
    with pytest.raises(UserError, match=r"begun with: the data of law, although"):
        everything(rank, more)


def test_data_of_a_domain_may_be_mended_until_something_was_fitted_on_them(
    material: dict[str, Any], rank: Rank, tmp_path: Path
) -> None:
    strategies = {"direct": {"general": False}}
    config = configured(material, tmp_path, domains={"law": material["dsp"]}, strategies=strategies)
    directory, _ = everything(rank, config)
    trade = [{"prompt": f"w1 w2 w{i}", "responses": ["w7", "w8"], "scores": [1, 0]} for i in range(14)]
    file = write_rows(tmp_path / "trade.jsonl", trade)
    more = configured(material, tmp_path, domains={"law": material["dsp"], "trade": file}, strategies=strategies)
    begun = DomainDirectory(more)
    with begun.open():  # a command that ended before it had fitted anything
        data = load_data(more, tmp_path, Console(), begun.settled())
        begun.refuse_other_inputs(data.fingerprint(), data.base, data.sets)
    assert "the data of trade" in json.loads((directory.path / "data.json").read_text())
    write_rows(tmp_path / "trade.jsonl", [row | {"scores": [0, 1]} for row in trade])
    everything(rank, more)
    assert read_domain_run(directory.path).domains == ("law", "trade")
    write_rows(tmp_path / "trade.jsonl", trade)
    with pytest.raises(UserError, match=r"begun with: the data of trade, although"):
        everything(rank, more)


def test_a_directory_of_an_earlier_version_goes_on(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    config = configured(material, tmp_path, domains={"law": material["dsp"]}, strategies={"direct": {"general": False}})
    directory, stages = everything(rank, config)
    file = directory.path / "data.json"
    noted = json.loads(file.read_text())
    old = {key: noted[key] for key in ("base model", "resources.reward.dtype")} | {"data sets": stages.data.fingerprint()}
    file.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"begun with: data sets, although.* begun by an earlier version"):
        everything(rank, configured(material, tmp_path, strategies={"direct": {"general": False}}))
    everything(rank, config)
    assert json.loads(file.read_text()) == noted
    everything(rank, configured(material, tmp_path, strategies={"direct": {"general": False}}))
    assert read_domain_run(directory.path).domains == ("law", "trade")


def test_no_set_trains_on_what_another_holds_out(material: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(material["general"]).read_text().splitlines()]
    law = write_rows(tmp_path / "law.jsonl", rows[:16])
    strategies = {"direct": {"general": False}}
    config = configured(material, tmp_path, domains={"law": law}, test_fraction=0.3, strategies=strategies)
    data = load_data(config, tmp_path, Console())
    tests = {query.prompt_ids for each in data.sets for query in each.test}
    assert tests and not tests & {query.prompt_ids for each in data.sets for query in each.train}
    assert sum(each.held_out_elsewhere for each in data.sets) > 0
    for each, number in zip(data.sets, (60, 16), strict=True):
        assert len(each.train) + each.held_out + each.held_out_elsewhere == number
        assert (
            f"{each.held_out_elsewhere} not trained on, as another set holds them out" in each.in_words()
            or not each.held_out_elsewhere
        )


def test_a_set_without_a_query_of_its_own_is_refused(material: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(material["general"]).read_text().splitlines()]
    data = load_data(configured(material, tmp_path), tmp_path, Console())
    out = {query.id for query in data.general[0].test}
    all_out = [row for i, row in enumerate(rows) if any(key.startswith(f"{i + 1}-") or key == str(i + 1) for key in out)]
    assert len(all_out) > 3
    law = write_rows(tmp_path / "law.jsonl", all_out)
    with pytest.raises(UserError, match=r"law .*: every prompt that it trains on is held out to measure another set"):
        load_data(configured(material, tmp_path, domains={"law": law}), tmp_path, Console())


def test_rows_that_lose_a_response_are_not_left_out_and_few_are_measured(material: dict[str, Any], tmp_path: Path) -> None:
    long = " ".join(f"w{i % 30}" for i in range(60))
    rows = [{"prompt": f"w{i} w1", "responses": ["w7", "w8", long], "scores": [2, 1, 0]} for i in range(20)]
    rows += [{"prompt": f"w{i} w2", "responses": ["w7", long], "scores": [1, 0]} for i in range(3)]
    law = write_rows(tmp_path / "law.jsonl", rows)
    config = configured(
        material, tmp_path, domains={"law": law}, strategies={"direct": {"general": False}}, measured_queries=2, domain_queries=9
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"drop_bad": True})})
    found = load_data(config, tmp_path, Console()).domain("law")
    assert len(found.train) + len(found.test) + found.left_out == 9 + 2 and found.left_out <= 3
    assert found.held_out == 5 and f"5 held out, {len(found.test)} of them measured on" in found.in_words()


def test_other_data_or_another_config_is_refused(material: dict[str, Any], tmp_path: Path) -> None:
    config = configured(material, tmp_path, strategies={"plain": {}})
    directory = DomainDirectory(config)
    with directory.open():
        directory.refuse_other_inputs("one", Path(material["base"]))
    more = configured(material, tmp_path, strategies={"plain": {}, "direct": {"general": False}}, seeds=2)
    with DomainDirectory(more).open():  # further strategies and seeds may be added
        pass
    with pytest.raises(UserError, match=r"not those that .* was begun with: data sets, although"):
        directory.refuse_other_inputs("two", Path(material["base"]))
    rebuilt = shutil.copytree(material["base"], tmp_path / "rebuilt")
    weights = load_file(rebuilt / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, rebuilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not those that .* was begun with: base model, although"):
        directory.refuse_other_inputs("one", rebuilt)
    resources = config.resources.model_copy(update={"reward": config.resources.reward.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(UserError, match=r"not those that .* was begun with: resources.reward.dtype, although"):
        DomainDirectory(config.model_copy(update={"resources": resources})).refuse_other_inputs("one", Path(material["base"]))
    other = configured(material, tmp_path, strategies={"plain": {"rehearsal": 1.0}})
    with (
        pytest.raises(UserError, match=r"customize\.strategies\.plain.rehearsal: 0.0 there, 1.0 here"),
        DomainDirectory(other).open(),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": {"a": {"enrichment": 6.5}}}, "asks for 195 general queries, there are 48 to train on"),
        ({"strategies": {"a": {"rehearsal": 3.0}}}, "asks for 72 general queries beside the 24 of law, there are 30"),
        ({"general": {}}, "customize.general is empty, and the strategies"),
        ({"domains": {}}, "customize.domains is empty"),
        ({"domains": {"hh": "x"}}, "hh is a domain and a general data set"),
        ({"domains": {"law": "x", "Law": "y"}}, "differ in case alone, and would be one adapter"),
        ({"domains": {"a/b": "x"}}, "a name has letters, digits"),
        ({"strategies": {"a": {"penalty": "ewc"}}, "lora": {"rank": 2}}, "adapters leave the backbone as it was"),
        ({"strategies": {"a": {"general": False}}, "lora": {"rank": 2}}, "an adapter is scored on the general model"),
        (
            {"strategies": {"a": {"general": False, "penalty": "ewc"}}},
            "penalty ewc, which holds what a general model has learned",
        ),
        (
            {"strategies": {"a": {"general": False, "penalty": "ewc"}}, "general": {}},
            "customize.general is empty, and the strategies a",
        ),
        ({"strategies": {"a": {"general": False, "enrichment": 2}}}, "enrichment is of the general stage"),
        ({"strategies": {"a": {"enrichment": 2}}, "general_queries": None}, "general_queries null, which takes all"),
    ],
)
def test_bad_configs_are_refused_before_anything_starts(
    material: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def try_it() -> None:
        config = configured(material, tmp_path, **changes)
        check_settings(config)
        load_data(config, tmp_path, Console())

    with pytest.raises(UserError, match=message):
        try_it()


def test_an_encoder_cannot_imitate(material: dict[str, Any], tmp_path: Path) -> None:
    encoder = material | {"base": str(base_model(tmp_path / "encoder", encoder=True))}
    config = configured(encoder, tmp_path)
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"pooling": "last"})})
    with pytest.raises(UserError, match=r"imitate have an imitation loss, .* holds an encoder without a language head"):
        load_data(config, tmp_path, Console())


def test_what_customize_does_not_use_is_refused(material: dict[str, Any], tmp_path: Path) -> None:
    config = configured(material, tmp_path)
    lora = config.reward.model_copy(update={"lora": config.reward.lora.model_copy(update={"rank": 4})})
    with pytest.raises(UserError, match=r"no use for reward.lora.rank 4"):
        check_settings(config.model_copy(update={"reward": lora}))
    divided = config.reward.model_copy(update={"backward_size": 8})
    with pytest.raises(UserError, match=r"no use for reward.backward_size 8"):
        check_settings(config.model_copy(update={"reward": divided}))


def test_a_given_reward_model_is_not_trained(material: dict[str, Any], tmp_path: Path) -> None:
    tree = {"name": "paid", "scorer": {"reward_model": "domain:law", "num_members": 1, "aggregate": "primary"}}
    with pytest.raises(UserError, match=r"meta\.enabled is True and scorer\.reward_model domain:law"):
        checked(tree, "test")
    with pytest.raises(UserError, match=r"scorer\.reward_model"):
        checked({"name": "paid", "scorer": {"reward_model": "law"}}, "test")
    config = checked({**tree, "meta": {"enabled": False}}, "test")
    with pytest.raises(UserError, match="no domain was ever customised"):
        with_domain_reward(config, tmp_path)


def test_prompts_of_a_domain_without_an_adapter_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cooking", "travel"):
        (tmp_path / "base" / ADAPTERS / name).mkdir(parents=True)
    here, elsewhere = ({"enabled": False, "prompts": f"sandbox:{names}"} for names in ("cooking,travel", "cooking,garden"))
    tree: dict[str, Any] = {
        "name": "paid", "meta": here,
        "scorer": {"reward_model": "domains:two", "num_members": 1, "aggregate": "primary"},
        "policy": {"prompts": "sandbox:cooking,travel"}, "world": {"num_prompts": 100},
    }  # fmt: skip

    def check(**changes: Any) -> None:
        config = checked({**tree, **changes}, "test")
        source = open_source(config, tmp_path)
        check_domains(
            config.model_copy(update={"reward": config.reward.model_copy(update={"base": str(tmp_path / "base")})}), source
        )

    check()
    with pytest.raises(UserError, match="no reward model for the domain 'garden'; there are cooking, travel"):
        check(policy={"prompts": "sandbox:cooking,garden"})
    with pytest.raises(UserError, match=r"S_k is sampled for prompts of it: set meta.prompts as policy.prompts"):
        check(meta=elsewhere)
    one = (["cooking"] * 4, [], ["cooking"] * 3 + ["travel"])
    monkeypatch.setattr(SandboxSource, "prompt_domains", lambda self: one)
    with pytest.raises(UserError, match="the domain 'travel' has 1 of the 4 evaluation prompts, at least 2 are needed"):
        check()
    monkeypatch.undo()
    for name in World(checked(tree, "test").world).train_domains:
        (tmp_path / "base" / ADAPTERS / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="of the 8 evaluation prompts, at least 2 are needed to measure its unit"):
        check(policy={}, evaluation={"num_prompts": 8})


def test_words_for_a_strategy(material: dict[str, Any], tmp_path: Path) -> None:
    strategies = configured(material, tmp_path).customize.strategies
    assert [in_words(strategy) for strategy in strategies.values()] == [
        "no general stage", "general x 1", "general x 1, imitation 0.1 (general), imitation 0.1 (domain)",
        "general x 1.5, rehearsal 0.5",
    ]  # fmt: skip
    ewc = strategies["plain"].model_copy(update={"penalty": "ewc", "penalty_coef": 2.0})
    assert in_words(ewc) == "general x 1, ewc 2"


def test_the_command_fits_side_by_side_and_then_has_nothing_to_do(
    whole: DomainDirectory, material: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(config_text(configured(material, tmp_path, strategies={"imitate": STRATEGIES["imitate"]})))
    command = Command(tmp_path, os.environ["PATH"])
    done = command("customize", str(path))
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "domains" / "two"
    assert "Report:" in done.stdout and (directory / "report.html").is_file()
    rows = [row for row in read_domain_run(whole.path).rows if row.strategy == "imitate"]
    here = read_domain_run(directory).rows
    assert [vars(row) | {"loss": 0, "accuracy": 0} for row in here] == [vars(row) | {"loss": 0, "accuracy": 0} for row in rows]
    assert [row.loss for row in here] == pytest.approx([row.loss for row in rows], abs=1e-4)  # other threads, other rounding
    again = command("customize", str(path))
    assert again.returncode == 0 and "All of it is there; nothing to do." in again.stdout
    report = command("report", str(directory))
    assert report.returncode == 0 and report.stdout.strip().endswith("report.html")


def test_what_is_refused_leaves_nothing_behind(
    material: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"
    monkeypatch.setenv("RONDO_STORAGE", str(storage))
    path = tmp_path / "two.yaml"
    path.write_text(config_text(configured(material, storage, strategies={"a": {"enrichment": 6.5}})))
    assert "enrichment 6.5" in refused(capsys, storage, "customize", str(path))
    assert "no domain was ever customised" in refused(
        capsys, storage, "run", str(TINY), "--scorer.reward_model", "domain:law", "--scorer.num_members", "1",
        "--scorer.aggregate", "mean", "--meta.enabled", "false",
    )  # fmt: skip


def test_the_processes_of_a_run_take_the_domains_as_they_are(material: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    config = configured(material, tmp_path, lora={"rank": 2}, strategies={"plain": {}})
    _, stages = everything(rank, config)
    base = export_all(find_domains(tmp_path, "two"), tmp_path / "cache")
    test = [(name, query) for name in ("law", "trade") for query in stages.data.domain(name).test]
    asked = [
        Rollout(Prompt(query.id, "", query.prompt_ids, name), i, ids, "", (-1.0,) * len(ids), 0, True)
        for name, query in test
        for i, ids in enumerate(query.responses)
    ]
    found = [find_domain(tmp_path, name) for name in ("law", "trade")]
    setup = ProcessSetup("reward-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    pairs = [Pair("1", (1, 5), (6, 2), (7, 2))]
    trainer = RewardTrainer.__ray_metadata__.modified_class(
        setup, pairs, {"original": pairs}, config.reward, MetaConfig(enabled=False), base, GuardsConfig(), True
    )
    place = tmp_path / "round" / "reward"
    report = trainer.fit(place, 0, None, None)
    assert report.steps == () and report.summary["loss"] is None and report.validation_accuracy is None
    for file in ("model.safetensors", f"{ADAPTERS}/law/adapter_model.safetensors"):
        assert (place / file).read_bytes() == (base / file).read_bytes()
    alone = RewardTrainer.__ray_metadata__.modified_class(
        setup, pairs, {"original": pairs}, config.reward, MetaConfig(enabled=False), export(found[0], tmp_path / "cache"),
        GuardsConfig(), True,
    )  # fmt: skip
    one = RewardModel.from_pretrained(export(found[0], tmp_path / "cache"), torch.float32)
    chosen, rejected = score_sequences(one, [((1, 5), (6, 2)), ((1, 5), (7, 2))], 2, 0).tolist()
    assert alone.fit(tmp_path / "one", 0, None, None).validation_accuracy == float(chosen > rejected)
    scorer = EnsembleScorer.__ray_metadata__.modified_class(setup, ScorerConfig(num_members=1, aggregate="primary"))
    scorer.calibrate_on(asked)
    scorer.load(0, place)
    got = torch.tensor(vote([scorer.score(asked, [0])], ScorerConfig(), GuardsConfig(), "primary").aggregated)
    adapters = [(model.name, model.adapter) for model in found if model.adapter is not None]
    bank = open_bank(RewardModel.from_pretrained(found[0].backbone, torch.float32), adapters)
    domains = [rollout.prompt.domain for rollout in asked]
    raw = bank.scores([(rollout.prompt.token_ids, rollout.response_ids) for rollout in asked], domains, 64, 0)
    for name in ("law", "trade"):
        rows = torch.tensor([domain == name for domain in domains])
        own = (raw[rows] - raw[rows].mean()) / raw[rows].std(correction=0)
        torch.testing.assert_close(got[rows], own, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="no reward model for the domain 'art'"):
        scorer.score([replace(asked[0], prompt=replace(asked[0].prompt, domain="art"))], [0])
