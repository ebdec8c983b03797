"""The row that ``make reproduce`` makes of a real run: of which policies and prompts it is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from benchmarks.on_test_prompts import answers, golds, policies_of, prompts_of
from benchmarks.reproduce import play
from benchmarks.reproduce.arms import Arm
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from evaluation.best import best_of
from evaluation.records import EvaluationRow, read_rows
from rm.model import RewardModel
from tests.cluster.command import TINY, Command

TinyRun = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture
def config(command: Command) -> RunConfig:
    return load_config(TINY, ["--storage", str(command.storage)])


@pytest.fixture
def source(config: RunConfig, command: Command) -> SandboxSource:
    return SandboxSource(config, command.storage / "cache")


def test_the_row_is_of_every_rounds_policy_on_test_prompts(
    tiny_run: TinyRun, config: RunConfig, source: SandboxSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tiny_run
    asked: list[tuple[Path, list[str]]] = []

    def noted(place: Path, prompts: list[str], config: RunConfig) -> list[str]:
        asked.append((place, prompts))
        return answers(place, prompts, config)

    monkeypatch.setattr(play, "answers", noted)
    row = play.row_of("tiny", Arm((), (0,), elsewhere=True), 0, config, TINY)
    ledger = json.loads((run / "ledger.json").read_text())
    sft, policies = source.load().sft_dir, policies_of(run)
    assert policies == [run / "rounds" / f"round_{index:03d}" / "policy" for index in (0, 1)]
    here, others = prompts_of(source.world), prompts_of(source.world, trained=False)
    assert sorted(asked) == sorted((place, prompts) for place in (sft, *policies) for prompts in (here, others))
    judged = {each.prompt for each in read_rows(run / "rounds" / "round_001" / "evaluation.parquet", EvaluationRow)}
    assert judged and judged.isdisjoint([*here, *others]), "no test prompt judged a round in the run"

    start, *rounds = row["rounds"]
    assert [each["round"] for each in row["rounds"]] == [-1, 0, 1]
    assert start["gold"] == fmean(golds(source.world, here, answers(sft, here, config)))
    for each, entry, gain, policy in zip(rounds, ledger["rounds"], best_of(ledger).gains, policies, strict=True):
        assert each["gold"] == fmean(golds(source.world, here, answers(policy, here, config)))
        assert each["elsewhere"]["gold"] == fmean(golds(source.world, others, answers(policy, others, config)))
        assert (each["validation"], each["kl"], each["proxy"]) == (gain, entry["evaluation"]["kl"], entry["evaluation"]["proxy"])
        assert each["win"] + each["tie"] + each["lose"] == pytest.approx(1) and each["margin"] == each["win"] - each["lose"]
    assert len(row["step_kl"]) == len(row["step_score"]) == 4
    assert row["recipe"] == play.digest_of(TINY) and row["versions"]["git_commit"]


def test_the_best_of_n_is_picked_by_the_reward_models_of_the_first_round(
    tiny_run: TinyRun, config: RunConfig, source: SandboxSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tiny_run
    loaded: list[Path] = []
    written: list[str] = []

    def load(place: Path, *rest: Any) -> RewardModel:
        loaded.append(place)
        return original(place, *rest)

    def score(models: Any, sequences: Any, *rest: Any) -> Any:
        import torch

        return torch.tensor([float(len(response)) for _, response in sequences], dtype=torch.float64)

    def noted(place: Path, prompts: list[str], config: RunConfig) -> list[str]:
        written.extend(answers(place, prompts, config))
        return written

    original = RewardModel.from_pretrained
    monkeypatch.setattr(play.RewardModel, "from_pretrained", load)
    monkeypatch.setattr(play, "score_sequences", score)
    monkeypatch.setattr(play, "answers", noted)
    prompts = prompts_of(source.world)[:5]
    picked = play.picked(run, source.load().sft_dir, prompts, 4, config)
    assert loaded == [run / "rounds" / "round_000" / "reward", run / "start" / "members" / "1"]
    longest = [max(written[4 * i : 4 * i + 4], key=lambda text: len(text.split())) for i in range(5)]
    assert [len(text.split()) for text in picked] == [len(text.split()) for text in longest], "the scores were lengths"
    assert all(text in written[4 * i : 4 * i + 4] for i, text in enumerate(picked)), "of the four to the same prompt"
