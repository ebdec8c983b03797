"""Engines that come, go and die, on real Ray. What samples here only says which seed it was given, and waits when told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.exceptions import RayTaskError
from ray.experimental.internal_kv import _internal_kv_get

from actors.demand import NAME as DEMAND
from actors.demand import NAMESPACE, Request, draining_nodes
from actors.pool import LEASE_S, ElasticEngines
from actors.process import Identity, Progress
from actors.rollout import prompt_seed
from actors.seats import Event, Sampled, Seat
from actors.transfer import Parcels
from cluster.notices import endangered
from tokens.records import Prompt, Rollout

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PARCELS = Parcels((), 0)
CPUS = 0.1


@ray.remote(num_cpus=CPUS, concurrency_groups={"status": 1, "load": 1})
class Saying:
    """Answers each prompt with its seed. While a file ``hold-NAME`` is there it does not answer."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory, self.version = name, directory, -1
        if (directory / f"broken-{name}").exists():
            raise OSError("no such device")

    @ray.method(concurrency_group="status")
    def identity(self) -> Identity:
        return Identity(self.name, os.getpid(), ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        return Progress(0, 0, "")

    @ray.method(concurrency_group="load")
    def load(self, parcels: Parcels, version: int) -> int:
        self.version = version
        return version

    def sample(self, prompts: Sequence[Prompt], k: int, seed: int, version: int, before: Sequence[int]) -> list[Rollout]:
        assert self.version >= version
        (self.directory / f"has-{self.name}").touch()
        rollouts = []
        for prompt, times in zip(prompts, before, strict=True):
            if prompt.id == "refused":
                raise ValueError("a prompt is too long")
            if prompt.id == "poison":
                os._exit(1)
            said = str(prompt_seed(seed, prompt.id, times))
            rollouts += [Rollout(prompt, i, (2,), said, (0.0,), self.version, True) for i in range(k)]
        while (self.directory / f"hold-{self.name}").exists():
            time.sleep(0.02)
        (self.directory / f"has-{self.name}").unlink()
        return rollouts


@pytest.fixture(scope="module")
def machine() -> Iterator[str]:
    """A cluster of one node; its address."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Scene:
    """A pool of one core engine and ``extra`` more, and what it is told."""

    def __init__(self, directory: Path, extra: int = 1, deadline_s: float = 3600.0, **options: Any) -> None:
        self.directory = directory
        seats = [
            Seat(f"e{i}", i > 0, f"{directory.name}/e{i}", Saying, options if i else {}, (f"e{i}", directory))
            for i in range(1 + extra)
        ]
        core: Any = Saying
        engine = core.remote("e0", directory)
        identity = ray.get(engine.identity.remote())
        self.core = identity.pid
        request = Request(({"CPU": 1.0}, {"CPU": CPUS}), ({}, {}))
        pool: Any = ElasticEngines
        self.pool = pool.remote(directory / "log", directory.name, seats, [engine], [identity], request, deadline_s)
        ray.get(self.pool.start.remote())
        ray.get(self.pool.load.remote(PARCELS, 0))
        self.events: list[Event] = []
        self.asking = self.pool.news.remote()

    def sample(self, names: Sequence[str], version: int = 0) -> Any:
        return self.pool.sample.remote([Prompt(name, "", (1,)) for name in names], 2, 5, version)

    def until(self, kind: str, engine: str) -> Event:
        """Wait for an event that was not waited for before."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for number, event in enumerate(self.events):
                if (event.kind, event.engine) == (kind, engine):
                    del self.events[: number + 1]
                    return event
            if ray.wait([self.asking], timeout=1.0)[0]:
                self.events += ray.get(self.asking)
                self.asking = self.pool.news.remote()
        raise AssertionError(f"{engine} never {kind}: {self.events}, {(self.directory / 'log').read_text()}")

    @contextmanager
    def hold(self, *engines: str) -> Iterator[None]:
        """Engines that get a piece and do not answer."""
        files = [self.directory / f"hold-{engine}" for engine in engines]
        for file in files:
            file.touch()
        yield
        for file in files:
            file.unlink(missing_ok=True)

    def has_a_piece(self, engine: str) -> None:
        wait_until(lambda: (self.directory / f"has-{engine}").exists())


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def requested() -> str:
    return (_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]").decode()


def pid_of(name: str) -> int:
    return int(ray.get(ray.get_actor(name).identity.remote()).pid)


NAMES = [f"p{i % 30}" for i in range(40)]
"""Some come twice."""
WANTED = [(name, k, str(prompt_seed(5, name, int(i >= 30)))) for i, name in enumerate(NAMES) for k in range(2)]


def said(sampled: Sampled) -> list[tuple[str, int, str]]:
    return [(rollout.prompt.id, rollout.sample, rollout.text) for rollout in sampled.rollouts]


@pytest.fixture
def scene(machine: str, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    ray.get(made.pool.close.remote())
    ray.kill(made.pool)


def test_an_engine_joins_dies_is_replaced_and_leaves_and_every_answer_is_the_same(scene: Scene) -> None:
    with scene.hold("e0"):
        answer = scene.sample(NAMES)
        assert scene.until("asked", "e1").wanted == 2
        assert scene.until("joined", "e1").engines == 2
        scene.has_a_piece("e0")
    first = ray.get(answer)
    assert said(first) == WANTED and {work.engine for work in first.work} == {"e0", "e1"} and first.redone == 0
    wait_until(lambda: '"CPU": 1.0' in requested())  # there is room at once, so an engine may come before its request

    with scene.hold("e1"):
        answer = scene.sample(NAMES)
        scene.has_a_piece("e1")
        os.kill(pid_of(f"{scene.directory.name}/e1"), signal.SIGKILL)
        died = scene.until("died", "e1")
        assert died.engines == 1 and died.wanted == 2
        second = ray.get(answer)
    assert said(second) == WANTED and second.redone == 1 and {work.engine for work in second.work} == {"e0"}
    (scene.directory / "has-e1").unlink()

    ray.get(scene.pool.load.remote(PARCELS, 1))
    joined = scene.until("joined", "e1")
    third = ray.get(scene.sample(NAMES, version=1))
    assert joined.why in ("with policy version 0", "with policy version 1")
    assert said(third) == WANTED and {rollout.policy_version for rollout in third.rollouts} == {1}

    ray.get(scene.pool.close_phase.remote())
    assert scene.until("left", "e1").engines == 1
    wait_until(lambda: requested() == "[]")
    assert not [name for name in ray.util.list_named_actors() if name.startswith(f"{scene.directory.name}/e1")]


def test_the_engine_that_is_always_there_is_replaced_too(scene: Scene) -> None:
    with scene.hold("e0"):
        answer = scene.sample(NAMES)
        scene.has_a_piece("e0")
        scene.until("joined", "e1")
        os.kill(scene.core, signal.SIGKILL)
        scene.until("died", "e0")
        sampled = ray.get(answer)
    assert said(sampled) == WANTED and sampled.redone == 1
    scene.until("joined", "e0")


def test_an_engine_that_does_not_get_on_is_ended_and_its_prompts_are_sampled_by_another(machine: str, tmp_path: Path) -> None:
    scene = Scene(tmp_path, deadline_s=2.0)
    with scene.hold("e0"):
        answer = scene.sample(NAMES)
        scene.has_a_piece("e0")
        assert scene.until("died", "e0").why == "no progress for 2 s (resources.deadline_s)"
    sampled = ray.get(answer)
    assert said(sampled) == WANTED and sampled.redone == 1
    ray.get(scene.pool.close.remote())
    ray.kill(scene.pool)


def test_what_kills_every_engine_is_given_up(scene: Scene) -> None:
    with pytest.raises(RayTaskError, match=r"3 engines died over the same 2 prompts \(poison, p0, \.\.\.\)"):
        ray.get(scene.sample(["poison", "p0"]))
    with pytest.raises(RayTaskError, match=r"EngineFailed: e.: ValueError: a prompt is too long"):
        ray.get(scene.sample(["refused", "p0"]))


def test_an_engine_that_cannot_start_is_given_up_for_the_phase(scene: Scene) -> None:
    broken = scene.directory / "broken-e1"
    broken.touch()
    assert said(ray.get(scene.sample(NAMES))) == WANTED
    assert "no such device" in scene.until("given up", "e1").why
    assert said(ray.get(scene.sample(NAMES))) == WANTED
    broken.unlink()
    ray.get(scene.pool.close_phase.remote())
    ray.get(scene.sample(NAMES))
    scene.until("joined", "e1")


def test_an_engine_that_finds_no_room_is_no_longer_asked_for_when_the_phase_is_over(machine: str, tmp_path: Path) -> None:
    scene = Scene(tmp_path, num_cpus=50)
    ray.get(scene.sample(NAMES))
    scene.until("asked", "e1")
    ray.get(scene.pool.close_phase.remote())
    assert "had not joined yet" in scene.until("left", "e1").why
    assert not [name for name in ray.util.list_named_actors() if name.startswith(f"{tmp_path.name}/e1")]
    ray.kill(scene.pool)


DRIVER = """
import sys, time
from pathlib import Path
import ray
from tests.actors.test_pool import NAMES, Scene
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
scene = Scene(Path(sys.argv[2]))
ray.get(scene.sample(NAMES))
time.sleep(600)
"""


def test_a_driver_that_is_killed_asks_for_nothing_any_more(machine: str, tmp_path: Path) -> None:
    wait_until(lambda: requested() == "[]", LEASE_S + 20)  # of the pools before
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, machine, str(tmp_path)], cwd=ROOT, start_new_session=True)
    wait_until(lambda: '"CPU": 1.0' in requested())
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_until(lambda: requested() == "[]", LEASE_S + 20)
    wait_until(lambda: {"name": DEMAND, "namespace": NAMESPACE} not in ray.util.list_named_actors(all_namespaces=True))


