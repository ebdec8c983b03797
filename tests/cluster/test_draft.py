"""A round under way: what is trusted, what is kept, what is made again, and what a signal does meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.scorer import Scores
from cluster import run_directory
from cluster.draft import Draft, Point, drop, point_of
from cluster.journal import Entry, Journal
from cluster.load_config import load_config
from cluster.metrics import Metrics
from cluster.run_directory import RunDirectory
from cluster.sync import Sync
from cluster.telemetry import Telemetry
from evaluation.timeline import Span
from tests.cluster.command import ROOT, TINY
from tests.cluster.judged import JUDGED
from tokens import saved_state
from tokens.errors import UserError
from tokens.saved_state import SavedState, latest_state, save_state

SCORES = Scores((0,), ((1.0,),), (1.0,), (0.0,), (1.0,))
SECONDS = {"policy": 1.25}


def write_state(place: Path) -> None:
    (place / "learner.json").write_text(place.name)


def put(draft: Draft, key: str, name: str, text: str = "x") -> None:
    place = draft.partial(name)
    if "." in name:
        place.write_text(text)
    else:
        place.mkdir()
        (place / "model.safetensors").write_text(text)
    draft.record(key, [name], {}, 5, SECONDS)


def begun(path: Path, steps: int = 0) -> Draft:
    """A round with its reward model and S_k, and so many PPO steps, with a checkpoint after every second."""
    path.mkdir(parents=True)
    draft = Draft(path)
    draft.begin(4, 3)
    put(draft, "shifted", "shifted.parquet")
    put(draft, "reward", "reward", "weights")
    for step in range(steps):
        put(draft, f"rollouts {step}", f"steps/{step:04d}.parquet", f"rollouts {step}")
        put(draft, f"scores {step}", f"steps/{step:04d}.json")
        draft.record(f"step {step}", [], {"version": 5 + step}, 10 * step, SECONDS)
        if step % 2:
            draft.checkpoint(step + 1, 5 + step, write_state, 2, 10 * step, SECONDS)
    return draft


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def again(draft: Draft, said: list[str] | None = None) -> Draft:
    """As the next driver finds it."""
    found = Draft(draft.path)
    found.check((said if said is not None else []).append)
    found.tidy()
    found.go_back()
    return found


def test_a_round_goes_on_from_its_last_checkpoint_and_keeps_the_rollouts_after_it(tmp_path: Path) -> None:
    assert point_of(tmp_path / "nowhere") is None
    draft = again(begun(tmp_path / "draft", steps=5))
    assert draft.point == Point(4, 8, draft / "after_0004_steps", 30, SECONDS)
    assert names(draft.path) == ["after_0002_steps", "after_0004_steps", "journal.jsonl", "reward", "shifted.parquet", "steps"]
    assert draft.done("step 4") is None and draft.done("step 3") is not None, "step 4 is learned again, from its rollouts"
    assert draft.done("rollouts 4") is not None and draft.done("scores 4") is not None
    draft.checkpoint(6, 10, write_state, 2, 60, SECONDS)
    assert draft.checkpoints() == ["checkpoint 4", "checkpoint 6"] and not (draft / "after_0002_steps").exists()
    drop(draft.path, keep_rollouts=True)
    assert names(draft.path) == ["journal.jsonl", "reward", "steps"]
    drop(draft.path, keep_rollouts=False)
    assert names(draft.path) == ["journal.jsonl", "reward"]


def test_without_a_checkpoint_the_policy_begins_again_with_the_reward_model_that_is_there(tmp_path: Path) -> None:
    draft = again(begun(tmp_path / "draft", steps=1))
    assert draft.point == Point(0, 4, None, 5, SECONDS)
    assert draft.done("reward") is not None and draft.done("rollouts 0") is not None and draft.done("step 0") is None


def test_a_stage_that_was_not_recorded_leaves_nothing(tmp_path: Path) -> None:
    draft = begun(tmp_path / "draft")
    half = draft.partial("members/1")
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    (draft / "evaluation.parquet").write_text("without a line")
    (draft / "after_0002_steps").mkdir()
    (draft / "after_0002_steps" / "manifest.json").write_text("{}")
    (draft / ".reward.fit").mkdir()
    (draft / ".reward.fit" / "state.json").write_text("how far a fit has come stays")
    assert names(again(draft).path) == [".reward.fit", "journal.jsonl", "reward", "shifted.parquet"]


def test_a_save_that_fails_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    draft = begun(tmp_path / "draft", steps=4)

    def fail(place: Path) -> None:
        write_state(place)
        raise OSError("the disk refuses")

    with pytest.raises(OSError, match="refuses"):
        draft.checkpoint(5, 9, fail, 2, 50, SECONDS)
    found = again(draft)
    assert (
        found.point is not None and found.point.steps == 4 and names(found.path)[:2] == ["after_0002_steps", "after_0004_steps"]
    )


DAMAGE = {
    "a byte": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "gone": lambda file: file.unlink(),
    "exchanged": lambda file: file.write_bytes((file.parent.parent / "shifted.parquet").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("file", "steps", "kept"),
    [
        ("after_0004_steps/learner.json", 2, {"rollouts 4", "checkpoint 2", "reward"}),
        ("steps/0004.parquet", 4, {"rollouts 3", "scores 3", "checkpoint 4", "reward"}),
        ("steps/0001.parquet", 4, {"rollouts 4", "checkpoint 4", "reward"}),
        ("reward/model.safetensors", 0, {"shifted"}),
    ],
)
def test_what_is_damaged_is_made_again_and_said(damage: str, file: str, steps: int, kept: set[str], tmp_path: Path) -> None:
    draft, said = begun(tmp_path / "draft", steps=5), []
    DAMAGE[damage](draft / file)
    found = again(draft, said)
    assert found.point is not None and found.point.steps == steps and kept <= found.journal.alive.keys()
    assert bool(said) == (file != "steps/0001.parquet"), "what is not needed any more is not looked at"
    assert all(file in line for line in said)
    if file.startswith("reward"):
        assert found.journal.alive.keys() == {"begun", "shifted"} and names(found.path) == ["journal.jsonl", "shifted.parquet"]
    assert not said or again(found).point == found.point, "what was said once is written down"


def test_both_checkpoints_damaged_begins_the_policy_again(tmp_path: Path) -> None:
    draft, said = begun(tmp_path / "draft", steps=5), []
    for steps in (2, 4):
        (draft / f"after_000{steps}_steps" / "learner.json").write_text("other")
    found = again(draft, said)
    assert found.point == Point(0, 4, None, 5, SECONDS) and len(said) == 2
    assert [key for key in found.journal.alive if key.startswith("rollouts")] == [f"rollouts {step}" for step in range(5)]


def test_a_torn_tail_is_cut_back_and_a_torn_middle_is_refused(tmp_path: Path) -> None:
    draft, said = begun(tmp_path / "draft", steps=1), []
    path = draft.path / "journal.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[-1])):
        path.write_bytes(whole[:-cut])
        assert list(Journal(draft.path).alive) == list(draft.journal.alive)[:-1]
    found = again(draft, said)
    assert "cut short" in said[0]
    found.record("step 0", [], {}, 0, SECONDS)
    assert Journal(draft.path).cut is None and len(Journal(draft.path).entries) == len(lines)
    for damaged in (lines[:2] + lines[3:], [lines[0], lines[2], lines[1], *lines[3:]], [b"{}\n", *lines[1:]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=r"journal\.jsonl is damaged: line \d"):
            Journal(draft.path)


def test_an_append_that_fails_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = begun(tmp_path / "draft")
    whole = (draft / "journal.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            draft.journal.append(Entry("reward", {}))
    assert (draft / "journal.jsonl").read_bytes() == whole
    draft.journal.append(Entry("step 0"))
    assert Draft(draft.path).done("step 0") is not None


def begun_run(storage: Path, *options: str) -> RunDirectory:
    """A run with one committed round, and a second one with a checkpoint after 3 steps of which step 4's row came later."""
    directory = RunDirectory(load_config(TINY, ["--name", "paused", "--storage", str(storage), *options]))
    with directory.open():
        with directory.draft(directory.start_path) as draft:
            directory.commit_start(draft, {**JUDGED, "committed": True})
        with directory.draft(directory.round_path(0)) as draft:
            directory.commit_round(draft, {**JUDGED, "round": 0, "policy_version": 4})
        rows = "".join(json.dumps({"round": k, "step": step, "phase": "policy"}) + "\n" for k in (0, 1) for step in range(3))
        (directory.path / "metrics.jsonl").write_text(rows)
        with contextlib.suppress(KeyboardInterrupt), directory.draft(directory.round_path(1)) as draft:
            draft.begin(4, 0)
            put(draft, "reward", "reward")
            draft.checkpoint(3, 7, write_state, 2, len(rows), SECONDS)
            with (directory.path / "metrics.jsonl").open("a") as file:
                file.write(
                    '{"round": 1, "step": 3, "phase": "policy"}\n{"round": 1, "step": 3, "phase": "pool"}\n{"round": 1, "st'
                )
            (draft / "evaluation.parquet").write_text("half")
            raise KeyboardInterrupt
    return RunDirectory(directory.config)


