"""Trackers: services that draw a run's numbers (`report_to`), each fed from a thread of its own: none can end or slow the run."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.markup import escape

from cluster.config import RunConfig
from cluster.differences import flat
from tokens.durable import write_file
from tokens.errors import UserError
from tokens.paths import printable

STATE = "trackers.json"
"""Of a run: the id that each tracker knows it by."""
FOLDER = "trackers"
"""Of the storage root: files of trackers that keep them on this machine."""
MOST_WAITING = 20_000
"""Rows that wait for a tracker that does not answer; later ones are lost to it."""
OPENING_PAUSES_S = (0.0, 5.0, 30.0)
"""Before each of the tries to begin in a tracker."""
CLOSING_S = 20.0
"""How long the end of a run waits for what was not sent yet."""
NEEDS: Mapping[str, tuple[str, str]] = {
    "wandb": ("wandb", "wandb>=0.20"),
    "mlflow": ("mlflow", "mlflow>=3.1"),
    "trackio": ("trackio", "trackio>=0.20"),
}
"""The module of a tracker, and what to install."""
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Numbers:
    """A row of metrics.jsonl for a tracker.

    Args:
        phase: of the run; each counts its steps by itself.
        step: of the phase, over all rounds.
        seconds: Unix time.
        values: by name.
    """

    phase: str
    step: int
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Beginning:
    """What a tracker is told at the start.

    Args:
        name: of the run.
        folder: where it may keep files.
        config: values by dotted key.
        known: the id that it knows the run by; None where the run is new to it.
    """

    name: str
    folder: Path
    config: Mapping[str, object]
    known: str | None


class Tracker(Protocol):
    """A run in a tracker."""

    id: str
    """What it is found by again."""

    def log(self, row: Numbers) -> None:
        """Draw a row."""

    def close(self, well: bool) -> None:
        """Send the rest; ``well`` = the run did not end by an error."""


def check_trackers(config: RunConfig) -> None:
    """A tracker that is named must be installed.

    Args:
        config: of the run.

    Raises:
        UserError: saying what to install.
    """
    for name in config.report_to:
        if name == "tensorboard":
            continue
        module, package = NEEDS[name]
        missing = [one for one in (module, *_further(name)) if importlib.util.find_spec(one) is None]
        if missing:
            raise UserError(
                f"report_to names {name}, and {' and '.join(missing)} cannot be imported. Install it (pip install '{package}'; "
                f"into Rondo's .venv: uv pip install --python .venv '{package}'), or take {name} out of report_to"
            )


def _further(name: str) -> tuple[str, ...]:
    """MLflow's small package has no database, which it needs unless a server keeps the runs."""
    from cluster.tracker_kinds import MLFLOW_URI

    served = MLFLOW_URI in os.environ and not os.environ[MLFLOW_URI].startswith("sqlite")
    return ("sqlalchemy",) if name == "mlflow" and not served else ()


