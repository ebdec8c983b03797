"""`generalize`: reference policies, reward models and targets of three small domains, and what is refused before it begins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.generalize import MODEL, PICKS, POLICY, REPORT, Task, run_task
from actors.process import ProcessSetup
from actors.ranks import Rank
from cluster.config import RunConfig
from cluster.console import Console
from cluster.domain_directory import DomainDirectory
from cluster.domain_models import GENERAL, find_general, with_domain_reward
from cluster.generalize import Tasks, _write, is_done
from cluster.generalize_data import load_data
from cluster.load_config import checked
from cluster.run_directory import config_text
from evaluation.best_of_n import pick_softly
from evaluation.generalize_report import GeneralizeRun, TargetOutcome, headline, read_generalize, write_generalize_report
from policy.library import load
from policy.reference import draw_responses, sequence_logprobs
from rm.batches import score_sequences
from rm.model import RewardModel
from tests.cluster.command import Command
from tests.cluster.refused import refused
from tests.cluster.test_customize import base_model, write_rows
from tokens.durable import commit_directory
from tokens.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base; two labelled domains in which late words are good, and a third; texts of each."""
    folder = tmp_path_factory.mktemp("material")
    found = {"base": str(base_model(folder / "base"))}
    for number, name in enumerate(("law", "trade", "music")):
        pairs = [
            {"prompt": f"w{i % 7} w{number}", "chosen": f"w2{i % 10} w21", "rejected": f"w{10 + i % 10} w11 w3"}
            for i in range(40)
        ]
        texts = [{"prompt": f"w{i % 7} w{number}", "completion": f"w2{i % 10} w1{number}"} for i in range(24)]
        found[f"{name} pairs"] = write_rows(folder / f"{name}.jsonl", pairs)
        found[f"{name} texts"] = write_rows(folder / f"{name}_texts.jsonl", texts)
    return found


def paths(material: dict[str, str], name: str) -> dict[str, str]:
    return {"preferences": material[f"{name} pairs"], "texts": material[f"{name} texts"]}


def tree_of(material: dict[str, str], storage: Path, **changes: Any) -> dict[str, Any]:
    generalize: dict[str, Any] = {
        "domains": {
            name: {"preferences": material[f"{name} pairs"], "texts": material[f"{name} texts"]} for name in ("law", "trade")
        },
        "targets": {"music": {"preferences": material["music pairs"], "texts": material["music texts"]}},
        "reference": {"lr": 1e-3, "batch_size": 8},
        "curves": [4.0],
        "steps": 6,
        "queries_per_step": 8,
        "num_prompts": 5,
        "samples_per_prompt": 3,
        "policy": "weighted_sft",
        **changes,
    }
    return {
        "name": "three",
        "storage": str(storage),
        "data": {"preferences": "none.jsonl", "max_prompt_tokens": 16, "max_response_tokens": 16},
        "rollout": {"max_new_tokens": 8},
        "reward": {"base": material["base"], "pooling": "mean", "microbatch_size": 64, "lr": 3e-3},
        "resources": {"reward": {"num_cpus": 0.5, "threads": 1}},
        "generalize": generalize,
    }


def configured(material: dict[str, str], storage: Path, **changes: Any) -> RunConfig:
    return checked(tree_of(material, storage, **changes), "test")


@dataclass(frozen=True)
class Done:
    """All of it, in this process, as the command hands it to Ray."""

    path: Path
    tasks: Tasks


