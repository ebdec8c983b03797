"""The baselines of the round loop and `sft`, on one real Ray with one real engine: what each does, and what it leaves."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.scorer import Scores
from cluster.baselines import NOTES, first_alone, theme_of
from cluster.config import RunConfig
from cluster.console import Console
from cluster.failures import RoleFailed
from cluster.inputs import open_source
from cluster.load_config import load_config
from cluster.metrics import Metrics
from cluster.model_sizes import model_size
from cluster.plan import bundles
from cluster.run import connected, telemetry_of, warnings
from cluster.run_directory import RunDirectory
from cluster.sampling import sampling
from cluster.sft import sft, train
from cluster.sft_directory import SFTDirectory
from cluster.stage import Stage
from cluster.start import begin
from cluster.texts import sft_texts
from cluster.waiting import Waiter
from evaluation.records import EvaluationRow, MetaRow, read_rows
from evaluation.report import write_report
from evaluation.run import read_run
from preferences.texts import fingerprint
from tests.cluster.command import TINY, Command
from tests.cluster.straight import Straight
from tokens.errors import UserError

BASELINES = {
    "best_of_n": ["--rounds.num_rounds", "1", "--rounds.best_of", "4"],
    "vanilla_ppo": ["--rounds.num_rounds", "2"],
    "ensemble_ppo": ["--rounds.num_rounds", "2"],
    "dpo": ["--rounds.num_rounds", "1", "--dpo.lr", "1e-3", "--dpo.batch_size", "16", "--dpo.epochs", "2"],
}
"""The first makes the start, which the others take over."""


def config_of(baseline: str, storage: Path) -> RunConfig:
    named = ["--name", baseline, "--rounds.baseline", baseline, *BASELINES[baseline]]
    start = ["--storage", str(storage), "--sft.model", str(storage / "sft" / "first"), "--policy.ptx_coef", "0.1"]
    return load_config(TINY, [*named, *(start if baseline == "vanilla_ppo" else start[:4])])


@pytest.fixture(scope="module")
def played(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with an SFT model and the baselines, made in one Ray session."""
    storage, console = tmp_path_factory.mktemp("baselines"), Console()
    if (command.storage / "cache").is_dir():  # another test may have built the world
        shutil.copytree(command.storage / "cache", storage / "cache")
    first = load_config(TINY, ["--name", "first", "--storage", str(storage)])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(first, console) as fixed:
            directory, texts = SFTDirectory(first), sft_texts(first, storage / "cache")
            with directory.open() as draft:
                card = train(first, console, directory, texts, draft, fixed)
                directory.commit(draft, {**card, "data_sha256": fingerprint(texts.examples, texts.held_out)})
            play(storage, console, fixed)
    for name in BASELINES:
        write_report(storage / "runs" / name)
    return storage


def play(storage: Path, console: Console, fixed: bool) -> None:
    """All of them with the same processes."""
    config = config_of("vanilla_ppo", storage)
    wait = Waiter(console, storage / "logs", config.resources.deadline_s)
    source = open_source(config, storage)
    assert source.recipe is not None
    source.recipe(lambda unit, done, total: None)
    inputs = source.load()
    asked = bundles(config, model_size(config))
    stage = Stage(config, asked, storage / "logs", console.say, fixed)
    try:
        stage.wait_for_room()
        given = (inputs.sft_dir, inputs.base_dir, inputs.pairs, {"original": inputs.validation}, inputs.ptx)
        roles = wait("start", stage.start(*given, 56))
        wait("start", roles.learner.load(roles.rollout, None, storage / "no first reward"))
        sft_judged, version = None, 0
        for baseline in BASELINES:
            config = config_of(baseline, storage)
            with RunDirectory(config).open() as directory:
                metrics = Metrics(directory.path, config.policy.steps_per_round, telemetry_of(config, directory, asked))
                wait.record = metrics.span
                if sft_judged is None:
                    sft_judged, version = begin(config, directory, inputs, roles, wait, console, metrics)
                    entry = directory.ledger["start"]
                else:
                    shutil.copytree(storage / "runs" / "best_of_n" / "start", directory.start_path)
                    directory.ledger["start"] = entry
                    wait("start", roles.learner.restore(directory.learner_path, directory.critic_base(inputs.sft_dir)))
                    roles.sync(wait, version)
                batches = sampling(config, inputs.policy_prompts, roles.rollout, wait)
                given = (config, directory, inputs, roles, batches, wait, console, metrics, sft_judged, version)
                theme = theme_of(config)(*given, stands=(0, None), recover=Straight())
                with closing(metrics):
                    theme.run()
                version = theme.version
    finally:
        stage.close()


