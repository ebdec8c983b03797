"""One driver at a time, also where the lock does not hold: a driver that was given up writes nothing that counts any more."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cluster.draft
import tokens.durable
from cluster.config import RunConfig
from cluster.draft import Draft
from cluster.hold import LOCK, TakenOver, holder, locked
from cluster.load_config import load_config
from cluster.metrics import Metrics
from cluster.reward_directory import RewardDirectory
from cluster.run_directory import RunDirectory
from cluster.sft_directory import SFTDirectory
from cluster.strength_directory import StrengthDirectory
from cluster.study import Book, Place
from cluster.telemetry import Telemetry
from evaluation.studies import StudyRow
from tests.cluster.command import TINY
from tests.cluster.judged import JUDGED
from tokens.errors import UserError


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_each_driver_leaves_a_mark_with_the_next_number(tmp_path: Path) -> None:
    for epoch in (1, 2):
        with locked(tmp_path) as hold:
            assert hold.epoch == epoch and hold.lasts
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    for other in (b'{"epoch": 3, "host": "a", "p', b"1", b"[]", b'{"epoch": null}', b"\xff\xfe"):
        (tmp_path / LOCK).write_bytes(other)  # the machine went down while it was written, or it is something else
        assert not hold.lasts and holder(tmp_path) == ""
        with locked(tmp_path) as hold:
            assert hold.epoch == 1 and hold.lasts


def test_a_second_driver_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        locked(tmp_path) as hold,
        pytest.raises(UserError, match=rf"another driver is running in .*\(process {os.getpid()} on .*, epoch 1\)"),
        locked(tmp_path),
    ):
        pass
    assert hold.lasts, "the second one left no mark"


def begin(directory: RunDirectory, stack: ExitStack) -> None:
    """Open a run and begin its first round."""
    stack.enter_context(directory.open())
    with directory.draft(directory.start_path) as draft:
        directory.commit_start(draft, {**JUDGED, "committed": True})
    with directory.draft(directory.round_path(0)) as draft:
        draft.begin(0, 0)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunDirectory, RunDirectory]]:
    """A driver of a run, frozen in the middle of round 0, and the one that took over from it, on a mount without locks."""
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path))
    first, second = RunDirectory(load_config(TINY)), RunDirectory(load_config(TINY))
    with ExitStack() as stack:
        begin(first, stack)
        stack.enter_context(second.open())
        yield first, second


def test_a_driver_that_was_given_up_records_and_commits_nothing(two: tuple[RunDirectory, RunDirectory]) -> None:
    first, second = two
    draft = Draft(first.draft_path, first.hold.check)
    with second.draft(second.round_path(0)) as other:
        other.partial("reward").mkdir()
        before = files(second.path)
        for act in (
            lambda: draft.note("bad 0", {}),
            lambda: draft.undo(["begun"], "a loss"),
            lambda: put(draft, "scores"),
            lambda: draft.checkpoint(2, 2, lambda place: None, 2, 0, {}),
            lambda: first.commit_round(draft, {**JUDGED, "round": 0}),
        ):
            with pytest.raises(TakenOver, match=r"another driver .* \(process \d+ on .*, epoch 2\); this one, of epoch 1"):
                act()
        with pytest.raises(TakenOver), first.draft(first.round_path(0)) as late:
            late.note("bad 0", {})
        after = files(second.path).items()  # and what it had begun, which goes with the commit
        assert {name: content for name, content in after if ".scores." not in name and "steps" not in name} == before
        assert other.partials["reward"].is_dir(), "what the other one has under way is not cleared away"
        put(other, "scores")
        second.commit_round(other, {**JUDGED, "round": 0})
    assert second.num_committed == 1 and not any("partial" in name for name in files(second.path))


def test_a_driver_that_was_given_up_clears_nothing_away_and_writes_no_rows(two: tuple[RunDirectory, RunDirectory]) -> None:
    first, second = two
    metrics = Metrics(first.path, 4, Telemetry("tiny", {}), first.hold.check)
    with second.draft(second.round_path(0)) as other:
        other.partial("scores").write_text("under way")
        before = files(second.path)
        with pytest.raises(TakenOver), first.draft(first.round_path(0)):
            raise UserError("no space left")
        with pytest.raises(TakenOver):
            first.look_again()
        with pytest.raises(TakenOver):
            metrics.evaluation(0, {"proxy": 1.0})
        with pytest.raises(TakenOver):
            metrics.go_back(0)
        metrics.close()
        assert files(second.path) == before


def test_a_driver_that_was_given_up_begins_no_round_and_one_that_took_over_begins_it_whatever_is_there(
    two: tuple[RunDirectory, RunDirectory],
) -> None:
    first, second = two
    shutil.rmtree(second.draft_path)
    with pytest.raises(TakenOver), first.draft(first.round_path(0)):
        raise AssertionError("it was let in")
    assert not second.draft_path.exists()
    second.draft_path.mkdir()  # of one that was frozen between its look and this
    (second.draft_path / "half").touch()
    with second.draft(second.round_path(0)) as draft:
        draft.begin(0, 0)
        assert sorted(path.name for path in second.draft_path.iterdir()) == ["journal.jsonl"]


def test_lines_that_somebody_else_wrote_are_not_cut_off(two: tuple[RunDirectory, RunDirectory]) -> None:
    first, second = two
    journal = Draft(first.draft_path).journal  # of a driver that has looked for its mark just now
    with second.draft(second.round_path(0)) as draft:
        draft.note("bad 0", {})
        before = files(second.path)
        with pytest.raises(UserError, match=r"journal.jsonl has \d+ bytes, expected \d+ as this driver left it"):
            journal.undo(("begun",), "a loss")
        assert files(second.path) == before


def test_a_place_that_another_driver_made_is_not_taken_back(two: tuple[RunDirectory, RunDirectory]) -> None:
    """The other one is about to write its ledger: its round has its place already."""
    first, second = two
    with second.draft(second.round_path(0)) as other:
        put(other, "scores")
        os.replace(other.path, second.round_path(0))
    before = files(second.path)
    with pytest.raises(TakenOver):
        first.look_again()
    assert files(second.path) == before


def put(draft: Draft, name: str) -> None:
    draft.partial(name).write_text(name)
    draft.record(name, [name], {}, 0, {})


def save(draft: Draft, by: str) -> None:
    draft.checkpoint(2, 2, lambda place: write(place, by), 2, 0, {})


def write(place: Path, by: str) -> None:
    (place / "learner.json").write_text(by)


def record_model(draft: Draft, by: str) -> None:
    (place := draft.partial("reward")).mkdir()
    write(place, by)
    draft.record("reward", ["reward"], {}, 0, {})


ACTS: dict[str, Callable[[RunDirectory, Draft], None]] = {
    "records a file": lambda first, draft: put(draft, "scores"),
    "records a model": lambda first, draft: record_model(draft, "the first"),
    "saves a checkpoint": lambda first, draft: save(draft, "the first"),
    "commits": lambda first, draft: first.commit_round(draft, {**JUDGED, "round": 0}),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_driver_that_is_frozen_while_it_syncs_moves_and_removes_nothing(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it began another one had not come yet; when the sync is over that one has written all that it was about to write."""
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path))
    first, second = RunDirectory(load_config(TINY)), RunDirectory(load_config(TINY))
    left: list[dict[str, bytes]] = []

    def frozen(sync: Callable[[Path], None], place: Path) -> None:
        sync(place)
        if stack and not left:
            left.append({})
            (before,) = stack
            before.enter_context(second.open())
            with second.draft(second.round_path(0)) as other:
                put(other, "scores")
                record_model(other, "the second")
                save(other, "the second")
                other.partial("evaluation.parquet").write_text("under way")
                left.append(files(second.path))

    stack: list[ExitStack] = []
    for module in (cluster.draft, tokens.durable):
        for name in ("sync", "sync_tree"):
            monkeypatch.setattr(module, name, partial(frozen, getattr(module, name)))
    with ExitStack() as opened:
        begin(first, opened)
        stack.append(opened)
        with pytest.raises(TakenOver), first.draft(first.round_path(0)) as draft:
            ACTS[act](first, draft)
    assert files(second.path) == left[1]


