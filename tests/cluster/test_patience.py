"""Storage that is away for a while."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster import patience
from cluster.patience import errno_of, is_away, until_there


def test_what_an_error_says_of_the_storage(tmp_path: Path) -> None:
    assert is_away(OSError(errno.ESTALE, "Stale file handle"), tmp_path) and is_away(OSError(errno.EIO, "no"), tmp_path)
    assert not is_away(OSError(errno.ENOSPC, "full"), tmp_path) and not is_away(OSError(errno.EACCES, "no"), tmp_path)
    assert is_away(RuntimeError("Error while serializing: I/O error: Input/output error (os error 5)"), tmp_path)
    assert errno_of(ValueError("(os error x)")) is None and errno_of(ValueError("os error 5")) is None
    assert is_away(FileNotFoundError(), tmp_path / "gone") and not is_away(FileNotFoundError(), tmp_path)


def test_storage_that_comes_back_is_waited_for_and_one_that_does_not_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "LOOK_EVERY_S", 0.01)
    place, looks = tmp_path / "runs", list[int]()

    def comes_back() -> None:
        looks.append(1)
        if len(looks) == 3:
            place.mkdir()

    assert until_there(place, 60.0, comes_back) > 0 and len(looks) == 3 and not os.listdir(place)
    with pytest.raises(FileNotFoundError):
        until_there(tmp_path / "never", 0.05, lambda: None)

    def refused(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(patience, "_try", refused)
    with pytest.raises(PermissionError):  # that does not pass by itself
        until_there(place, 60.0, lambda: None)
