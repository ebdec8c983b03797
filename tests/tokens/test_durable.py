"""Files and directories that are there or not."""

import hashlib
import os
from pathlib import Path

import pytest

import tokens.durable
from tokens.durable import commit_directory, digest_of_file, draft_directory, exchange, replace_directory, whole_file, write_file


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_file(path, "old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    assert digest_of_file(path) == hashlib.sha256(b"new").hexdigest()


@pytest.mark.parametrize("fails_in", ["write_text", "fsync"])
def test_after_an_error_the_old_file_is_as_it_was(fails_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_file(path, "old")

    def full(*arguments: object, **more: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr({"write_text": Path, "fsync": os}[fails_in], fails_in, full)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, "new")
    assert path.read_text() == "old"


def test_a_draft_is_of_one_process_and_removes_those_of_the_same_place_alone(tmp_path: Path) -> None:
    final, other = tmp_path / "stages" / "law[1]", tmp_path / "stages" / "law[1].more"
    first, elsewhere = draft_directory(final), draft_directory(other)
    (first / "x").write_text("half")
    second = draft_directory(final)
    assert not first.exists() and second.is_dir() and elsewhere.is_dir() and not list(second.iterdir())
    commit_directory(second, final)
    assert sorted(path.name for path in final.parent.iterdir()) == sorted([final.name, elsewhere.name])


def test_a_directory_comes_to_its_place_whole_and_only_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "x").write_text(name)
    commit_directory(tmp_path / "one", tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "x").read_text() == "one"
    with pytest.raises(OSError, match="not empty"):
        commit_directory(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "x").read_text() == "one"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_takes_the_place_of_another(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:  # as on NFS
        monkeypatch.setattr(tokens.durable, "exchange", lambda one, other: False)
    final = tmp_path / "best"
    for name in ("one", "two"):
        partial = draft_directory(final)
        (partial / name).write_text(name)
        replace_directory(partial, final)
        assert [path.name for path in final.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_two_names_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot")
    assert [(tmp_path / name / "x").read_text() for name in ("one", "two")] == ["two", "one"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nowhere")
