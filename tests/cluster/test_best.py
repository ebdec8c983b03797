"""The best round is kept apart, and a run that no longer gets better ends by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluster.best_directory
import tokens.durable
from cluster.best_directory import card_of, export
from cluster.data_source import DataSource
from cluster.hold import TakenOver
from cluster.lineage import lineage_of
from cluster.load_config import load_config
from cluster.run_directory import RunDirectory
from evaluation.best import OUT, best_of
from evaluation.records import EvaluationRow, read_rows
from tests.cluster.command import TINY, Command
from tests.cluster.refused import GOOD, jsonl
from tokens.errors import UserError

TinyRun = tuple[Path, "subprocess.CompletedProcess[str]"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def copied(tiny_run: TinyRun, tmp_path: Path) -> Callable[..., RunDirectory]:
    """A copy of the tiny run whose rounds were judged otherwise, and how it is opened under other ``rounds``."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run[0], run, ignore=shutil.ignore_patterns("logs", "tensorboard"))

    def make(gains: tuple[float, float], *overrides: str) -> RunDirectory:
        state = read(run / "ledger.json")
        for entry, gain in zip(state["rounds"], gains, strict=True):
            entry["evaluation"]["gold"] = state["start"]["evaluation"]["gold"] + gain
        (run / "ledger.json").write_text(json.dumps(state))
        return RunDirectory(load_config(TINY, ["--storage", str(tmp_path), *overrides]))

    return make


def test_a_run_leaves_its_best_policy_with_the_reason(tiny_run: TinyRun) -> None:
    run, done = tiny_run
    state, card = read(run / "ledger.json"), read(run / "best" / "best.json")
    golds = [state["start"]["evaluation"]["gold"], *(entry["evaluation"]["gold"] for entry in state["rounds"])]
    assert card["round"] == (golds.index(max(golds)) - 1 if max(golds) > golds[0] else None)
    told = [[alarm["name"] for alarm in entry["alarms"]] for entry in state["rounds"]]
    assert card["alarms"] == ([] if card["round"] is None else told[card["round"]])
    assert card["judge"] == "gold" and card["independent"] and card["stopped"] == "all 2 rounds are played (rounds.num_rounds)"
    assert [entry["ended"] for entry in state["rounds"]] == [None, card["stopped"]]
    assert state["rounds"][1]["best"] == {"round": card["round"], "gain": card["gain"], "why": card["why"]}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in state["rounds"]:  # what trackers and the dashboard are told of it
        (told,) = [row for row in metrics if (row["phase"], row["round"]) == ("evaluation", entry["round"])]
        number = -1 if entry["best"]["round"] is None else entry["best"]["round"]
        assert (told["evaluation/best_round"], told["evaluation/best_gain"]) == (number, entry["best"]["gain"])
        assert told["evaluation/alarms"] == len(entry["alarms"])
    assert f"{run}/best: {card['why']}" in " ".join(done.stdout.split())
    AutoModelForCausalLM.from_pretrained(run / "best")
    assert AutoTokenizer.from_pretrained(run / "best").pad_token_id is not None
    assert not list(run.glob(".best*"))


def test_a_round_that_does_not_count_is_not_kept(copied: Callable[..., RunDirectory]) -> None:
    made = copied((0.25, 0.5))
    ledger = read(made.path / "ledger.json")
    ledger["rounds"][1][OUT] = ["truncation"]
    (made.path / "ledger.json").write_text(json.dumps(ledger))
    with copied_again(made).open() as run:
        card = read(run.path / "best" / "best.json")
        assert (card["round"], card["not_counted"], card["gains"]) == (0, {"1": ["truncation"]}, [0.25, 0.5])
        assert "the most of those that count" in card["why"] and "(not counted: round 1, by truncation)" in card["why"]
        assert run.why_stopped(run.ledger) == "all 2 rounds are played (rounds.num_rounds)"


def copied_again(run: RunDirectory) -> RunDirectory:
    """The same directory, read again."""
    return RunDirectory(run.config)


def test_what_it_holds_follows_the_ledger_and_takes_no_second_place_on_the_disk(copied: Callable[..., RunDirectory]) -> None:
    for gains, best in (((0.5, 0.25), 0), ((0.25, 0.5), 1), ((0.5, 0.5), 0)):
        with copied(gains).open() as run:
            weights = run.path / "best" / "model.safetensors"
            assert weights.stat().st_ino == (run.round_path(best) / "policy" / "model.safetensors").stat().st_ino
            assert read(run.path / "best" / "best.json")["round"] == best
            assert not list(run.path.glob(".best*"))


def test_it_stays_sfts_policy_where_no_round_beats_sft(copied: Callable[..., RunDirectory], tiny_run: TinyRun) -> None:
    sft = tiny_run[0] / "rounds" / "round_001" / "policy"  # stands for SFT's
    with copied((0.5, 0.25)).open() as run:
        assert read(run.path / "best" / "best.json")["round"] == 0
    with copied((-0.5, -0.25)).open() as run:
        run.begin_with(sft)
        card = read(run.path / "best" / "best.json")
        assert card["round"] is None and card["policy"] == "SFT" and not card["beats_sft"] and card["against_sft"] is None
        assert "no round beats SFT by the gold reward (the nearest is round 1 of 2, -0.250)" in card["why"]
        ours, theirs = (load_file(each / "model.safetensors") for each in (run.path / "best", sft))
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("module", "name"),
    [(cluster.best_directory, "link_or_copy"), (cluster.best_directory, "write_file"), (tokens.durable, "exchange")],
)
def test_a_driver_that_ends_while_it_is_made_leaves_the_one_before(
    copied: Callable[..., RunDirectory], module: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copied((0.5, 0.25)).open() as run:
        before = {path.name: path.read_bytes() for path in (run.path / "best").iterdir()}

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    other = copied((0.25, 0.5))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt), other.open():
            pass
    assert {path.name: path.read_bytes() for path in (run.path / "best").iterdir()} == before
    with other.open():
        assert read(run.path / "best" / "best.json")["round"] == 1 and not list(run.path.glob(".best*"))


