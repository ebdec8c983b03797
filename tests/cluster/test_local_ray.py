"""Ray on a machine that is too busy to start it in time."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import local_ray
from cluster.local_ray import ATTEMPTS, start_local_ray
from tokens.errors import UserError

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[str]:
    """ray.init fails with these, one a call, then starts; returns what was called."""
    calls, left = list[str](), list(errors)

    def init(**options: Any) -> None:
        assert options["address"] == "local"
        calls.append("init")
        if left:
            raise left.pop(0)

    monkeypatch.setattr(local_ray.ray, "init", init)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def test_processes_that_are_late_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = failing(monkeypatch, Exception(TIMED_OUT)), list[str]()
    start_local_ray(said.append)
    assert calls == ["init", "shutdown", "init"] and len(said) == 1 and "trying again" in said[0]


def test_after_the_last_attempt_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, *[Exception(TIMED_OUT)] * ATTEMPTS)
    with pytest.raises(UserError, match=r"did not start within half a minute, 3 times \(load .* cores\): wait"):
        start_local_ray(lambda line: None)
    assert calls.count("init") == ATTEMPTS and calls[-1] == "shutdown", "nothing is left standing"


def test_another_error_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, ValueError("no such address"))
    with pytest.raises(ValueError, match="no such address"):
        start_local_ray(lambda line: None)
    assert calls == ["init"]