def test_a_node_that_is_about_to_go(machine: str, tmp_path: Path) -> None:
    start = [str(BIN / "ray"), "start", f"--address={machine}", "--block", "--num-cpus=1", '--resources={"other": 1}']
    node = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        scene = Scene(tmp_path, resources={"other": 0.1})
        with scene.hold("e0", "e1"):
            answer = scene.sample(NAMES)
            there = scene.until("joined", "e1").node
            scene.has_a_piece("e1")
            drain = ["drain-node", f"--address={machine}", f"--node-id={there}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
            drain += ["--reason-message=spot", "--deadline-remaining-seconds=600"]
            subprocess.run([str(BIN / "ray"), *drain], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert there in draining_nodes()
            (line,) = endangered([Identity("learner-0", 1, there), Identity("scorer-0", 2, "elsewhere")]).values()
            assert line.startswith(f"node {there[:8]} is being drained and goes in ") and line.endswith("there: learner-0")
            assert "goes in " in scene.until("draining", "e1").why
            (tmp_path / "hold-e1").unlink()
            assert "being drained" in scene.until("left", "e1").why
        sampled = ray.get(answer)
        assert said(sampled) == WANTED and sampled.redone == 0 and [work.engine for work in sampled.work].count("e1") == 1
        ray.kill(scene.pool)
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
