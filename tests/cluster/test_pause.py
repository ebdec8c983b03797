"""A round laid down between two steps: what is trusted, what is kept, and what a signal does meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.scorer import Scores
from cluster import run_directory
from cluster.load_config import load_config
from cluster.metrics import Metrics
from cluster.pause import Pause, drop, latest, lay_down, tidy
from cluster.run_directory import RunDirectory
from cluster.sync import Sync
from cluster.telemetry import Telemetry
from evaluation.timeline import Span
from tests.cluster.command import ROOT, TINY
from tokens.errors import UserError

PAUSE = Pause(3, 7, {"loss": 0.1, "best_step": None}, None, {"policy": 1.25}, 12)
SCORES = Scores((0,), ((1.0,),), (1.0,), (0.0,), (1.0,))


def write_state(place: Path) -> None:
    (place / "learner.json").write_text(place.name)


def begun(draft: Path) -> Path:
    (draft / "reward").mkdir(parents=True)
    (draft / "reward" / "model.safetensors").write_text("r_1")
    (draft / "meta_rollouts.parquet").write_text("S_1")
    return draft


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_is_laid_down_comes_back_and_the_next_pause_takes_its_place(tmp_path: Path) -> None:
    draft = begun(tmp_path / "draft")
    assert latest(draft) is None and latest(tmp_path / "nowhere") is None
    lay_down(draft, PAUSE, write_state)
    there = latest(draft)
    assert there == dataclasses.replace(PAUSE, holds=("meta_rollouts.parquet", "reward"))
    assert (there.place(draft) / "learner.json").exists()
    lay_down(draft, dataclasses.replace(PAUSE, steps=12), write_state)
    assert names(draft) == ["after_0012_steps", "meta_rollouts.parquet", "reward"]
    drop(draft)
    assert names(draft) == ["meta_rollouts.parquet", "reward"]


def test_a_save_that_fails_leaves_the_pause_before_it(tmp_path: Path) -> None:
    draft = begun(tmp_path / "draft")

    def fail(place: Path) -> None:
        write_state(place)
        raise OSError("the disk refuses")

    with pytest.raises(OSError, match="refuses"):
        lay_down(draft, PAUSE, fail)
    assert latest(draft) is None
    lay_down(draft, PAUSE, write_state)
    with pytest.raises(OSError, match="refuses"):
        lay_down(draft, dataclasses.replace(PAUSE, steps=4), fail)
    there = latest(draft)
    assert there is not None and there.steps == 3
    (draft / "evaluation.parquet").write_text("of later steps")
    (draft / "policy").mkdir()
    tidy(draft, there)
    assert names(draft) == ["after_0003_steps", "meta_rollouts.parquet", "reward"]


def begun_run(storage: Path, *options: str) -> RunDirectory:
    """A run with one committed round, and a second one that was laid down after 3 steps of which step 4's row came later."""
    directory = RunDirectory(load_config(TINY, ["--name", "paused", "--storage", str(storage), *options]))
    with directory.open():
        with directory.draft(directory.start_path) as draft:
            directory.commit_start(draft, {"committed": True})
        with directory.draft(directory.round_path(0)) as draft:
            directory.commit_round(draft, {"round": 0, "policy_version": 4})
        rows = "".join(json.dumps({"round": k, "step": step, "phase": "policy"}) + "\n" for k in (0, 1) for step in range(3))
        (directory.path / "metrics.jsonl").write_text(rows)
        with contextlib.suppress(KeyboardInterrupt), directory.draft(directory.round_path(1)) as draft:
            (draft / "reward").mkdir()
            lay_down(draft, dataclasses.replace(PAUSE, metrics_bytes=len(rows)), write_state)
            with (directory.path / "metrics.jsonl").open("a") as file:
                file.write('{"round": 1, "step": 3, "phase": "policy"}\n{"round": 1, "st')
            (draft / "evaluation.parquet").write_text("half")
            raise KeyboardInterrupt
    return RunDirectory(directory.config)


def test_the_next_driver_goes_on_from_the_pause_with_the_rows_before_it(tmp_path: Path) -> None:
    directory = begun_run(tmp_path)
    with directory.open():
        draft = directory.draft_path
        assert (directory.num_committed, directory.policy_version) == (1, 7)
        assert directory.learner_path == draft / "after_0003_steps"
        assert names(draft) == ["after_0003_steps", "reward"], "what came after the pause is made again"
        rows = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
        assert [(row["round"], row["step"]) for row in rows] == [(k, step) for k in (0, 1) for step in range(3)]
        with directory.draft(directory.round_path(1)) as again:
            assert again == draft
            directory.commit_round(again, {"round": 1, "policy_version": 9})
        assert names(directory.path / "rounds") == ["round_000", "round_001"] and names(directory.round_path(1)) == ["reward"]
        assert directory.paused is None and directory.policy_version == 9
        assert directory.learner_path == directory.round_path(1)