@pytest.fixture(scope="module")
def done(material: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    logs = tmp_path_factory.mktemp("logs")
    rank = Rank(ProcessSetup("here", logs / "here.log", torch.get_num_threads(), "cpu", "float32", 0, 1, False))
    config = configured(material, tmp_path_factory.mktemp("storage"))
    directory = DomainDirectory(config, GENERAL)
    with directory.open():
        data = load_data(config, Path(config.storage or ""), Console())
        directory.refuse_other_inputs(data.fingerprint(), data.base)
        tasks = Tasks(config, directory.path, data)
        for task in (*tasks.references(), *tasks.rewards(), *tasks.targets()):
            run_task(rank, task, tasks.parts(task), commit_directory, lambda steps: None)
        _write(directory.path, config, tasks, Console())
    return Done(directory.path, tasks)


def report_of(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((task.directory / REPORT).read_text())
    return found


def test_a_reference_policy_is_asked_about_every_response_and_a_target_writes_samples(done: Done) -> None:
    law, _, music = done.tasks.references()
    (part,) = done.tasks.parts(law)
    found = report_of(law)
    assert [len(row) for row in found["train"]] == [len(query.responses) for query in part.train] and len(part.train) > 20
    assert found["samples"] == [] and found["num_texts"] == 24
    model: Any = load(law.directory / MODEL, torch.float32).eval()
    query = part.train[0]
    alone = sequence_logprobs(model, [(query.prompt_ids, query.responses[1])], 0, 1, length_normalised=True)
    assert found["train"][0][1] == pytest.approx(alone[0], abs=1e-5)
    (target,) = done.tasks.parts(music)
    assert target.train == () and len(target.test) == 40 and len(target.prompts) == 5
    assert [len(own) for own in report_of(music)["samples"]] == [3] * 5


def test_reward_models_are_made_for_every_beta_and_say_their_outer_steps(done: Done) -> None:
    first, second = done.tasks.rewards()
    assert (first.beta, second.beta) == (1.0, 4.0)
    for task in (first, second):
        steps = report_of(task)["steps"]
        assert [step["step"] for step in steps] == list(range(1, 7)) and set(steps[0]["by_domain"]) == {"law", "trade"}
        RewardModel.from_pretrained(task.directory / MODEL, torch.float32)


def test_a_target_gets_its_best_responses_and_a_policy(done: Done) -> None:
    task = done.tasks.targets()[0]
    rows = [json.loads(line) for line in (task.directory / PICKS).read_text().splitlines()]
    assert len(rows) == 5 and all(row["prompt"].startswith("w") for row in rows)
    found, samples = report_of(task), report_of(done.tasks.references()[2])["samples"]
    (part,) = done.tasks.parts(task)
    model = RewardModel.from_pretrained(task.of[1] / MODEL, torch.float32)
    pairs = [(prompt, tuple(ids)) for prompt, own in zip(part.prompts, samples, strict=True) for ids in own]
    scores = score_sequences(model, pairs, 64, 0).view(5, 3)
    assert [row["reward"] for row in rows] == pytest.approx(scores.amax(1).tolist(), abs=1e-5)
    assert found["reward_gain"] == pytest.approx(float((scores.amax(1) - scores.mean(1)).mean()), abs=1e-5)
    assert set(found["accuracy"]) == {"reward", "reference", "policy"}
    load(task.directory / POLICY, torch.float32)


def test_the_page_has_a_line_for_each_target_and_beta(done: Done) -> None:
    page = write_generalize_report(done.path).read_text()
    run = read_generalize(done.path)
    assert [(o.target, o.beta) for o in run.targets] == [("music", 1.0), ("music", 4.0)] and run.seeds == 1
    assert [curve.beta for curve in run.curves] == [1.0, 4.0] and len(run.curves[0].upper) == 6
    assert "music" in page and "beta 4" in page and "Norm of the hypergradient" in page
    assert (done.path / "figures" / "upper-loss.png").is_file()
    assert "(log pi_ref per token + beta * reward)" in page and run.per == "token"


@pytest.mark.parametrize(("reward", "reference", "kind"), [(0.4, 0.3, "warn"), (0.6, 0.7, "warn"), (0.7, 0.6, "good")])
def test_the_page_warns_where_the_reward_ranks_no_better_than_without_it(reward: float, reference: float, kind: str) -> None:
    accuracy = {"reward": reward, "reference": reference, "policy": 0.8}
    run = GeneralizeRun("closed", "response", 1.0, 1, (), (TargetOutcome("music", 1.0, accuracy, 0.1),))
    found = headline(run)
    assert found.kind == kind and "the policy that the reward makes of the reference" in found.detail


def test_a_task_that_is_run_again_gives_what_is_there(done: Done, tmp_path: Path) -> None:
    rank = Rank(ProcessSetup("here", tmp_path / "here.log", torch.get_num_threads(), "cpu", "float32", 0, 1, False))
    task = done.tasks.targets()[0]

    def commit(partial: Path, final: Path) -> None:
        raise AssertionError("nothing is to be made")

    assert run_task(rank, task, done.tasks.parts(task), commit, lambda steps: None) == report_of(task)

    late = replace(task, directory=tmp_path / "late")

    def second(partial: Path, final: Path) -> None:
        shutil.copytree(partial, final)  # another process of this task was first
        commit_directory(partial, final)

    report = run_task(rank, late, done.tasks.parts(task), second, lambda steps: None)
    assert report == report_of(late) and [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def test_a_config_that_does_not_fit_what_is_there_is_not_kept(done: Done, material: dict[str, str]) -> None:
    kept = (done.path / "config.yaml").read_text()
    config = configured(material, done.path.parents[1])
    other = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 9})})
    directory = DomainDirectory(other, GENERAL)
    with directory.open(), pytest.raises(UserError, match="max_tokens"):
        is_done(Tasks(other, directory.path, done.tasks.data).targets()[0])
    assert (done.path / "config.yaml").read_text() == kept
    with directory.open():
        directory.keep_config()
    assert "max_new_tokens: 9" in (done.path / "config.yaml").read_text()
    with DomainDirectory(config, GENERAL).open() as back:
        back.keep_config()


