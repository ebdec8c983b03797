"""The smallest part of the fault matrix (``make chaos`` plays all of it): one run that is killed, torn and starved of room."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.faults import numbers
from benchmarks.faults.cells import CELLS, listed
from benchmarks.faults.drivers import cut_checkpoint
from benchmarks.faults.inject import kill, kill_frozen
from benchmarks.faults.invariants import complete, nothing_left, same_bits, shared_memory, whole
from benchmarks.faults.monkey import plan
from benchmarks.faults.nodes import Node, Nodes
from benchmarks.faults.observer import Observer
from benchmarks.faults.play import Run
from benchmarks.faults.record import Outcome
from benchmarks.faults.strikes import Strike, Struck, after, redone, strike, told, writing
from benchmarks.faults.writes import STATE_BYTES, Kept, kill_writes, write_state
from cluster.load_config import load_config
from tests.cluster.command import TINY, Command

NAME = "faulty"
LIMIT_S = 12
"""How long a successor may take."""
ROUNDS = ("--rounds.num_rounds", "4", "--rounds.checkpoint_every", "1", "--rounds.keep_rollouts", "true")
KILLED = (
    Strike("F13", "reward-0", writing(".reward.*.partial/*"), kill_frozen),
    Strike("F1", "rollout-0", after("score"), kill),
    Strike("F7", "rollout-0", lambda run: run.until_waited("sync", 0, 0), kill_frozen),
)


@dataclass
class Smoke:
    """What was seen of the two starts of the run.

    Args:
        struck: processes that were killed in the first one.
        first: the start that was killed after a line of its journal.
        second: the one that went on, until there was no room left.
        ended_s: it took to end then.
        wrong: what came of a loss that was NaN.
        refused: what another driver said meanwhile, and its exit code.
        left: of the run in the cluster, after both.
    """

    struck: list[Struck]
    first: Run
    second: Run
    ended_s: float
    wrong: Outcome
    refused: tuple[str, int]
    left: list[str]


def half_done(run: Run, index: int) -> Path:
    """What is there once the first of a round's two steps is saved; what is left of the round takes half a second then."""
    return run.draft(index) / "after_0001_steps" / "manifest.json"


def first_start(run: Run, orders: Path) -> list[Struck]:
    """Processes are killed, then the driver, in the middle of the second round."""
    taken = orders / "learner-0.taken"
    (orders / "learner-0").write_text(f"hold {half_done(run, 1)}")
    struck = [strike(run, each) for each in KILLED]
    run.until(taken.exists, 300, "a saved step of round 1")
    run.kill()
    run.end()
    return struck


def second_start(run: Run, node: Node, orders: Path) -> tuple[Outcome, float]:
    """A loss is NaN in the second step of the third round; in the middle of the fourth the node is lost.

    Returns:
        What came of the former, and how long the run lasted after the latter, s.
    """
    taken = orders / "scorer-0.taken"
    (orders / "scorer-0").write_text(f"hold {half_done(run, 3)}")
    nan = numbers.Wrong("F30", "learner-0", f"nan {half_done(run, 2)}", lambda run: run.until_said("older state"), numbers.OUT)
    wrong = numbers.go_wrong(run, nan, orders)
    run.until(taken.exists, 300, "a saved step of round 3")
    node.kill()
    killed = time.time()
    run.end()
    return wrong, time.time() - killed


def play(nodes: Nodes, node: Node, storage: Path, orders: Path) -> Smoke:
    """Both starts, and what is done to them."""
    arguments = [str(TINY), *ROUNDS]
    with Observer(nodes) as observer:
        shared = shared_memory()
        with Run(nodes, storage, NAME, arguments) as first:
            first.until_said("Rondo")
            with Run(nodes, storage, NAME, arguments) as other:
                code = other.end()
            struck = first_start(first, orders)
        cut_checkpoint(first.draft(1))
        with Run(nodes, storage, NAME, [*arguments, "--faults.restart_s", str(LIMIT_S)]) as second:
            wrong, ended_s = second_start(second, node, orders)
        left = nothing_left(nodes, observer, shared, second)
    return Smoke(struck, first, second, ended_s, wrong, (other.output(), code), left)


class Hanging(Kept):
    """Writes that never end once the process was forked."""

    def save(self, place: Path, number: int) -> None:
        self.state[0] = 1
        if number > 2:
            time.sleep(60)
        write_state(place, number)