def test_the_next_driver_goes_on_from_the_checkpoint_with_the_rows_before_it(tmp_path: Path) -> None:
    directory = begun_run(tmp_path)
    with directory.open():
        draft = directory.draft_path
        assert (directory.num_committed, directory.policy_version) == (1, 7)
        assert directory.learner_path == draft / "after_0003_steps"
        assert names(draft) == ["after_0003_steps", "journal.jsonl", "reward"], "what came after the checkpoint is made again"
        rows = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
        steps = [(row["round"], row["step"]) for row in rows if row["phase"] == "policy"]
        assert steps == [(k, step) for k in (0, 1) for step in range(3)]
        assert [row["step"] for row in rows if row["phase"] == "pool"] == [3], "an engine that came or went did so"
        with directory.draft(directory.round_path(1)) as again:
            assert again.path == draft
            directory.commit_round(again, {**JUDGED, "round": 1, "policy_version": 9})
        assert names(directory.path / "rounds") == ["round_000", "round_001"]
        assert names(directory.round_path(1)) == ["journal.jsonl", "reward"]
        assert directory.point is None and directory.policy_version == 9
        assert directory.learner_path == directory.round_path(1)


@pytest.mark.parametrize("damage", ["flip", "remove"])
@pytest.mark.parametrize("unit", ["start", "rounds/round_000"])
def test_committed_files_that_the_run_goes_on_from_must_be_what_was_written(unit: str, damage: str, tmp_path: Path) -> None:
    directory = RunDirectory(load_config(TINY, ["--name", "kept", "--storage", str(tmp_path)]))
    with directory.open():
        with directory.draft(directory.start_path) as draft:
            put(draft, "member 1", "members")
            directory.commit_start(draft, {**JUDGED, "committed": True})
        with directory.draft(directory.round_path(0)) as draft:
            put(draft, "reward", "reward")
            directory.commit_round(draft, {**JUDGED, "round": 0, "policy_version": 4})
    with RunDirectory(directory.config).open():
        pass
    file = next(file for file in sorted((directory.path / unit).rglob("*")) if file.is_file() and file.name != "journal.jsonl")
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        file.unlink()
    with (
        pytest.raises(UserError, match=rf"{file} is (not what was written|missing), and the run goes on from it"),
        RunDirectory(directory.config).open(),
    ):
        pass
    file.write_bytes(content)
    with RunDirectory(directory.config).open():
        pass