def test_a_run_can_be_paid_by_it(done: Done, tmp_path: Path) -> None:
    storage = done.path.parents[1]
    scorer = {"reward_model": "general:three", "num_members": 1, "aggregate": "mean"}
    tree = {"name": "paid", "scorer": scorer, "meta": {"enabled": False}}
    config = with_domain_reward(checked(tree, "test"), storage)
    assert config.reward.base == str(done.tasks.reward(1.0, 0) / MODEL)
    printed = (ROOT / "docs" / "generalize.md").read_text().split("`law_policy.yaml`:\n\n```yaml\n")[1].split("```")[0]
    shown = checked(yaml.safe_load(printed), "docs/generalize.md")
    assert shown.scorer.reward_model == "general:general" and (shown.sft.model or "").endswith("general/references/law/model")
    with pytest.raises(UserError, match=r"general:other: no .* of this name is finished .* there are three"):
        find_general(storage, "other")


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(done: Done, material: dict[str, str]) -> None:
    everything = (*done.tasks.references(), *done.tasks.rewards(), *done.tasks.targets())
    assert all(is_done(task) for task in everything)
    storage = done.path.parents[1]
    more = Tasks(configured(material, storage, curves=[4.0, 9.0], seeds=2), done.path, done.tasks.data)
    assert [task.name for task in more.rewards() if not is_done(task)] == [
        "reward model, beta 1, seed 1", "reward model, beta 4, seed 1", "reward model, beta 9, seed 0",
        "reward model, beta 9, seed 1",
    ]  # fmt: skip
    other = Tasks(configured(material, storage, steps=7), done.path, done.tasks.data)
    with pytest.raises(UserError, match="steps"):
        is_done(other.rewards()[0])