@pytest.fixture(scope="module")
def smoke(tiny_run: tuple[Path, object], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smoke]:
    orders = tmp_path_factory.mktemp("orders")
    with Nodes(numbers.variables(orders)) as nodes:
        yield play(nodes, nodes.add("all", 1), command.storage, orders)


def test_processes_that_are_killed_come_back(smoke: Smoke) -> None:
    """F1, F7, F13: an engine that is idle, an engine that samples, a trainer that writes its model."""
    for each in smoke.struck:
        rows = told(smoke.first, each)
        assert [row["event"] for row in rows] == ["lost", "back"], each
        assert each.recovered_s is not None and rows[1]["faults/recovery_seconds"] >= rows[1]["faults/start_seconds"] > 0


def test_what_the_survivor_learned_is_what_an_undisturbed_run_learns(smoke: Smoke, tiny_run: tuple[Path, object]) -> None:
    """F11, F44: the driver killed behind a line of its journal, its last checkpoint cut in half."""
    assert smoke.second.when("older state") is not None, smoke.second.output()
    assert same_bits(smoke.second.path, tiny_run[0], rounds=[0, 1]) == []


def test_each_step_and_each_sample_is_there_once(smoke: Smoke) -> None:
    config = load_config(TINY, ["--name", NAME, *ROUNDS, "--rounds.num_rounds", "3"])
    assert complete(smoke.second.path, config) == []
    assert [words for words in whole(smoke.second.path) if "partial" not in words] == [], "the fourth round is a draft"


def test_a_loss_that_is_not_a_number_costs_its_step(smoke: Smoke) -> None:
    """F30."""
    assert "step 1" in smoke.wrong.note and smoke.wrong.recovered_s is not None, smoke.wrong
    rows = [row for row in smoke.second.metrics.read() if row["phase"] == "policy" and row["round"] == 2]
    assert [row["step"] for row in rows] == [0]


def test_without_room_for_another_process_the_run_ends_and_says_so(smoke: Smoke) -> None:
    """F53: its only node is lost."""
    assert smoke.second.process.returncode in (1, 2)
    assert smoke.second.when("faults.restart_s = 12 s") is not None, smoke.second.output()
    assert smoke.ended_s < LIMIT_S + 60
    assert smoke.left == []


def test_a_second_driver_is_refused(smoke: Smoke) -> None:
    """F54."""
    said, code = smoke.refused
    assert code == 2 and "another driver is running" in said


def test_every_cell_of_the_matrix_is_declared() -> None:
    assert list(CELLS) == [f"F{number}" for number in range(1, 57)]
    assert all(bool(cell.scenario) != bool(cell.why_not) for cell in CELLS.values())
    assert listed("F7, F1") == ["F7", "F1"] and listed("") == list(CELLS)
    with pytest.raises(ValueError, match="no cell 'F57'"):
        listed("F57")


def test_a_seed_is_the_same_faults_each_time() -> None:
    assert [plan(seed) for seed in range(20)] == [plan(seed) for seed in range(20)]
    assert len({plan(seed) for seed in range(20)}) == 20
    assert {each.how for seed in range(20) for each in plan(seed)} == {"kill", "kill frozen", "lose the node"}


def test_work_done_again_is_put_down_to_the_loss_that_took_the_round_back() -> None:
    """An engine dies while a learner's successor replays: the steps are not the engine's doing."""
    work = [("policy", "learner-0", 0), ("sync", "rollout-0", 0), ("policy", "learner-0", 1)]
    spans = [
        {"what": what, "who": who, "round": 0, "step": step, "start": at, "end": at + 0.5}
        for at, (what, who, step) in enumerate([*work, *work, ("sample", "rollout-0", 2)])
    ]
    struck = [
        Struck(Strike("F4", "learner-0", lambda run: None), 2.8, 0.1, 1.0, ""),
        Struck(Strike("F1", "rollout-0", lambda run: None), 3.6, 0.1, 1.0, ""),
        Struck(Strike("F3", "reward-0", lambda run: None), 5.7, 0.1, 1.0, ""),
    ]
    assert redone(spans, struck) == [
        "policy of step 0, sync of step 0, policy of step 1", "what was under way", "what was under way",
    ]  # fmt: skip


def test_kills_that_hit_a_process_that_does_nothing_are_not_counted(tmp_path: Path) -> None:
    with mmap.mmap(-1, STATE_BYTES) as state, pytest.raises(RuntimeError, match="no write came through"):
        kill_writes(Hanging(tmp_path / "draft", state), 2, random.Random(0))
