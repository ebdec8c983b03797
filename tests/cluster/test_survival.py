"""A run in which an engine, the scorer, and a rank of the learner and of the reward trainer die at their work: the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.command import ROOT, TINY, TWO_RANKS, TWO_SCORERS, Command

ONE_ROUND = ("--rounds.num_rounds", "1", "--rounds.checkpoint_every", "1", *TWO_RANKS, *TWO_SCORERS)
"""As ``ranks_run``, but with checkpoints, and every process in a bundle of its own."""
TIMED = ("time", "sample/seconds", "sample/tokens_per_second", "sync/seconds", "sync/bytes_per_second")


class Disturbed:
    """A run in the background, and what happens to its processes."""

    def __init__(self, command: Command, name: str, *arguments: str) -> None:
        self.path = command.storage / "runs" / name
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
        environment |= {"RONDO_STORAGE": str(command.storage), "PATH": command.path}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "run", str(TINY), "--name", name, *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Disturbed:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.process.communicate()[0])
            time.sleep(0.02)

    def until_done(self, draft: str, key: str) -> None:
        """Wait until a stage is recorded."""
        self.until(lambda: (file := self.path / draft / "journal.jsonl").is_file() and f'"key": "{key}"' in file.read_text())

    def ids(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads((self.path / "processes.json").read_text())
        return found

    def send(self, name: str, number: signal.Signals) -> None:
        os.kill(self.ids()[name]["pid"], number)

    def faults(self) -> list[dict[str, Any]]:
        return [row for row in rows_of(self.path) if row["phase"] == "faults"]

    def until_back(self, name: str, times: int = 1) -> None:
        self.until(lambda: sum((row["event"], row["process"]) == ("back", name) for row in self.faults()) >= times)

    def end(self) -> str:
        output = self.process.communicate(timeout=240)[0]
        assert self.process.returncode == 0, output
        return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def learned(path: Path) -> list[dict[str, Any]]:
    """The numbers of a run, without what the clock says and what happened to its processes."""
    rows = [row for row in rows_of(path) if row["phase"] != "faults"]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def digests(path: Path) -> dict[str, str]:
    """Of all that a run commits as tensors and tables."""
    files = [
        file
        for folder in ("start", "rounds")
        for file in (path / folder).rglob("*")
        if file.suffix in (".safetensors", ".parquet")
    ]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def test_the_outcome_does_not_depend_on_who_died(command: Command, ranks_run: Path) -> None:
    with Disturbed(command, "disturbed", *ONE_ROUND) as run:
        run.until(lambda: (run.path / "processes.json").is_file())
        run.until_done(".start.partial", "begun")
        run.send("reward-1", signal.SIGKILL)  # it fits the first member, with the other rank
        run.send("rollout-0", signal.SIGSTOP)
        run.send("scorer-0", signal.SIGSTOP)
        run.until_done(".start.partial", "member 1")  # now the engines are asked for SFT's responses
        time.sleep(0.5)
        run.send("rollout-0", signal.SIGKILL)
        run.until_done(".start.partial", "evaluation")  # now the scorer is asked for what it thinks of them
        time.sleep(0.5)
        run.send("scorer-0", signal.SIGKILL)
        draft = "rounds/.round_000.partial"
        run.until_done(draft, "rollouts 1")
        run.send("learner-1", signal.SIGSTOP)
        run.until_done(draft, "scores 1")  # now the learner is asked for its second update
        time.sleep(0.5)
        run.send("learner-1", signal.SIGKILL)
        run.end()
        ids = run.ids()
    assert {name: ids[name]["incarnation"] for name in ids if name != "driver"} == {
        "rollout-0": 2, "scorer-0": 2, "scorer-1": 1, "reward-0": 2, "reward-1": 2, "learner-0": 2, "learner-1": 2,
    }  # fmt: skip
    lost = [row["process"] for row in run.faults() if row["event"] == "lost"]
    assert lost == ["reward-1", "rollout-0", "scorer-0", "learner-1"]
    assert all(row["faults/recovery_seconds"] > row["faults/start_seconds"] > 0 for row in run.faults() if row["event"] == "back")
    assert learned(run.path) == learned(ranks_run)
    assert digests(run.path) == digests(ranks_run)
