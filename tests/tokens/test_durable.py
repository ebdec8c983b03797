"""Files and directories that are there or not."""

import hashlib
import os
from pathlib import Path

import pytest

from tokens.durable import commit_directory, digest_of_file, draft_directory, whole_file, write_file


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