@pytest.mark.parametrize("cut", ["commit_directory", "write_file"], ids=["before its place", "before the ledger"])
def test_a_commit_that_is_cut_short_leaves_the_pause(cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = begun_run(tmp_path)

    def fail(*arguments: object) -> None:
        raise SystemExit(143)

    def commit() -> None:
        with directory.draft(directory.round_path(1)) as draft:
            (draft / "policy").mkdir(exist_ok=True)
            directory.commit_round(draft, {"round": 1, "policy_version": 9})

    with directory.open(), monkeypatch.context() as patch:
        patch.setattr(run_directory, cut, fail)
        with pytest.raises(SystemExit):
            commit()
    directory = RunDirectory(directory.config)
    with directory.open():
        assert directory.paused is not None and directory.paused.steps == 3
        assert names(directory.draft_path) == ["after_0003_steps", "reward"]
        commit()
        assert names(directory.round_path(1)) == ["policy", "reward"]


def test_a_draft_that_was_never_laid_down_whole_is_removed(tmp_path: Path) -> None:
    directory = begun_run(tmp_path)
    draft = directory.path / "rounds" / ".round_001.partial"
    (draft / "after_0003_steps").rename(draft / ".after_0003_steps.partial")  # the kill came before the last rename
    with directory.open():
        assert names(directory.path / "rounds") == ["round_000"]
        assert directory.policy_version == 4 and directory.learner_path == directory.round_path(0)
        rows = (directory.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["round"] for row in rows] == [0, 0, 0]


def test_another_config_does_not_take_a_pause_up(tmp_path: Path) -> None:
    begun_run(tmp_path)
    other = RunDirectory(load_config(TINY, ["--name", "paused", "--storage", str(tmp_path), "--policy.lr", "1e-5"]))
    with pytest.raises(UserError, match=r"policy\.lr"):
        other.inspect()


@pytest.mark.parametrize(
    ("start", "kept"), [("reward", "rounds/.round_001.partial/reward"), ("previous", "rounds/round_000/reward")]
)
def test_adapters_of_a_critic_are_put_on_the_reward_model_that_they_were_trained_on(
    tmp_path: Path, start: str, kept: str
) -> None:
    directory = begun_run(tmp_path, "--policy.critic_start", start)
    assert directory.inspect() is None
    assert directory.critic_reward_path == directory.path / kept


def test_tensorboard_keeps_the_steps_before_a_pause_and_shows_the_later_ones_once(tmp_path: Path) -> None:
    update = {"policy/score": 0.0, "policy/kl": 0.0, "policy/tokens": 8.0}

    def play(first: int, steps: range, value: float) -> None:
        metrics = Metrics(tmp_path, 4, 1, first, Telemetry("paused", {}))
        for step in steps:
            metrics.span(Span("sample", "rollout-0", 1, step, 0.0, value))
            metrics.policy(1, step, update | {"policy/loss": value}, SCORES, None)
            metrics.sync(1, step, Sync(1.0, 1))
        metrics.close()

    play(0, range(3), 1.0)  # step 2 was played after the pause, and is played again
    play(2, range(2, 4), 2.0)
    for phase, name in (("policy", "policy/loss"), ("sample", "sample/seconds"), ("sync", "sync/bytes")):
        board = EventAccumulator(str(tmp_path / "tensorboard" / phase))
        board.Reload()
        assert [event.step for event in board.Scalars(name)] == [4, 5, 6, 7], phase
        if phase != "sync":
            assert [event.value for event in board.Scalars(name)] == [1.0, 1.0, 2.0, 2.0]


PROGRAM = """
import os, signal, sys
from cluster.signals import end, finishing, listen, obey_termination, stop_asked
from cluster.cli import main
listen()
def work():
    with finishing():
        os.kill(os.getpid(), signal.{first})
        obey_termination()
        print("finished the step", flush=True)
        {then}
        if stop_asked():
            end("saved")
import cluster.cli
cluster.cli._keys = work
sys.exit(main(["keys"]))
"""


@pytest.mark.parametrize(
    ("first", "then", "code", "said"),
    [
        ("SIGTERM", "", 143, "stopped: saved"),
        ("SIGINT", "", 130, "stopped: saved"),
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped: what was committed is intact"),
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted: what was committed is intact"),
    ],
)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(first: str, then: str, code: int, said: str) -> None:
    program = PROGRAM.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "finished the step" in done.stdout and said in done.stderr and "a second signal ends at once" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_the_steps_a_signal_ends_at_once(number: signal.Signals, code: int) -> None:
    program = PROGRAM.replace("with finishing():", "if True:").format(first=number.name, then="")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and "finished the step" not in done.stdout
    assert "what was committed is intact" in done.stderr and "Traceback" not in done.stderr
