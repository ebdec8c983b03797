"""Trackers: what they are told, that they go on where they were, and that one that fails neither ends nor slows the run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import trackers
from cluster.cli import main
from cluster.config import RunConfig
from cluster.metrics import Metrics
from cluster.telemetry import Telemetry
from cluster.trackers import Beginning, Feed, Numbers, State, Trackers, check_trackers, open_trackers, without_secrets
from tests.cluster.command import SECRETS, TINY
from tokens.errors import UserError

CONFIG = RunConfig(name="tracked", report_to=("trackio", "tensorboard"))


class Made:
    """A tracker that keeps what it is told."""

    def __init__(self, begin: Beginning | None = None) -> None:
        self.id = (begin.known if begin else None) or "made-1"
        self.begin, self.rows, self.ended = begin, list[Numbers](), list[bool]()

    def log(self, row: Numbers) -> None:
        self.rows.append(row)

    def close(self, well: bool) -> None:
        self.ended.append(well)


def row(step: int) -> tuple[str, int, float, dict[str, float | None]]:
    return "policy", step, 1.5, {"policy/kl": 0.5 * step, "policy/gold": None}


def test_a_tracker_gets_every_number_in_order_and_the_end() -> None:
    made, said = Made(), list[str]()
    feeds = Trackers([Feed("made", lambda: made, said.append)])
    for step in range(100):
        feeds.log(*row(step))
    feeds.close(well=True)
    assert [r.step for r in made.rows] == list(range(100))
    assert made.rows[3] == Numbers("policy", 3, 1.5, {"policy/kl": 1.5})  # what is null is left out
    assert made.ended == [True] and said == []


class Failing(Made):
    """Fails at every second row, and at the end."""

    def log(self, row: Numbers) -> None:
        super().log(row)
        if row.step % 2:
            raise ConnectionError(f"no way to https://ann:hunter2@tracker.example/api for step {row.step}")

    def close(self, well: bool) -> None:
        raise SystemExit("cannot end")


def test_one_that_fails_is_told_once_and_counted() -> None:
    made, said = Failing(), list[str]()
    feeds = Trackers([Feed("made", lambda: made, said.append)])
    for step in range(10):
        feeds.log(*row(step))
    feeds.close(well=True)
    assert len(made.rows) == 10  # it is tried again with every row
    assert [("failed" in text, "lacks 5 rows" in text) for text in said] == [(True, False), (False, True)]
    assert "ConnectionError: no way to https://***@tracker.example/api for step 1" in said[0]


def test_one_that_is_away_for_a_moment_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "OPENING_PAUSES_S", (0.0, 0.01))
    made, said, there = Made(), list[str](), iter((False, True))

    def start() -> Made:
        if next(there):
            return made
        raise TimeoutError("not yet")

    feeds = Trackers([Feed("made", start, said.append)])
    for step in range(3):
        feeds.log(*row(step))
    feeds.close(well=True)
    assert [r.step for r in made.rows] == [0, 1, 2] and made.ended == [True]
    assert len(said) == 1 and "TimeoutError: not yet" in said[0]


def test_one_that_cannot_be_opened_is_told_and_all_rows_are_counted() -> None:
    def start() -> Made:
        raise OSError("disk [full]")

    said = list[str]()
    feeds = Trackers([Feed("made", start, said.append)])
    for step in range(3):
        feeds.log(*row(step))
    feeds.close(well=False)
    assert "OSError: disk \\[full]" in said[0]  # no markup of the console's
    assert "lacks 3 rows" in said[1] and len(said) == 2


class Silent(Made):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def log(self, row: Numbers) -> None:
        self.answer.wait(60)


def test_one_that_never_answers_slows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 50)
    monkeypatch.setattr(trackers, "CLOSING_S", 0.2)
    silent, said = Silent(), list[str]()
    feeds = Trackers([Feed("made", lambda: silent, said.append)])
    began = time.perf_counter()
    for step in range(1000):
        feeds.log(*row(step))
    feeds.close(well=True)
    assert time.perf_counter() - began < 10
    assert "has not answered within 0.2 s of the end" in said[0]
    lost = int(said[1].split("lacks ")[1].split(" rows")[0])
    assert 998 <= lost + 1 <= 1000  # all but what it took, and hangs in
    silent.answer.set()


def opened(config: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Beginning], Any] = Made) -> list[Any]:
    """The trackers of a run that has begun and ended."""
    made: list[Any] = []

    def start(begin: Beginning) -> Any:
        made.append(kind(begin))
        return made[-1]

    monkeypatch.setattr("cluster.tracker_kinds.KINDS", dict.fromkeys(("wandb", "mlflow", "trackio"), start))
    found = open_trackers(config, run, run.parent, lambda text: pytest.fail(text))
    found.close(well=True)
    return made


def test_a_run_that_goes_on_is_known_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (first,) = opened(CONFIG, run, monkeypatch)
    assert first.begin.known is None
    assert first.begin.folder == tmp_path / "trackers"
    assert first.begin.config["policy.kl.coef"] == 0.05 and first.begin.config["name"] == "tracked"
    assert json.loads((run / "trackers.json").read_text()) == {"trackio": "made-1"}
    (run / "trackers.json").write_text('{"trackio": "older", "wandb": "w"}')
    (second,) = opened(CONFIG, run, monkeypatch)
    assert second.begin.known == "older"
    assert json.loads((run / "trackers.json").read_text()) == {"trackio": "older", "wandb": "w"}
    assert opened(CONFIG.model_copy(update={"report_to": ("tensorboard",)}), run, monkeypatch) == []


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ('["a"]', "must hold an id"), ('{"a": 1}', "must hold an id")]
)
def test_a_damaged_state_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*the trackers begin anew"):
        State(tmp_path / "trackers.json").known("wandb")


def test_metrics_report_what_they_write(tmp_path: Path) -> None:
    made = Made()
    metrics = Metrics(tmp_path, 4, Telemetry("tracked", {}), trackers=Trackers([Feed("made", lambda: made, pytest.fail)]))
    metrics.evaluation(-1, {"gold": 0.25, "win": None, "judge": "gold"})
    metrics.evaluation(1, {"gold": 0.5, "win": 0.75, "judge": "gold"})
    metrics.guard(1, 2, {"undone": 1}, {"what": "words"})
    metrics.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r.phase, r.step, dict(r.values)) for r in made.rows] == [
        ("evaluation", -1, {"evaluation/gold": 0.25}),
        ("evaluation", 1, {"evaluation/gold": 0.5, "evaluation/win": 0.75}),
        ("guard", 6, {"guard/undone": 1.0}),
    ]
    assert [r.seconds for r in made.rows] == [line["time"] for line in written]
    assert made.ended == [True]


def test_a_run_that_ends_by_an_error_ends_so_in_its_trackers(tmp_path: Path) -> None:
    made = Made()
    metrics = Metrics(tmp_path, 4, Telemetry("tracked", {}), trackers=Trackers([Feed("made", lambda: made, pytest.fail)]))
    with pytest.raises(RuntimeError), contextlib.closing(metrics):
        raise RuntimeError("oh")
    assert made.ended == [False]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb>="), ("mlflow", "mlflow>="), ("trackio", "trackio>=")])
def test_one_that_is_not_installed_is_refused_before_anything_starts(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: None if one == name else real(one, *more))
    monkeypatch.setattr("cluster.run.connected", lambda *_: pytest.fail("started"))
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path / "storage"))
    assert main(["run", str(TINY), "--report_to", f"[{name}]"]) == 2
    told = capsys.readouterr().err
    assert f"report_to names {name}, and {name}" in told and f"pip install '{package}" in told
    assert not (tmp_path / "storage").exists()


def test_mlflow_without_a_server_needs_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: None if one == "sqlalchemy" else object())
    config = RunConfig(name="tracked", report_to=("mlflow",))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="report_to names mlflow, and sqlalchemy cannot be imported"):
        check_trackers(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.example")
    check_trackers(config)


def test_an_unknown_tracker_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--report_to", "[comet]"]) == 2
    told = capsys.readouterr().err
    assert "report_to" in told and "'wandb'" in told and "comet" in told


def test_no_secret_of_the_environment_is_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
        if trackers.SECRET.search(name):
            assert without_secrets(f"401 for {secret}, asked {name}") == f"401 for ***, asked {name}"
    assert without_secrets("http://host:5000/api and a@b") == "http://host:5000/api and a@b"


LIBRARIES = [
    "trackio",
    pytest.param("wandb", marks=pytest.mark.slow),  # not in the lock: `make test-all`, where it is installed
    pytest.param("mlflow", marks=pytest.mark.slow),
]


def drawn(name: str, tmp_path: Path) -> list[tuple[int, float]]:
    """(step, policy/kl) as the tracker itself has them."""
    if name == "trackio":
        (file,) = (tmp_path / "trackio").glob("rondo.db")
        with sqlite3.connect(file) as database:
            rows = database.execute("select step, metrics from metrics order by id").fetchall()
        return [(step, json.loads(found)["policy/kl"]) for step, found in rows if "policy/kl" in json.loads(found)]
    if name == "mlflow":
        with sqlite3.connect(tmp_path / "trackers" / "mlflow.db") as database:
            found = database.execute("select step, value from metrics where key = 'policy/kl' order by step").fetchall()
        return [(int(step), float(value)) for step, value in found]
    found = []
    for file in sorted((tmp_path / "trackers" / "wandb").glob("offline-run-*/*.wandb")):  # protocol buffers, not compressed
        values, steps = (re.findall(key + rb"\x82\x01.([0-9.]+)", file.read_bytes()) for key in (b"policy/kl", b"step/policy"))
        found += [(int(step), float(value)) for step, value in zip(steps, values, strict=True)]
    return list(dict.fromkeys(found))  # a point stands there as history and as a request


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("default")  # what a library warns of itself is not ours to mend
def test_the_real_library_keeps_the_numbers_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip(name)
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    run = tmp_path / "run"
    run.mkdir()
    config, said = RunConfig(name="tracked", report_to=(name,)), list[str]()  # type: ignore[arg-type]
    check_trackers(config)
    monkeypatch.setattr(trackers, "CLOSING_S", 120.0)  # a busy machine imports slowly
    ids = []
    for steps in (range(3), range(3, 5)):  # the second time it goes on
        found = open_trackers(config, run, tmp_path, said.append)
        found.log("evaluation", -1, 1.0, {"evaluation/gold": 0.25, "evaluation/win": None})
        for step in steps:
            found.log(*row(step))
        found.log("reward", 40, 2.0, {"reward/J": math.pi})
        found.close(well=True)
        ids.append(json.loads((run / "trackers.json").read_text())[name])
    assert said == []
    assert ids[0] == ids[1]
    assert drawn(name, tmp_path) == [(step, 0.5 * step) for step in range(5)]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"policy.kl.coef" in written  # the config
    printed = "".join(capsys.readouterr())
    for secret in SECRETS.values():
        assert secret.encode() not in written and secret not in printed