def test_a_driver_that_another_took_over_from_leaves_it_alone(copied: Callable[..., RunDirectory]) -> None:
    with copied((0.5, 0.25)).open() as run:
        before = (run.path / "best" / "best.json").read_bytes()

    def fenced() -> None:
        raise TakenOver("another driver")

    other = copied((0.25, 0.5))
    other.inspect()
    card = card_of(best_of(other.ledger), other.ledger["rounds"][1]["evaluation"], None)
    with pytest.raises(TakenOver):
        export(run.path, card, run.round_path(1) / "policy", fenced)
    assert (run.path / "best" / "best.json").read_bytes() == before


def test_a_policy_that_is_gone_is_named(copied: Callable[..., RunDirectory]) -> None:
    run = copied((0.5, 0.25))
    with run.open():
        pass
    shutil.rmtree(run.round_path(1) / "policy")
    card = card_of(best_of(run.ledger), run.ledger["rounds"][1]["evaluation"], None) | {"policy": "rounds/round_001/policy"}
    with pytest.raises(UserError, match=r"round_001/policy is not there, and .*best is to be made of it"):
        export(run.path, card, run.round_path(1) / "policy", lambda: None)


def test_a_run_that_has_stopped_says_so_and_goes_on_only_with_more_patience(
    copied: Callable[..., RunDirectory], command: Command
) -> None:
    more = ("--rounds.num_rounds", "9")
    stopped = copied((0.5, 0.25), *more, "--rounds.stop.patience", "1")
    done = command(
        "run", str(TINY), "--storage", str(stopped.root), *more, "--rounds.stop.patience", "1", seconds=120
    )  # fmt: skip
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "The run has stopped after round 1: 1 round in a row brought no better judgement by the gold reward "
        "(rounds.stop.patience 1). To go on, raise rounds.stop.patience, or set rounds.stop to null." in said
    )
    assert "Round 3 of 9" not in said and len(read(stopped.path / "ledger.json")["rounds"]) == 2
    assert read(stopped.path / "best" / "best.json")["stopped"].startswith("1 round in a row")
    for overrides, finished in ((("--rounds.stop.patience", "1"), True), (("--rounds.stop.patience", "2"), False), ((), False)):
        run = copied((0.5, 0.25), *more, *overrides)
        run.inspect()
        assert run.finished == finished


def test_a_real_run_ends_by_itself_and_its_held_out_members_judge(pool_run: TinyRun) -> None:
    """Of five rounds one is played: nothing is better by as much as ``rounds.stop.min_delta`` wants."""
    run, done = pool_run
    (entry,) = read(run / "ledger.json")["rounds"]
    assert entry["ended"] == (
        "1 round in a row brought no better judgement by held-out reward models by more than 1000 (rounds.stop.min_delta) "
        "(rounds.stop.patience 1)"
    )
    assert f"Stopped after round 0: {entry['ended']}" in " ".join(done.stdout.split())
    rows = read_rows(run / "rounds" / "round_000" / "evaluation.parquet", EvaluationRow)
    start = read_rows(run / "start" / "evaluation.parquet", EvaluationRow)
    assert all(row.held_out is not None and row.held_out_std is not None for row in (*rows, *start))
    assert abs(sum(row.held_out or 0.0 for row in start)) < 1e-3, "in units of SFT's samples"
    assert len({row.held_out for row in rows} & {row.proxy for row in rows}) == 0
    assert entry["evaluation"]["judge"] == "held_out" == read(run / "best" / "best.json")["judge"]
    models = [load_file(run / "start" / "held_out" / str(i) / "model.safetensors") for i in (0, 1)]
    assert any(not models[0][key].equal(models[1][key]) for key in models[0])
    ours, judges = lineage_of(run / "rounds" / "round_000" / "reward"), lineage_of(run / "start" / "held_out" / "1")
    assert ours is not None and judges is not None and ours.pairs and judges.pairs and not ours.pairs & judges.pairs


def test_held_out_members_learn_from_pairs_that_nothing_else_learns_from(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    words = ["--data.preferences", str(tmp_path / "d.jsonl"), "--sft.shape.vocab_size", "300", "--data.max_prompt_tokens", "24"]
    inputs = partial(lambda more: DataSource(load_config(TINY, [*words, *more]), tmp_path).load())
    without, ours = inputs(["--evaluation.judge", "ensemble"]), inputs([])
    assert not without.judging and {pair.id for pair in ours.judging} | {pair.id for pair in ours.pairs} == {
        pair.id for pair in without.pairs
    }
    assert not {pair.prompt_ids for pair in ours.judging} & {pair.prompt_ids for pair in ours.pairs}
    assert len(ours.judging) == pytest.approx(0.2 * len(without.pairs), rel=0.1)
    assert ours.fingerprint != without.fingerprint
    with pytest.raises(UserError, match=r"held_out_fraction is 0.01 .* leaves \d pairs for held-out reward models: at least"):
        inputs(["--evaluation.held_out_fraction", "0.01"])