def ledger(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "ledger.json").read_text())
    return found


def test_sft_leaves_a_plain_model_with_its_card(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = played / "sft" / "first"
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    card = json.loads((folder / "card.json").read_text())
    assert card["kind"] == "sft" and card["num_texts"] + card["num_held_out"] == 2000
    assert card["held_out"]["after"]["loss"] < 0.8 * card["held_out"]["before"]["loss"]
    assert card["held_out"]["after"]["perplexity"] == pytest.approx(math.exp(card["held_out"]["after"]["loss"]))
    assert [point["loss"] for point in card["curve"]][-1] == card["fit"]["loss"] < card["fit"]["first_loss"]
    assert (folder / "logs" / "preparer-0.log").is_file() and not (played / "sft" / ".first").exists()
    assert not (folder / "fit.json").exists()

    def no_ray() -> None:
        raise AssertionError("a finished one starts nothing")

    monkeypatch.setattr("cluster.sft.connected", no_ray)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    first = load_config(TINY, ["--name", "first", "--storage", str(played)])
    assert sft(first, Console()) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not (played / "sft" / ".first").exists()


def test_best_of_n_leaves_the_policy_alone_and_picks_what_scores_higher(played: Path) -> None:
    run = played / "runs" / "best_of_n"
    (entry,) = ledger(run)["rounds"]
    assert entry["choices"] == {
        "rounds.baseline": "best_of_n", "rounds.best_of": "4", "rounds.softness": "None", "scorer.aggregate": "mean_minus_std",
        "reward.base": "None", "data.denoise.method": "none",
    }  # fmt: skip
    assert entry["policy_version"] == 0 and entry["evaluation"]["kl"] == pytest.approx(math.log(4) - 0.75)
    folder = run / "rounds" / "round_000"
    assert not (folder / "policy").exists() and not (folder / "critic").exists()
    samples, rows = read_rows(folder / "samples.parquet", MetaRow), read_rows(folder / "evaluation.parquet", EvaluationRow)
    alone = read_rows(run / "start" / "evaluation.parquet", EvaluationRow)
    assert len(samples) == 4 * len(rows) == 4 * 24
    firsts = [row.response for row in samples if row.sample == 0]
    assert firsts == [row.response for row in alone], "SFT's own response is the first of the n"
    chosen = [row.response for row in rows]
    offered = {row.prompt_id: {s.response for s in samples if s.prompt_id == row.prompt_id} for row in rows}
    assert all(row.response in offered[row.prompt_id] for row in rows)
    assert chosen != firsts
    assert all(row.policy_logprob == row.sft_logprob for row in rows)

    def pessimistic(row: EvaluationRow) -> float:
        return row.ensemble_mean - row.ensemble_std

    best = sum(pessimistic(row) for row in rows) / len(rows)
    assert best > ledger(run)["start"]["evaluation"]["ensemble_mean"] - ledger(run)["start"]["evaluation"]["ensemble_std"]


def test_vanilla_ppo_is_one_ppo_against_one_reward_model(played: Path) -> None:
    run = played / "runs" / "vanilla_ppo"
    first, second = ledger(run)["rounds"]
    assert first["choices"]["rounds.baseline"] == "vanilla_ppo" and "meta.enabled" not in first["choices"]
    assert first["reward"]["loss"] is not None and first["reward"]["J_before"] is None, "no MetaRM"
    assert second["reward"]["loss"] is None
    assert second["reward"]["validation_accuracy"] == first["reward"]["validation_accuracy"]
    assert second["policy_version"] == first["policy_version"] + 2 == 4
    assert {"sample_meta", "reward"} <= first["seconds"].keys() and not {"sample_meta", "reward"} & second["seconds"].keys()
    rounds = [run / "rounds" / f"round_{index:03d}" for index in (0, 1)]
    assert (rounds[0] / "reward").is_dir() and not (rounds[1] / "reward").exists()
    assert not (rounds[1] / "meta_rollouts.parquet").exists()
    states = [json.loads((folder / "learner.json").read_text()) for folder in rounds]
    steps = [load_file(folder / "learner.safetensors") for folder in rounds]
    counts = [state["moments"]["count"] for state in states]
    assert counts == [96 + 2 * 32, 96 + 4 * 32], "the reward moments go on: S_0, then every rollout"
    for side in ("policy", "critic"):
        made = [next(value for name, value in step.items() if name.startswith(side) and name.endswith("/step")) for step in steps]
        assert made[0] < made[1], f"the {side}'s optimizer goes on"
        weights = [load_file(folder / side / "model.safetensors") for folder in rounds]
        assert any(not weights[0][key].equal(weights[1][key]) for key in weights[0])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/score"] for row in rows if row["phase"] == "policy"] == pytest.approx(
        [row["policy/proxy"] for row in rows if row["phase"] == "policy"]
    ), "PPO is paid by r_0 alone"
    assert all(row["policy/ptx_loss"] > 0 for row in rows if row["phase"] == "policy"), "the ptx texts arrived"


