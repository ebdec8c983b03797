"""Ranks that lose each other fail soon, and the driver names the one that is to blame."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import ObjectRef

from actors.process import STATUS_GROUP, ProcessSetup
from actors.ranks import Rank
from cluster.cli import main
from cluster.console import Console
from cluster.failures import BadNumbers, RoleFailed
from cluster.roles import Ranked
from cluster.rota import OwnDevices, Process
from cluster.signals import EXIT_TERMINATED, listen
from cluster.waiting import Pending, Waiter
from tokens.guards import BadNumber

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")  # Ray's own


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A cluster of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def pairs_of_ranks(local_ray: None, tmp_path: Path) -> list[Ranked]:
    """Two pairs of ranks that can add numbers, and die."""

    class Adder(Rank):  # defined here, so that Ray's workers get it by value
        def add(self, x: float) -> float:
            import torch

            return float(self.ranks.sum(torch.tensor(x)))

        def complain(self) -> None:
            raise RuntimeError("the other one left")

        def die(self, after_s: float) -> None:
            time.sleep(after_s)
            os._exit(1)

    actor_class = ray.remote(concurrency_groups=STATUS_GROUP, num_cpus=0)(Adder)
    setups = [ProcessSetup(f"learner-{rank}", tmp_path / f"{rank}.log", 1, "cpu", "float32", rank, 2, False) for rank in (0, 1)]
    actors = [[actor_class.remote(setup) for setup in setups] for _ in range(2)]
    return [
        Ranked([Process(actor, ray.get(actor.identity.remote())) for actor in pair], timeout_s, OwnDevices())
        for pair, timeout_s in zip(actors, (60.0, 4.0), strict=True)
    ]


def pending(ranks: Ranked, refs: list[ObjectRef]) -> Pending[Any]:
    names, nodes = zip(*((rank.identity.name, rank.identity.node) for rank in ranks.ranks), strict=True)
    return Pending(tuple(refs), names[: len(refs)], nodes[: len(refs)], lambda answers: answers)


def test_the_one_to_blame_is_named(pairs_of_ranks: list[Ranked], tmp_path: Path) -> None:
    wait = Waiter(Console(), tmp_path, 60)
    for ranks in pairs_of_ranks:
        wait("start", ranks.join(wait("start", ranks.open())))
        first, second = (rank.actor for rank in ranks.ranks)
        assert wait("policy", pending(ranks, [first.add.remote(1.0), second.add.remote(2.5)])) == [3.5, 3.5]

    ranks = pairs_of_ranks[0]
    first, second = (rank.actor for rank in ranks.ranks)
    began = time.monotonic()
    wait.begin("round 3", 3)
    wait.step = 14
    with pytest.raises(RoleFailed, match=rf"{one_of('learner', 1)} failed in round 3, step 14, phase policy: its process died: "):
        wait("policy", pending(ranks, [first.add.remote(1.0), second.die.remote(0.0)]))
    assert time.monotonic() - began < 30, "a closed connection is noticed before the time limit of 60 s"

    ranks = pairs_of_ranks[1]
    first, second = (rank.actor for rank in ranks.ranks)
    with pytest.raises(RoleFailed, match=rf"{one_of('learner', 0)} .* phase policy"):  # its partner lives, and never comes
        wait("policy", pending(ranks, [first.add.remote(1.0)]))
    with pytest.raises(RoleFailed, match=rf"{one_of('learner', 1)} .* its process died"):  # heard of only after the complaint
        wait("policy", pending(ranks, [first.complain.remote(), second.die.remote(1.0)]))


def one_of(role: str, rank: int) -> str:
    """How a message names a process and its machine: by address, host name and Ray's ID."""
    return rf"^{role}-{rank} \(role {role}, rank {rank}\) on node [0-9.]+ \({re.escape(socket.gethostname())}, [0-9a-f]{{8}}\)"


def test_what_a_role_raises_is_in_its_log_and_its_end_is_shown(pairs_of_ranks: list[Ranked], tmp_path: Path) -> None:
    ranks = pairs_of_ranks[0]
    wait = Waiter(Console(), tmp_path / "logs", 60)
    wait.begin("round 2", 2)
    with pytest.raises(RoleFailed) as failed:
        wait("reward", pending(ranks, [ranks.ranks[0].actor.complain.remote()]))
    log = tmp_path / "logs" / "learner-0.log"
    words = rf"{one_of('learner', 0)} failed in round 2, phase reward: RuntimeError: the other one left\. Its log: {log}$"
    assert re.search(words, str(failed.value)) and "\n" not in str(failed.value)
    assert "Traceback" not in failed.value.shown() and "in complain" in failed.value.shown()
    assert failed.value.shown().endswith("RuntimeError: the other one left\n") and failed.value.who == "learner-0"
    text = log.read_text()
    assert "failed in round 2, phase reward" in text and 'raise RuntimeError("the other one left")' in text

    class Broken:
        def __init__(self) -> None:
            raise ValueError("no")

        def identity(self) -> None:
            pass

    broken = ray.remote(num_cpus=0)(Broken).remote()
    with pytest.raises(
        RoleFailed, match=r"^scorer-0 \(role scorer, rank 0\) on node [0-9.]+ failed .* its process died: ValueError: no"
    ):
        wait("start_roles", Pending((broken.identity.remote(),), ("scorer-0",), ("",), list))
    assert "in __init__" in (tmp_path / "logs" / "scorer-0.log").read_text()


def test_a_number_that_only_all_answers_show_is_told_in_the_name_of_one_who_answered(local_ray: None, tmp_path: Path) -> None:
    def found(answers: list[float]) -> None:
        raise BadNumber("the mean of all shares", sum(answers))

    wait = Waiter(Console(), tmp_path / "logs", 60)
    wait.begin("round 2", 2)
    shares = Pending((ray.put(1.0), ray.put(math.inf)), ("scorer-0", "scorer-1"), ("", ""), found)
    with pytest.raises(BadNumbers, match=r"^scorer-1 .* failed in round 2, phase score: .*the mean of all shares is inf") as told:
        wait("score", shares)
    assert told.value.bad.value == math.inf and told.value.who == "scorer-1"


@pytest.fixture
def terminable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM as the application takes it; afterwards none has come."""
    monkeypatch.setattr("cluster.signals._received", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_termination_that_a_finalizer_swallowed_ends_the_next_wait(local_ray: None, terminable: None, tmp_path: Path) -> None:
    wait, work = Waiter(Console(), tmp_path, 60), Pending((ray.put(1),), ("learner-0",), ("node",), lambda answers: answers)
    assert wait("policy", work) == [1]
    with contextlib.suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        wait("policy", work)
    assert ended.value.code == EXIT_TERMINATED


def test_the_exit_code_of_a_termination_is_not_the_one_that_ray_makes_of_it(
    local_ray: None, terminable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(num_cpus=0)
    def terminate_me(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("cluster.cli._keys", lambda: ray.get(terminate_me.remote(os.getpid())))
    assert main(["keys"]) == EXIT_TERMINATED