def test_the_command_does_the_same_on_ray(done: Done, material: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(config_text(configured(material, tmp_path, curves=[])))
    command = Command(tmp_path, os.environ["PATH"])
    found = command("generalize", str(path))
    assert found.returncode == 0, found.stderr
    directory = tmp_path / GENERAL / "three"
    assert "Report:" in found.stdout and (directory / "report.html").is_file()
    here, there = read_generalize(directory).curves[0], read_generalize(done.path).curves[0]
    assert here.upper == pytest.approx(there.upper, abs=1e-3)  # other threads, other rounding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {}}, "generalize.domains names none"),
        ({"domains": "one"}, "generalize.domains names one, law"),
        ({"domains": "without texts"}, "generalize.domains.trade has no texts to fine-tune its reference policy on"),
        ({"inner_lr": 0.5}, "generalize.inner_lr 0.5: generalize.form 'closed' has no use for it"),
        ({"form": "unrolled", "damping": 0.1}, "generalize.damping 0.1: generalize.form 'unrolled' has no use for it"),
        ({"form": "implicit", "neumann_step": 0.5}, "generalize.neumann_step 0.5"),
        ({"beta": 0}, "beta multiplies the reward in the lower level and must be above 0, got 0"),
        ({"beta": -1.5}, "must be above 0, got -1.5"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    changes: dict[str, Any],
    message: str,
    material: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = tmp_path / "storage"
    monkeypatch.setenv("RONDO_STORAGE", str(storage))
    tree = tree_of(material, storage)
    domains = tree["generalize"]["domains"]
    named = {"one": {"law": domains["law"]}, "without texts": domains | {"trade": {"preferences": material["trade pairs"]}}}
    asked = {key: named[value] if value in ("one", "without texts") else value for key, value in changes.items()}
    tree["generalize"] |= asked
    path = tmp_path / "three.yaml"
    path.write_text(json.dumps(tree))
    assert message in refused(capsys, storage, "generalize", str(path))


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_a_diverging_inner_optimisation_ends_the_task_by_its_domains_name(
    done: Done, material: dict[str, str], tmp_path: Path, beta: float
) -> None:
    config = configured(material, done.path.parents[1], form="unrolled", inner_steps=3, inner_lr=1e9, beta=beta)
    directory = tmp_path / "reward"
    task = replace(Tasks(config, done.path, done.tasks.data).rewards()[0], directory=directory)
    rank = Rank(ProcessSetup("here", tmp_path / "here.log", torch.get_num_threads(), "cpu", "float32", 0, 1, False))
    with pytest.raises(UserError, match=r"inner optimisation of (law|trade) diverges"):
        run_task(rank, task, done.tasks.parts(task), commit_directory, lambda steps: None)
    assert not directory.exists()


def test_an_encoder_has_no_reference_policy(material: dict[str, str], tmp_path: Path) -> None:
    config = configured(material | {"base": str(base_model(tmp_path / "bert", encoder=True))}, tmp_path)
    reward = config.reward.model_copy(update={"pooling": "last"})
    with pytest.raises(UserError, match="reference policy must predict the next token"):
        load_data(config.model_copy(update={"reward": reward}), tmp_path, Console())


def draws_of(probabilities: Sequence[int]) -> dict[int, int]:
    return {place: probabilities.count(place) for place in range(2)}


def test_the_tilt_draws_by_reward_and_the_sampler_ends_at_eos(done: Done) -> None:
    rows = [pick_softly([0.0, 1.0986], 2, 1.0, seed)[0] for seed in range(400)]
    assert 0.2 < draws_of(rows)[0] / 400 < 0.3  # exp(0) / (exp(0) + 3)
    assert set(pick_softly([0.0, 5.0] * 50, 2, 0.01, 0)) == set(range(1, 100, 2))
    directory = done.tasks.references()[0].directory / MODEL
    model: Any = load(directory, torch.float32).eval()
    model.generation_config = type(model.generation_config).from_pretrained(directory)
    first, again = (draw_responses(model, [(1, 5), (1, 6, 7)], 4, 6, 1.0, seed=3) for _ in range(2))
    assert first == again and [len(own) for own in first] == [4, 4]
    eos = model.generation_config.eos_token_id
    assert all(1 <= len(ids) <= 6 and eos not in ids[:-1] for own in first for ids in own)
