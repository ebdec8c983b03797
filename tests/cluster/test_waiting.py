"""Waiting that talks: work that queues for room is not late, work that has begun and says nothing is."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from rich.console import Console as RichConsole

from actors.board import Board
from actors.config import Share
from actors.process import Progress
from cluster import waiting
from cluster.console import Console
from cluster.failures import RoleFailed
from cluster.load_config import load_config
from cluster.model_sizes import model_size
from cluster.plan import bundles
from cluster.stage import Stage
from cluster.strength_scores import _polled, _stopper, refuse_constant_fold
from cluster.waiting import Pending, Room, Waiter
from preferences.strength import write_strengths
from tests.actors.test_labels import CASES, SPOT
from tests.cluster.command import TINY
from tokens.errors import UserError

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)


def test_a_room_says_what_is_short_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    room = Room(lines.append, {"CPU": 2.0, "GPU": 1.0}, 100.0)
    for now[0] in (1.0, 29.0, 31.0, 32.0):
        room.look(waiting=True)
    assert lines == ["  waiting for the cluster (31 s): 2 CPU asked, 0.5 free, 1 GPU asked, 0 free"]
    now[0] = 90.0
    room.look(waiting=False)
    for now[0] in (100.0, 189.0):  # the wait began again at 90 s
        room.look(waiting=True)
    assert len(lines) == 2 and "(99 s)" in lines[1]
    now[0] = 190.0
    with pytest.raises(UserError, match=r"no room within resources\.wait_limit_s = 100 s: 2 CPU asked, 0\.5 free, 1 GPU"):
        room.look(waiting=True)


@ray.remote(num_cpus=1)
def work(board: Any, name: str, quiet_s: float) -> str:
    board.tick.remote(name, 0)
    time.sleep(quiet_s)
    ray.get(board.end.remote(name))
    return name


@pytest.fixture(scope="module")
def machine() -> Iterator[None]:
    """A cluster with one CPU."""
    ray.init(address="local", num_cpus=1, labels=SPOT, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=1)
class Holder:
    """Takes the one CPU."""

    def here(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cluster.console.time.perf_counter", lambda: now[0])
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), width=140, soft_wrap=True)
    with console.bar("reward model", "pairs") as bar:
        for now[0] in (100.5, 104.0, 109.9):
            bar.show([Progress(20, 160, "pairs")])
        assert console.rich.file.getvalue() == "", "a short phase has one line, at its end"
        for now[0] in (110.5, 111.0, 119.0):
            bar.show([Progress(20, 80, "pairs"), Progress(20, 80, "pairs")])
        now[0] = 121.0
        bar.show([])
        now[0] = 124.0
    lines = console.rich.file.getvalue().splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "… reward model 10 s 40 of 160 pairs (25%), 3.8 pairs/s, 32 s left",
        "… reward model 21 s 40 of 160 pairs (25%), 1.9 pairs/s, 63 s left",
        "✓ reward model 24.0 s 40 pairs, 1.7 pairs/s",
    ]


def test_ray_picks_the_nodes_that_our_arithmetic_picks(machine: None) -> None:
    groups = [placement_group([{"CPU": 0.01}], bundle_label_selector=[Share(labels=selector).labels]) for selector, _ in CASES]
    try:
        wanted = [yes for _, yes in CASES]
        for group, yes in zip(groups, wanted, strict=True):
            assert group.wait(30) if yes else True
        placed = [placement_group_table(group)["state"] == "CREATED" for group in groups]  # those that wait were asked for first
        assert placed == wanted
    finally:
        for group in groups:
            remove_placement_group(group)


def test_a_run_that_waits_says_for_which_bundles(machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SAY_EVERY_S", 0.5)
    labels = ["--resources.learner.labels.pool", "trainer", "--resources.scorer.num_cpus", "2", "--resources.wait_limit_s", "2"]
    config = load_config(TINY, labels)
    lines: list[str] = []
    stage = Stage(config, bundles(config, model_size(config)), tmp_path, lines.append, fixed=False)
    try:
        with pytest.raises(UserError, match=r"no room within resources\.wait_limit_s = 2 s: scorer-0 needs 2 CPU"):
            stage.wait_for_room()
    finally:
        stage.close()
    assert "scorer-0 needs 2 CPU; the largest free node has 0.5 CPU left of 1 CPU" in lines[0]
    assert "learner-0 needs 0.25 CPU on pool=trainer; no node has these labels" in lines[0]
    assert lines[0].endswith("This cluster has no autoscaler: it waits for nodes that somebody adds"), (
        "and no error: one may come"
    )


def test_queueing_is_not_lateness(machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SAY_EVERY_S", 1.0)
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), width=140, soft_wrap=True)
    board_class: Any = Board
    holder = Holder.remote()
    assert ray.get(holder.here.remote())
    board = board_class.remote({"a": 1})
    free = threading.Timer(4.0, lambda: ray.kill(holder))
    free.start()
    wait = Waiter(console, tmp_path, 2.0)

    def pending(name: str, quiet_s: float, limit_s: float | None = None) -> Pending[list[str]]:
        ref = work.options(name=name).remote(board, name, quiet_s)
        return Pending((ref,), (name,), ("",), list, (board,), room=Room(console.say, {"CPU": 1.0}, limit_s), log="shared")

    with console.bar("wait") as bar:
        assert wait("train", pending("a", 0.0), bar) == ["a"], "it waited 4 s for room, twice the deadline"
        assert "waiting for the cluster (1 s): 1 CPU asked, 0 free" in console.rich.file.getvalue()
        with pytest.raises(RoleFailed, match=r"^a failed in start, phase train: no progress for 2 s .*/shared\.log$"):
            wait("train", pending("a", 8.0), bar)
        board = board_class.remote({"b": 1})  # a's task still holds the CPU
        with pytest.raises(UserError, match=r"resources\.wait_limit_s = 1 s: 1 CPU asked, 0 free"):
            wait("train", pending("b", 0.0, 1.0), bar)


def test_rows_are_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.strength_scores.POLL_S", 0.05)
    closed = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield {"part": 0}
            time.sleep(0.3)
            yield {"part": 1}
            raise OSError("broken")
        finally:
            closed.set()

    seen: list[dict[str, Any] | None] = []
    with pytest.raises(OSError, match="broken"):
        seen.extend(_polled(rows, 2, lambda: None))
    assert [row for row in seen if row] == [{"part": 0}, {"part": 1}] and seen.count(None) >= 2

    def endless() -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {"part": 0}
        finally:
            closed.set()

    closed.clear()
    polled = _polled(endless, 2, lambda: None)
    assert next(polled) == {"part": 0}
    polled.close()
    assert closed.is_set() and not _fetching(), "nobody reads, so nothing is fetched any more"


@pytest.mark.parametrize("number", [0, 1])
def test_who_leaves_rows_that_do_not_come_stops_them(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.strength_scores.POLL_S", 0.05)
    stopped = threading.Event()

    def silent() -> Iterator[dict[str, Any]]:
        yield from [{"part": 0}] * number
        stopped.wait()

    polled = _polled(silent, 2, stopped.set)
    assert next(polled) == ({"part": 0} if number else None)
    with pytest.raises(UserError, match="refused"):
        polled.throw(UserError("refused"))
    assert stopped.is_set() and not _fetching(), "no thread is left that could ask Ray after its end"


def test_a_pool_of_ray_data_that_gets_no_room_is_ended(machine: None) -> None:
    from ray.data import ActorPoolStrategy

    holder = Holder.remote()
    assert ray.get(holder.here.remote())
    rows = ray.data.from_items([{"part": 0}]).map_batches(Never, compute=ActorPoolStrategy(size=1), num_cpus=1)
    polled = _polled(rows.iter_rows, 2, _stopper(rows))
    assert next(polled) is None and _fetching()
    began = time.monotonic()
    polled.close()
    assert time.monotonic() - began < 20 and not _fetching()
    ray.kill(holder)


class Never:
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("it has no room")


def _fetching() -> bool:
    return any(thread.name == "scores" or "StreamingExecutor" in thread.name for thread in threading.enumerate())


def test_a_member_that_is_dead_in_one_fold_is_found(tmp_path: Path) -> None:
    def write(part: int, chosen: np.ndarray) -> None:
        texts = [f"{part} {i}" for i in range(len(chosen))]
        table = pa.table({name: [f"{name} {text}" for text in texts] for name in ("id", "prompt", "chosen", "rejected")})
        identity = {"split": "train", "source": "made", "fingerprint": "f"}
        write_strengths(tmp_path, part, table, chosen, np.zeros_like(chosen), **identity)

    rng = np.random.default_rng(0)
    for part in (0, 1, 2):
        write(part, rng.normal(size=(4, 2)))
    refuse_constant_fold(tmp_path, (0, 1), 0)
    dead = rng.normal(size=(4, 2))
    dead[:, 1] = 0.0
    write(3, dead)
    write(4, dead)
    refuse_constant_fold(tmp_path, (2, 3), 1)
    with pytest.raises(UserError, match=r"fold 2: member 1 gives every response the score 0"):
        refuse_constant_fold(tmp_path, (3, 4), 2)
    refuse_constant_fold(tmp_path, (), 3)
