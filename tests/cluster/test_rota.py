"""Roles that share a device: who rests before whom works, on real Ray with processes that hold nothing but a diary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.process import STATUS_GROUP, Identity
from actors.transfer import EngineClient
from cluster.console import Console
from cluster.failures import RoleFailed
from cluster.rota import PARTS, OwnDevices, Process, SharedDevice
from cluster.waiting import Pending, Waiter

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
NUMBERS = {"rollout": 1, "reward": 1, "scorer": 1, "learner": 2}


@pytest.fixture(scope="module")
def machine() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def diary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes write into."""
    path = tmp_path_factory.mktemp("rota") / "diary"
    path.touch()
    return path


@pytest.fixture(scope="module")
def processes(machine: None, diary: Path) -> dict[str, list[Process]]:
    """One process for each role and two for the learner; they are slow to leave."""

    class Sleeper:  # defined here, so that Ray's workers get it by value
        def __init__(self, name: str) -> None:
            self.name, self.broken = name, False

        def note(self, what: str) -> None:
            with diary.open("a") as file:
                file.write(f"{self.name} {what}\n")

        def rest(self, parts: tuple[str, ...]) -> None:
            time.sleep(0.2)
            if self.broken:
                raise MemoryError("no room on the host")
            self.note(f"rests {'+'.join(parts)}")

        def wake(self, parts: tuple[str, ...], *rested: None) -> None:
            self.note(f"wakes {'+'.join(parts)}")

        def work(self, answer: int) -> int:
            self.note("works")
            return answer

        def set_broken(self, broken: bool) -> None:
            self.broken = broken

        def num_workers(self) -> int:
            return 2

        def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
            self.note(str(sorted(info.items())))

    actor_class = ray.remote(concurrency_groups=STATUS_GROUP, num_cpus=0)(Sleeper)
    names = {role: [f"{role}-{i}" for i in range(number)] for role, number in NUMBERS.items()}
    return {role: [Process(actor_class.remote(n), Identity(n, 0, "node")) for n in found] for role, found in names.items()}


def work(rota: SharedDevice | OwnDevices, processes: dict[str, list[Process]], role: str) -> Pending[list[int]]:
    """As the handles submit it."""
    moves = rota.turn(role)
    refs = tuple(process.actor.work.remote(i) for i, process in enumerate(processes[role]))
    names = tuple(process.identity.name for process in processes[role])
    return moves.before(Pending(refs, names, ("node",) * len(refs), list))


def read(diary: Path) -> list[str]:
    lines = diary.read_text().splitlines()
    diary.write_text("")
    return lines


def test_before_one_works_the_others_rest(processes: dict[str, list[Process]], diary: Path, tmp_path: Path) -> None:
    rota, wait = SharedDevice(processes), Waiter(Console(), tmp_path, 60)
    pending = work(rota, processes, "learner")  # engines are made awake
    assert wait("policy", pending) == [0, 1], "answers of the work alone, of both ranks"
    lines = read(diary)
    assert lines[0] == "rollout-0 rests weights+kv_cache" and len(lines) == 5
    for rank in (0, 1):
        own = [line for line in lines if line.startswith(f"learner-{rank}")]
        assert own == [f"learner-{rank} wakes policy+training", f"learner-{rank} works"]

    assert wait("policy", work(rota, processes, "learner")) == [0, 1]
    assert sorted(read(diary)) == ["learner-0 works", "learner-1 works"], "nobody moves who is in his place"

    scored, sampled = work(rota, processes, "scorer"), work(rota, processes, "rollout")  # both submitted before either is done
    assert wait("score", scored) == [0] and wait("sample", sampled) == [0]
    lines = read(diary)
    assert sorted(lines[:2]) == ["learner-0 rests policy+training", "learner-1 rests policy+training"]
    assert lines[2:] == [
        "scorer-0 wakes members",
        "scorer-0 works",
        "scorer-0 rests members",
        "rollout-0 wakes weights+kv_cache",
        "rollout-0 works",
    ]


def test_a_sync_needs_the_policy_and_the_engines_weights(
    processes: dict[str, list[Process]], diary: Path, tmp_path: Path
) -> None:
    rota, wait = SharedDevice(processes), Waiter(Console(), tmp_path, 60)
    wait("policy", work(rota, processes, "learner"))
    read(diary)
    moves = rota.meet()
    wait("sync", moves.before(Pending((), (), (), list)))
    lines = read(diary)
    assert sorted(lines[:2]) == ["learner-0 rests training", "learner-1 rests training"]
    assert "rollout-0 wakes weights" in lines[2:] and not any("policy" in line for line in lines), "the policy stays"
    wait("sample", work(rota, processes, "rollout"))
    lines = read(diary)
    assert sorted(lines[:2]) == ["learner-0 rests policy", "learner-1 rests policy"]
    assert lines[2:] == ["rollout-0 wakes kv_cache", "rollout-0 works"]


def test_a_rest_that_fails_is_reported_as_such(processes: dict[str, list[Process]], diary: Path, tmp_path: Path) -> None:
    rota, wait = SharedDevice(processes), Waiter(Console(), tmp_path, 60)
    wait("reward", work(rota, processes, "reward"))
    ray.get(processes["reward"][0].actor.set_broken.remote(True))
    words = r"reward-0 \(role reward, rank 0\) on node node failed in start, phase score: .*no room on the host"
    with pytest.raises(RoleFailed, match=words):
        wait("score", work(rota, processes, "scorer"))
    ray.get(processes["reward"][0].actor.set_broken.remote(False))
    read(diary)


def test_roles_with_devices_of_their_own_never_move(processes: dict[str, list[Process]], diary: Path, tmp_path: Path) -> None:
    rota, wait = OwnDevices(), Waiter(Console(), tmp_path, 60)
    for role in PARTS:
        wait("work", work(rota, processes, role))
    assert sorted(read(diary)) == sorted(f"{role}-{i} works" for role, number in NUMBERS.items() for i in range(number))
    assert rota.meet().refs == ()


def test_each_engine_has_its_own_place_in_the_group(processes: dict[str, list[Process]], diary: Path) -> None:
    actors = [processes[role][0].actor for role in ("rollout", "scorer")]  # stand for two engines of two workers each
    EngineClient(actors, 60.0).init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    assert sorted(read(diary)) == [
        "rollout-0 [('rank_offset', 1), ('world_size', 5)]",
        "scorer-0 [('rank_offset', 3), ('world_size', 5)]",
    ]