def test_ensemble_ppo_is_paid_by_all_members_which_are_trained_once(played: Path) -> None:
    run = played / "runs" / "ensemble_ppo"
    first, second = ledger(run)["rounds"]
    assert first["choices"]["rounds.baseline"] == "ensemble_ppo" and first["choices"]["scorer.aggregate"] == "mean_minus_std"
    assert first["reward"]["loss"] is not None and second["reward"]["loss"] is None
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "policy"]
    assert len(steps) == 4
    for row in steps:
        assert row["policy/score"] == pytest.approx(row["policy/ensemble_mean"] - row["policy/ensemble_std"], abs=1e-5)
        assert abs(row["policy/score"] - row["policy/proxy"]) > 1e-3, "not by r_0 alone"


def test_dpo_prefers_the_chosen_responses_and_is_judged_as_a_round(played: Path) -> None:
    run = played / "runs" / "dpo"
    (entry,) = ledger(run)["rounds"]
    assert entry["choices"]["dpo.beta"] == "0.1" and entry["evaluation"]["kl"] > 0.1
    AutoModelForCausalLM.from_pretrained(run / "rounds" / "round_000" / "policy")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "dpo"]
    assert steps[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert sum(row["dpo/accuracy"] for row in steps[-4:]) / 4 > 0.6 and steps[-1]["dpo/margin"] > 0


def test_the_report_says_what_was_played(played: Path) -> None:
    words = {"best_of_n": "The best of 4 samples of SFT", "vanilla_ppo": "After 2 rounds of vanilla PPO", "dpo": "After DPO"}
    words["ensemble_ppo"] = "After 2 rounds of PPO against an ensemble the policy"
    for name, text in words.items():
        run = played / "runs" / name
        html = (run / "report.html").read_text()
        assert text in html and "A baseline" in html and "figure-differences" not in html
        assert ("figure-dpo" in html) == (name == "dpo") and ("figure-reward-step" in html) == name.endswith("_ppo")
        assert read_run(run).baseline == name


def test_a_baseline_cannot_be_changed_by_continuing(played: Path) -> None:
    other = config_of("vanilla_ppo", played)
    more = other.model_copy(update={"rounds": other.rounds.model_copy(update={"num_rounds": 5})})
    RunDirectory(more).inspect()
    changed = other.model_copy(update={"rounds": other.rounds.model_copy(update={"baseline": "none"})})
    with pytest.raises(UserError, match=r"rounds\.baseline: 'vanilla_ppo' there"):
        RunDirectory(changed).inspect()


def test_metarm_is_switched_off_and_the_run_says_so() -> None:
    plain = load_config(TINY)
    assert plain.meta.enabled and not any("rounds.baseline" in line for line in warnings(plain))
    for name, options in BASELINES.items():
        config = load_config(TINY, ["--rounds.baseline", name, *options, "--meta.enabled", "true"])
        assert not config.meta.enabled and config.meta.eta == plain.meta.eta
        assert f"rounds.baseline {name}: {NOTES[name]}" in warnings(config)  # type: ignore[index]


@pytest.mark.parametrize("keys", [("--scorer.num_members", "1", "--scorer.aggregate", "mean"), ("--scorer.aggregate", "primary")])
def test_an_ensemble_of_one_is_none(keys: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"paid by one reward model, it is vanilla_ppo"):
        load_config(TINY, ["--rounds.baseline", "ensemble_ppo", *keys])


def test_vanilla_ppo_is_paid_by_member_0_wherever_it_stands() -> None:
    scores = Scores((0, 2), ((1.0, 3.0), (2.0, 5.0)), (2.0, 3.5), (1.0, 1.5), (9.0, 9.0))
    assert first_alone(scores).aggregated == (1.0, 2.0)
    with pytest.raises(RoleFailed, match="not finite"):
        first_alone(Scores((1, 2), ((1.0, 3.0),), (2.0,), (1.0,), (9.0,)))
