"""A run as a process of its own, watched from outside: what it prints and when, its timeline, and who its processes are."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from benchmarks.faults.nodes import Nodes, with_parent
from evaluation.timeline import DRIVER

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.004
"""A step of the smallest model takes tens of milliseconds."""
LISTEN_S, ALIVE_S = 5.0, 180.0
"""How long after a driver's end its last lines may come; and how long a successor may take to be there."""


class Late(AssertionError):
    """What was waited for did not come; the run's last words are in the message."""


@dataclass(frozen=True)
class Said:
    """A line that a driver printed.

    Args:
        at: Unix time, s.
        text: the line, without colours.
    """

    at: float
    text: str


class Tail:
    """A file of JSON lines that somebody appends to.

    Args:
        path: of it; may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.rows = path, 0, list[dict[str, Any]]()

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far."""
        if not self.path.exists():
            return self.rows
        size = self.path.stat().st_size
        if size < self.offset:  # a new driver took the file back to what is committed
            self.offset, self.rows = 0, []
        if size > self.offset:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.offset += len(whole)
            self.rows += [json.loads(line) for line in whole.splitlines()]
        return self.rows


class Run:
    """One start of ``python -m cluster run``.

    Args:
        nodes: the cluster.
        storage: root of the runs.
        name: of the run; the same name again goes on.
        arguments: config and overrides.
        variables: environment of the driver alone.
        prefix: command that the driver runs under.
    """

    def __init__(
        self,
        nodes: Nodes,
        storage: Path,
        name: str,
        arguments: Sequence[str],
        variables: Mapping[str, str] = {},
        prefix: Sequence[str] = (),
    ) -> None:
        self.path, self.name, self.began = storage / "runs" / name, name, time.time()
        self.timeline, self.metrics = Tail(self.path / "timeline.jsonl"), Tail(self.path / "metrics.jsonl")
        self.seen = len(self.timeline.read())
        self.said: list[Said] = []
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cluster", "run", *arguments, "--name", name],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=partial(with_parent, signal.SIGKILL),
            env=nodes.environment | {"RAY_ADDRESS": nodes.address, "RONDO_STORAGE": str(storage), **variables},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.listener = threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True)
        self.listener.start()

    def _listen(self, printed: IO[str]) -> None:
        with printed:
            for line in printed:
                self.said.append(Said(time.time(), re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip())))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.listener.join(LISTEN_S)

    def output(self) -> str:
        """All that it printed so far."""
        return "\n".join(line.text for line in self.said)

    def when(self, pattern: str, since: float = 0.0) -> float | None:
        """When a line that matches was printed first; None if none was.

        Args:
            pattern: regular expression.
            since: Unix time, s; earlier lines do not count.
        """
        return next((line.at for line in tuple(self.said) if line.at >= since and re.search(pattern, line.text)), None)

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait; the time at which it was so.

        Raises:
            Late: if the run ends before, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None and not true():  # it may have come just before the end
                self.listener.join(LISTEN_S)
                raise Late(f"{self.name} ended with {self.process.returncode} before {what}:\n{self.output()[-3000:]}")
            if time.monotonic() > deadline:
                raise Late(f"{self.name}: not within {seconds:g} s: {what}:\n{self.output()[-3000:]}")
            time.sleep(POLL_S)
        return time.time()

    def spans(self) -> list[dict[str, Any]]:
        """Of this start."""
        return self.timeline.read()[self.seen :]

    def waited(self, what: str, index: int | None, step: int | None = None) -> bool:
        """Whether the driver's wait for a phase of a round's step is over.

        Args:
            what: the phase.
            index: round; None = before the rounds.
            step: PPO step; None = outside of them.
        """
        place = (what, DRIVER, index, step)
        return any((span["what"], span["who"], span["round"], span["step"]) == place for span in self.spans())

    def until_waited(self, what: str, index: int | None, step: int | None = None, seconds: float = 600) -> float:
        """Wait until a phase of a round's step is over: what comes after it begins now."""
        return self.until(lambda: self.waited(what, index, step), seconds, f"{what} of round {index}, step {step}")

    def draft(self, index: int) -> Path:
        """Where a round is written until it is committed."""
        return self.path / "rounds" / f".round_{index:03d}.partial"

    def stages(self, index: int) -> list[str]:
        """Keys of the lines in a round's journal, in order; none where there is none yet."""
        for folder in (self.draft(index), self.path / "rounds" / f"round_{index:03d}"):
            with contextlib.suppress(FileNotFoundError):
                lines = (folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
                return [json.loads(line)["entry"]["key"] for line in lines]
        return []

    def until_stage(self, index: int, key: str, seconds: float = 600) -> float:
        """Wait for a line of a round's journal."""
        return self.until(lambda: key in self.stages(index), seconds, f"{key!r} in the journal of round {index}")

    def until_said(self, pattern: str, since: float = 0.0, seconds: float = 600) -> float:
        """Wait for a line; when it was printed."""
        self.until(lambda: self.when(pattern, since) is not None, seconds, f"a line like {pattern!r}")
        at = self.when(pattern, since)
        assert at is not None
        return at

    def end(self, seconds: float = 900) -> int:
        """Wait for its end.

        Returns:
            The exit code.

        Raises:
            Late: if it does not come.
        """
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Late(f"{self.name} did not end within {seconds:g} s:\n{self.output()[-3000:]}") from None
        self.listener.join(LISTEN_S)
        return code

    def role(self, name: str) -> psutil.Process:
        """The newest process of a role, by the first line of its log.

        Args:
            name: e.g. ``learner-0``.
        """
        log, deadline = self.path / "logs" / f"{name}.log", time.monotonic() + ALIVE_S
        while True:
            pids = re.findall(rf"{name}: process (\d+),", log.read_text())
            try:
                return psutil.Process(int(pids[-1]))
            except psutil.NoSuchProcess:
                if time.monotonic() > deadline:
                    raise Late(f"{self.name}: no {name} lives") from None
                time.sleep(0.05)

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Send the driver a signal; when."""
        self.process.send_signal(number)
        return time.time()

    def start_seconds(self) -> float:
        """What starting the roles took: the cold start that recoveries are measured against."""
        return sum(span["end"] - span["start"] for span in self.spans() if (span["what"], span["who"]) == ("start_roles", DRIVER))


def ledger(path: Path) -> dict[str, Any]:
    """A run's ledger."""
    stored: dict[str, Any] = json.loads((path / "ledger.json").read_text())
    return stored
