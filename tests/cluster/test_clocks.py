"""Nothing that a run comes to goes by the wall clock: it may jump, or be wrong on one machine. It is written down for people."""

from __future__ import annotations

import ast
import itertools
import json
import os
import time
from pathlib import Path

import pytest

from cluster.load_config import load_config
from cluster.run_directory import RunDirectory
from cluster.timeline import Timeline
from cluster.waiting import Room
from evaluation.timeline import DRIVER, Span, read_timeline, window
from tests.cluster.command import ROOT, TINY
from tests.cluster.judged import JUDGED
from tokens.errors import UserError

FOLDERS = ("tokens", "rm", "policy", "preferences", "evaluation", "sandbox", "actors", "cluster")
WALL = {"time.time", "time.time_ns", "datetime.datetime.now", "datetime.now", "datetime.datetime.utcnow", "os.path.getmtime"}
MAY_READ = {
    "actors/pool.py": "when engines came, worked and went, for the timeline; and as cluster/notices.py",
    "cluster/metrics.py": "when a number was written",
    "cluster/notices.py": "in words, how long a machine that will be taken away still has",
    "cluster/run_directory.py": "when a round was committed",
    "cluster/waiting.py": "when work began and ended, for the timeline",
}


def wall_clock_in(source: str) -> set[str]:
    """What a source reads the wall clock, or a file's time, by."""
    tree = ast.parse(source)
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return (names & WALL) | {name for name in names if name.endswith((".st_mtime", ".st_ctime", ".st_atime"))}


def test_only_a_few_read_the_clock() -> None:
    found = {
        str(path.relative_to(ROOT)): clocks
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (clocks := wall_clock_in(path.read_text()))
    }
    assert found.keys() == MAY_READ.keys(), found
    assert wall_clock_in("import time\nx = time.time()\ny = path.stat().st_mtime") == {"time.time", "path.stat().st_mtime"}


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is an hour ahead at one look and an hour behind at the next."""
    hours = itertools.cycle((3600.0, -3600.0))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + next(hours))


def test_a_wait_for_room_ends_by_its_own_time(jumping_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("cluster.waiting.ray.available_resources", dict)
    room = Room(said.append, {"CPU": 1.0}, 100.0)
    for _ in range(4):
        room.look(waiting=True)  # an hour later by the clock, no time by itself
    assert said == []
    short = Room(said.append, {"CPU": 1.0}, 0.05)
    time.sleep(0.1)
    with pytest.raises(UserError, match=r"wait_limit_s = 0\.05"):
        short.look(waiting=True)


def test_a_timeline_of_a_clock_that_jumped_can_be_read(tmp_path: Path) -> None:
    write = Timeline(tmp_path)
    for step, (start, end) in enumerate(((1000.0, 1001.0), (4601.0, 4602.0), (1002.0, 1003.0), (5000.0, 1400.0))):
        write(Span("sample", "rollout-0", 0, step, start, end))
        write(Span("sample", DRIVER, 0, step, start, end))
    write.close()
    spans = read_timeline(tmp_path / "timeline.jsonl")
    assert len(spans) == 8 and {span.step for span in window(spans, 4)} <= {0, 1, 2, 3}


def test_a_run_continues_whatever_its_files_times_say(tmp_path: Path) -> None:
    config = load_config(TINY, ["--storage", str(tmp_path)])
    with RunDirectory(config).open() as run:
        with run.draft(run.start_path) as draft:
            (draft / "x").write_text("kept")
            run.commit_start(draft, {**JUDGED, "committed": True})
        with run.draft(run.round_path(0)) as draft:
            run.commit_round(draft, {**JUDGED, "round": 0, "committed_at": "2999-01-01T00:00:00+00:00"})
    for file in (run.path, *run.path.rglob("*")):
        os.utime(file, (32_503_680_000, 32_503_680_000))  # in the year 3000
    with RunDirectory(config).open() as again:
        assert again.num_committed == 1 and (again.start_path / "x").read_text() == "kept"
        with again.draft(again.round_path(1)) as draft:
            again.commit_round(draft, {**JUDGED, "round": 1, "committed_at": "1970-01-01T00:00:00+00:00"})
    assert [entry["round"] for entry in json.loads((run.path / "ledger.json").read_text())["rounds"]] == [0, 1]