class Feed:
    """One tracker, and the thread that talks to it.

    Args:
        name: of the tracker.
        start: opens it.
        say: tells the user.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self.start, self.say = name, start, say
        self.rows: queue.SimpleQueue[Numbers | bool] = queue.SimpleQueue()
        self.refused, self.failed = 0, 0  # the first is the driver's to count, the second the thread's
        self.error, self.said, self.ending = "", False, threading.Event()
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def put(self, row: Numbers) -> None:
        """Hand a row over; never waits."""
        self._tell()
        if self.rows.qsize() >= MOST_WAITING or not self.thread.is_alive():
            self.refused += 1
        else:
            self.rows.put(row)

    def end(self, well: bool) -> None:
        """No row follows."""
        self.rows.put(well)
        self.ending.set()

    def close(self, deadline: float) -> None:
        """Wait for the rest, by the monotonic clock at most until ``deadline``, and say what is missing."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        self._tell()
        waiting = max(0, self.rows.qsize() - 1)
        if self.thread.is_alive():
            self.say(
                f"[yellow]note[/] tracker {self.name} has not answered within {CLOSING_S:g} s of the end; {waiting} rows wait"
            )
        if self.refused + self.failed:
            self.say(
                f"[yellow]note[/] tracker {self.name} lacks {self.refused + self.failed + waiting} rows; metrics.jsonl has them"
            )

    def _work(self) -> None:
        """Until the end of the run: whatever the tracker raises is kept, counted, and told by the driver."""
        tracker = self._open()
        while not isinstance(row := self.rows.get(), bool):
            try:
                if tracker is None:
                    self.failed += 1
                else:
                    tracker.log(row)
            except (Exception, SystemExit) as error:
                self.failed += 1
                self._keep(error)
        try:
            if tracker is not None:
                tracker.close(row)
        except (Exception, SystemExit) as error:
            self._keep(error)

    def _open(self) -> Tracker | None:
        """Begin in the tracker, which may be busy or away for a moment; meanwhile rows wait."""
        for pause in OPENING_PAUSES_S:
            self.ending.wait(pause)  # who waits for the end does not wait for a tracker that was never there
            try:
                return self.start()
            except (Exception, SystemExit) as error:
                self._keep(error)
        return None

    def _keep(self, error: BaseException) -> None:
        self.error = self.error or f"{type(error).__name__}: {without_secrets(str(error))}"

    def _tell(self) -> None:
        if self.error and not self.said:
            self.said = True
            text = escape(printable(self.error)[:500])
            self.say(
                f"[yellow]note[/] tracker {self.name} failed: {text}. The run goes on, and metrics.jsonl and TensorBoard have "
                "every number; this is said once"
            )


class Trackers:
    """All that a run reports to beside TensorBoard.

    Args:
        feeds: one for each.
    """

    def __init__(self, feeds: Sequence[Feed] = ()) -> None:
        self.feeds = feeds

    def log(self, phase: str, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        """Hand a row of metrics.jsonl over."""
        row = Numbers(phase, step, seconds, {name: float(value) for name, value in values.items() if value is not None})
        for feed in self.feeds:
            feed.put(row)

    def close(self, well: bool) -> None:
        """Send the rest and end."""
        for feed in self.feeds:
            feed.end(well)
        deadline = time.monotonic() + CLOSING_S
        for feed in self.feeds:
            feed.close(deadline)


def open_trackers(config: RunConfig, path: Path, root: Path, say: Callable[[str], None]) -> Trackers:
    """Begin, or go on, in every tracker that the config names.

    Args:
        config: of the run.
        path: of its directory.
        root: of the storage.
        say: tells the user.

    Returns:
        The trackers, which open in their own threads.
    """
    from cluster.tracker_kinds import KINDS

    state, values = State(path / STATE), flat(config.model_dump(mode="json"))

    def start(name: str) -> Tracker:
        tracker = KINDS[name](Beginning(config.name, root / FOLDER, values, state.known(name)))
        state.keep(name, tracker.id)
        return tracker

    names = [name for name in dict.fromkeys(config.report_to) if name != "tensorboard"]
    return Trackers([Feed(name, lambda name=name: start(name), say) for name in names])  # type: ignore[misc]


class State:
    """trackers.json of a run.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()

    def known(self, name: str) -> str | None:
        """The id that a tracker knows the run by, if any."""
        ids = self._read()
        return ids[name] if name in ids else None

    def keep(self, name: str, found: str) -> None:
        """Write an id down, whole or not at all."""
        with self.lock:
            ids = self._read()
            if name not in ids or ids[name] != found:
                write_file(self.path, json.dumps(ids | {name: found}, indent=2) + "\n")

    def _read(self) -> dict[str, str]:
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is no JSON ({error}); remove it, and the trackers begin anew") from error
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError(f"{self.path} must hold an id for each tracker; remove it, and the trackers begin anew")
        return found


def without_secrets(text: str) -> str:
    """A message without passwords in URLs, and without what the environment keeps under a secret's name.

    Args:
        text: of a library's error.
    """
    for name, value in os.environ.items():
        if len(value) >= 6 and SECRET.search(name):
            text = text.replace(value, "***")
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