@pytest.mark.parametrize("cut", ["commit_directory", "write_file"], ids=["before its place", "before the ledger"])
def test_a_commit_that_is_cut_short_leaves_the_round(cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = begun_run(tmp_path)

    def fail(*arguments: object) -> None:
        raise SystemExit(143)

    def commit() -> None:
        with directory.draft(directory.round_path(1)) as draft:
            put(draft, "policy", "policy")
            directory.commit_round(draft, {**JUDGED, "round": 1, "policy_version": 9})

    with directory.open(), monkeypatch.context() as patch:
        patch.setattr(run_directory, cut, fail)
        with pytest.raises(SystemExit):
            commit()
    directory = RunDirectory(directory.config)
    with directory.open():
        assert directory.point is not None and directory.point.steps == 3
        assert names(directory.draft_path) == ["after_0003_steps", "journal.jsonl", "policy", "reward"]
        commit()
        assert names(directory.round_path(1)) == ["journal.jsonl", "policy", "reward"]


def commit_second(directory: RunDirectory) -> None:
    with directory.draft(directory.round_path(1)) as draft:
        directory.commit_round(draft, {**JUDGED, "round": 1, "policy_version": 9})


@pytest.mark.parametrize("before", [True, False], ids=["before the ledger is replaced", "after it"])
def test_a_commit_that_fails_in_a_living_driver_is_made_once(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, write = begun_run(tmp_path), run_directory.write_file

    def fail(path: Path, text: str) -> None:
        if not before:
            write(path, text)
        raise OSError(errno.EIO, "the storage is away")

    with directory.open():
        with monkeypatch.context() as patch:
            patch.setattr(run_directory, "write_file", fail)
            with pytest.raises(OSError, match="away"):
                commit_second(directory)
        assert directory.look_again() == (1 if before else 2)
        if before:
            assert directory.point is not None and directory.point.steps == 3, "the round is a draft again"
            commit_second(directory)
        assert names(directory.round_path(1)) == ["journal.jsonl", "reward"], "the checkpoints are gone in either case"
        assert names(directory.path / "rounds") == ["round_000", "round_001"] and directory.look_again() == 2


def test_what_cannot_be_dropped_at_once_is_dropped_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = begun_run(tmp_path)

    def fail(committed: Path, keep_rollouts: bool) -> None:
        raise OSError(errno.EIO, "the storage is away")

    with directory.open():
        with monkeypatch.context() as patch:
            patch.setattr(run_directory, "drop", fail)
            with pytest.raises(OSError, match="away"):
                commit_second(directory)
        assert directory.look_again() == 2, "the round is not played again"
        assert names(directory.round_path(1)) == ["journal.jsonl", "reward"]


def test_the_judgement_of_sft_is_written_once(tmp_path: Path) -> None:
    directory = RunDirectory(load_config(TINY, ["--name", "paused", "--storage", str(tmp_path)]))
    row = json.dumps({"round": -1, "step": 0, "phase": "evaluation"}) + "\n"
    with directory.open(), contextlib.suppress(KeyboardInterrupt), directory.draft(directory.start_path) as draft:
        draft.begin(0, 0)
        (directory.path / "metrics.jsonl").write_text(row)
        raise KeyboardInterrupt
    with directory.open():
        assert (directory.path / "metrics.jsonl").read_text() == "", "it comes again with the start"
        with directory.draft(directory.start_path) as draft:
            (directory.path / "metrics.jsonl").write_text(row)
            directory.commit_start(draft, {**JUDGED, "committed": True})
    with directory.open():
        assert (directory.path / "metrics.jsonl").read_text() == row


def test_how_far_a_fit_came_goes_with_its_round(tmp_path: Path) -> None:
    for place in (".reward.fit", "members/.1.fit"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "00000003.json").write_text("{}")
    drop(tmp_path, keep_rollouts=False)
    assert names(tmp_path) == ["members"] and not names(tmp_path / "members")


def test_a_draft_without_a_journal_is_removed(tmp_path: Path) -> None:
    directory = begun_run(tmp_path)
    (directory.path / "rounds" / ".round_001.partial" / "journal.jsonl").unlink()
    with directory.open():
        assert names(directory.path / "rounds") == ["round_000"]
        assert directory.policy_version == 4 and directory.learner_path == directory.round_path(0)
        rows = (directory.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["round"] for row in rows if "pool" not in row] == [0, 0, 0]


def test_another_config_does_not_take_a_round_up(tmp_path: Path) -> None:
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
    assert directory.critic_base(tmp_path) == directory.path / kept


def test_tensorboard_keeps_the_steps_before_a_pause_and_shows_the_later_ones_once(tmp_path: Path) -> None:
    update = {"policy/score": 0.0, "policy/kl": 0.0, "policy/tokens": 8.0}

    def play(steps: range, value: float) -> None:
        metrics = Metrics(tmp_path, 4, Telemetry("paused", {}))
        for step in steps:
            metrics.span(Span("sample", "rollout-0", 1, step, 0.0, value))
            metrics.policy(1, step, update | {"policy/loss": value}, SCORES, None)
            metrics.sync(1, step, Sync(1.0, 1))
        metrics.close()

    play(range(3), 1.0)  # step 2 was played after the pause, and is played again
    play(range(2, 4), 2.0)
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


def test_a_full_disk_keeps_the_stages_that_were_done_and_frees_the_rest(tmp_path: Path) -> None:
    directory = begun_run(tmp_path)

    def full(place: Path) -> None:
        write_state(place)
        raise OSError(errno.ENOSPC, "full")

    with directory.open():
        with pytest.raises(UserError, match="what of it was done before and all earlier rounds are intact"):
            save_in_vain(directory, full)
        assert names(directory.draft_path) == ["after_0003_steps", "journal.jsonl", "reward"]
        assert directory.point is not None and directory.point.steps == 3


def save_in_vain(directory: RunDirectory, save: Callable[[Path], None]) -> None:
    with directory.draft(directory.round_path(1)) as draft:
        (draft.partial("members")).mkdir()
        draft.checkpoint(4, 8, save, 2, 0, SECONDS)


def write_checkpoints(folder: Path, first: int) -> None:
    """Again and again, until killed."""
    draft = Draft(folder)
    for number in count(first):
        draft.checkpoint(number, number, partial(write_numbered, number), 2, number, SECONDS)


def write_numbered(number: int, place: Path) -> None:
    for name in ("policy.bin", "critic.bin"):
        (place / name).write_bytes(bytes([number % 256]) * 200_000)


def read_checkpoint(folder: Path) -> int:
    """The number of the write that is there; 0 before the first.

    Raises:
        AssertionError: if it is not whole.
    """
    said: list[str] = []
    draft = Draft(folder)
    draft.check(said.append)
    draft.tidy()
    assert not [line for line in said if "cut short" not in line], said
    point = draft.point
    assert point is not None
    if point.place is None:
        return 0
    for name in ("policy.bin", "critic.bin"):
        assert (point.place / name).read_bytes() == bytes([point.steps % 256]) * 200_000
    return point.steps


def write_states(folder: Path, first: int) -> None:
    """Again and again, until killed."""
    for number in count(first):
        save_state(folder / "fit", number, SavedState({"x": torch.full((10_000,), float(number))}, {"done": number}))


def read_state(folder: Path) -> int:
    """As ``read_checkpoint``, of a fit."""
    found = latest_state(folder / "fit")
    if found is None:
        return 0
    assert found.tensors["x"].eq(found.values["done"]).all()
    return int(found.values["done"])


@pytest.mark.parametrize(("write", "read"), [(write_checkpoints, read_checkpoint), (write_states, read_state)])
def test_no_kill_inside_a_write_leaves_anything_unreadable(
    write: Callable[[Path, int], None], read: Callable[[Path], int], tmp_path: Path
) -> None:
    Draft(tmp_path).begin(0, 0)
    moments, latest, kills, longest_s = random.Random(0), 0, 0, 0.05
    while kills < 50 or latest <= 10:
        kills += 1
        child = os.fork()
        if not child:
            write(tmp_path, latest + 1)
        time.sleep(moments.uniform(0.0, longest_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = read(tmp_path)
        assert found >= latest, "what was whole stays"
        longest_s *= 1.0 if found > latest else 1.1  # a busy machine takes longer to write anything at all
        latest = found


@pytest.mark.parametrize("damage", ["tensors", "record", "gone"])
def test_a_damaged_state_of_a_fit_gives_way_to_the_one_before(damage: str, tmp_path: Path) -> None:
    for number in (1, 2):
        save_state(tmp_path / str(number), number, SavedState({"x": torch.full((3,), float(number))}, {"done": number}))
    for file in (tmp_path / "1").iterdir():
        shutil.copy(file, tmp_path / "2" / file.name)  # as a kill leaves it that comes before the older one is removed
    (tensors,), (record,) = ((tmp_path / "2").glob(f"00000002.*.{kind}") for kind in ("safetensors", "json"))
    if damage == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    elif damage == "record":
        record.write_text(record.read_text()[:-2])
    else:
        tensors.unlink()
    found = latest_state(tmp_path / "2")
    assert found is not None and found.values["done"] == 1
    assert latest_state(tmp_path / "nowhere") is None


def test_two_processes_that_save_the_same_step_of_a_fit_write_into_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was given up is frozen between its tensors and its record; the one in its place saves the same step in full."""
    write = saved_state.write_file

    def save(value: float) -> None:
        save_state(tmp_path, 3, SavedState({"x": torch.full((3,), value)}, {"of": value}))

    def frozen(path: Path, text: str) -> None:
        monkeypatch.setattr(saved_state, "write_file", write)
        save(2.0)
        (tmp_path / ".00000003.of-a-third.safetensors.partial").touch()
        write(path, text)

    monkeypatch.setattr(saved_state, "write_file", frozen)
    save(1.0)
    for _ in range(2):
        found = latest_state(tmp_path)
        assert found is not None and found.tensors["x"].eq(found.values["of"]).all()
        max(tmp_path.glob("*.json")).unlink()
    assert latest_state(tmp_path) is None, "each of the two was whole"
    save_state(tmp_path, 4, SavedState({}, {}))
    kept = ".00000003.of-a-third.safetensors.partial"
    assert all(name.startswith("00000004.") for name in names(tmp_path) if name != kept)
    assert kept in names(tmp_path), "a third one may be writing it"