def nothing() -> None:
    """Nobody takes over."""


def commit_reward(directory: RewardDirectory, frozen: Callable[[], None], fitting: Callable[[], None] = nothing) -> None:
    with directory.open(), directory.draft() as draft:
        fitting()
        (draft / "model").mkdir()
        write(draft / "model", "of this one")
        frozen()
        directory.commit(draft, {"pairs_sha256": "of these"})


def commit_sft(directory: SFTDirectory, frozen: Callable[[], None], fitting: Callable[[], None] = nothing) -> None:
    with directory.open() as draft:
        fitting()
        write(draft, "of this one")
        frozen()
        directory.commit(draft, {"data_sha256": "of these"})


def fit_reward(directory: RewardDirectory, frozen: Callable[[], None]) -> None:
    commit_reward(directory, nothing, fitting=frozen)


def fit_sft(directory: SFTDirectory, frozen: Callable[[], None]) -> None:
    commit_sft(directory, nothing, fitting=frozen)


def study(directory: StrengthDirectory, frozen: Callable[[], None]) -> None:
    with directory.open():
        book = Book(directory.path / "studies", {"reward.lr": 0.1}, directory.hold.check)
        place, row = Place("lowest", "0-10%: none", 0), StudyRow("lowest", "0-10%: none", 0, 8, 4, "original", 0.5, 0.7, 0.1)
        frozen()
        book.add([place], (row,))


def begin_strengths(directory: StrengthDirectory, frozen: Callable[[], None]) -> None:
    with directory.open():
        frozen()
        directory.belong_to("these")


@pytest.mark.parametrize(
    ("make", "act"),
    [
        (RewardDirectory, commit_reward),
        (RewardDirectory, fit_reward),
        (SFTDirectory, commit_sft),
        (SFTDirectory, fit_sft),
        (StrengthDirectory, begin_strengths),
        (StrengthDirectory, study),
    ],
)
def test_a_driver_that_was_given_up_commits_nothing_of_another_kind_either(
    make: Callable[[RunConfig], Any],
    act: Callable[[Any, Callable[[], None]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    config = load_config(TINY, ["--storage", str(tmp_path)])
    first, second = make(config), make(config)
    found: list[dict[str, bytes]] = []

    def take_over() -> None:
        stack.enter_context(second.open())
        found.append(files(tmp_path))

    with ExitStack() as stack:
        with pytest.raises(TakenOver, match=r"epoch 2\); this one, of epoch 1"):
            act(first, take_over)
        assert [files(tmp_path)] == found
    act(second, nothing)
    assert files(tmp_path) != found[0]


def test_what_a_process_of_an_earlier_driver_still_writes_counts_for_nothing(two: tuple[RunDirectory, RunDirectory]) -> None:
    """It was asked to save a model, its driver is gone, and it goes on writing where it was told to, while another one does."""
    first, second = two
    stray = Draft(first.draft_path, first.hold.check).partial("reward")
    stray.mkdir()
    with second.draft(second.round_path(0)) as draft:
        (place := draft.partial("reward")).mkdir()
        (place / "model.safetensors").write_text("of this driver")
        (stray / "model.safetensors").write_text("of the one before")
        draft.record("reward", ["reward"], {}, 0, {})
        (stray / "model.safetensors").write_text("of the one before, later")
        assert (draft / "reward" / "model.safetensors").read_text() == "of this driver"
        said: list[str] = []
        draft.check(said.append)
        draft.tidy()
        assert not said and not stray.exists()
