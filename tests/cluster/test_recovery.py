"""What is lost is made good: real processes of Ray that do next to nothing, killed and stopped at their work."""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console as RichConsole

from actors.demand import Request
from actors.pool import NAME
from actors.process import STATUS_GROUP, Identity, Progress
from actors.seats import Seat
from actors.transfer import Parcels
from cluster.console import Console
from cluster.failures import GivenUp, RoleFailed, RoleLost
from cluster.health import Budget, FaultsConfig, State
from cluster.load_config import load_config
from cluster.pool import elastic_pool
from cluster.recovery import Recovery
from cluster.replacing import Fault, Replacing
from cluster.rota import OwnDevices, Process
from cluster.waiting import Pending, Room, Waiter
from tests.cluster.command import TINY
from tests.cluster.five_roles import NAMES, five_roles
from tokens.records import Prompt, Rollout

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
GROUPS = STATUS_GROUP | {"load": 1}


class Doing:
    """Every role at once. While a file ``hold-NAME`` is there it does not get on."""

    def __init__(self, name: str, directory: Path, incarnation: int) -> None:
        self.name, self.directory, self.incarnation = name, directory, incarnation
        self.version, self.held, self.updates, self.done = -1, list[str](), list[int](), 0

    @ray.method(concurrency_group="status")
    def identity(self) -> Identity:
        return Identity(self.name, os.getpid(), ray.get_runtime_context().get_node_id(), self.incarnation)

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        return Progress(self.done, 0, "")

    @ray.method(concurrency_group="vigil")
    def vigil(self) -> None:
        threading.Event().wait()

    def _work(self) -> None:
        (self.directory / f"has-{self.name}").touch()
        while (self.directory / f"hold-{self.name}").exists():
            time.sleep(0.02)
            self.done += 1
        if (self.directory / f"broken-{self.name}").exists():
            (self.directory / f"broken-{self.name}").unlink()
            raise ValueError("a broken cable")

    @ray.method(concurrency_group="load")
    def load(self, what: Any, version: Any, *after: Any) -> Any:
        time.sleep(0.3)  # samples do not queue behind it
        self.version = version
        self.held.append(f"{what}={version}")
        return version

    def sample(self, prompts: Sequence[Prompt], k: int, seed: int, version: int, before: Sequence[int], *after: Any) -> list[str]:
        assert self.version == version, f"{self.name} holds {self.version}, asked for {version}"
        self._work()
        return [f"{prompt.id}/{seed}/{times}" for prompt, times in zip(prompts, before, strict=True)]

    def calibrate_on(self, rollouts: Sequence[Any]) -> None:
        self.held.append("calibrated")

    def hold(self, rollouts: Sequence[Any] | None, members: Mapping[int, Path]) -> None:
        if rollouts is not None:
            self.calibrate_on(rollouts)
        for member, place in members.items():
            self.load(place, member)

    def score(self, rollouts: Sequence[Any], ids: Sequence[int]) -> list[str]:
        self._work()
        if rollouts:
            self.held.append(f"scored {len(rollouts)}")
        return self.held

    def fit(self, *given: Any) -> str:
        self._work()
        return "fitted"

    def update(self, rollouts: Sequence[Any], scores: Sequence[float], bound: None, number: int) -> list[int]:
        self._work()
        self.updates.append(number)
        return self.updates


@pytest.fixture(scope="module")
def machine() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


class Scene:
    """A run of such processes."""

    def __init__(self, directory: Path, deadline_s: float, faults: FaultsConfig) -> None:
        self.directory, self.faults = directory, list[Fault]()
        self.slow = set[str]()
        processes = [Process(self._spawn(name, 1), Identity(name, 0, "")) for name in NAMES]
        for process in processes:
            process.identity = ray.get(process.actor.identity.remote())
        self.pool, self.roles = five_roles(processes, OwnDevices())
        console = Console()
        console.rich = RichConsole(file=io.StringIO(), width=200, soft_wrap=True)
        self.printed: Any = console.rich.file
        self.wait = Waiter(console, directory, deadline_s)

        def load_learner() -> Pending[None]:
            loading = self.process("learner-0").actor.load.remote("policy", 0)
            return Pending((loading,), ("learner-0",), ("",), lambda answers: None)

        told: tuple[Any, ...] = (self.faults.append, console.say, lambda: None)
        self.all = Replacing(self, self.roles, self.wait, load_learner, True, *told)
        self.recover = Recovery(faults, self.all, directory)
        self.wait.look = self.recover.look

    def _spawn(self, name: str, incarnation: int) -> Any:
        options: dict[str, Any] = {"num_cpus": 5 if name in self.slow else 0, "concurrency_groups": GROUPS}
        return ray.remote(**options)(Doing).remote(name, self.directory, incarnation)

    def respawn(self, process: Process, incarnation: int) -> None:
        ray.kill(process.actor)
        name = process.identity.name
        process.actor, process.identity = self._spawn(name, incarnation), Identity(name, 0, "", incarnation)

    def spare(self, name: str, incarnation: int) -> Any:
        return self._spawn(name, incarnation)

    def take_over(self, process: Process, spare: Any, incarnation: int) -> None:
        ray.kill(process.actor)
        process.actor, process.identity = spare, Identity(process.identity.name, 0, "", incarnation)

    def release(self, actor: Any) -> None:
        ray.kill(actor)

    def room(self, name: str) -> Room:
        return Room(lambda line: None, {"CPU": 5.0}, None)

    def process(self, name: str) -> Process:
        return next(process for process in self.roles.processes if process.identity.name == name)

    def incarnations(self) -> dict[str, int]:
        return {process.identity.name: process.identity.incarnation for process in self.roles.processes}

    def when_at_work(self, name: str, act: Callable[[], None]) -> threading.Thread:
        """Do something to a process once it is at work, and let it get on."""
        hold, has = self.directory / f"hold-{name}", self.directory / f"has-{name}"
        has.unlink(missing_ok=True)
        hold.touch()

        def then() -> None:
            while not has.exists():
                time.sleep(0.02)
            act()
            hold.unlink()

        thread = threading.Thread(target=then, daemon=True)
        thread.start()
        return thread

    def send(self, name: str, number: signal.Signals) -> Callable[[], None]:
        pid = self.process(name).identity.pid
        assert pid, f"{name} is not up yet"
        return lambda: os.kill(pid, number)

    def sample(self, version: int) -> list[Any]:
        return self.wait("sample", self.pool.sample([Prompt(f"p{i % 3}", "", (1,)) for i in range(5)], 1, 7, version))

    def sync(self, version: int) -> None:
        self.wait("sync", self.pool.load("weights", version, ()))

    def until(self, *healthy: str) -> None:
        """Wait, as a driver does that waits for something else, until these are well."""
        deadline = time.monotonic() + 60
        while any(self.all.health[name].state is not State.HEALTHY for name in healthy):
            assert time.monotonic() < deadline, self.faults
            self.wait("pass", Pending((ray.put(1),), ("driver",), ("",), list))
            time.sleep(0.05)

    def events(self) -> list[tuple[str, str]]:
        return [(fault.event, fault.process) for fault in self.faults]

    def close(self) -> None:
        for process in self.roles.processes:
            ray.kill(process.actor)


def scored(scene: Scene, rollouts: Sequence[Rollout]) -> Any:
    """What each scorer says of its share."""
    return scene.wait("score", replace(scene.roles.scorer.score(rollouts), combine=list))


@pytest.fixture(scope="module")
def shared(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = Scene(tmp_path_factory.mktemp("scene"), 60.0, FaultsConfig(infrastructure=2))
    yield made
    made.close()


@pytest.fixture
def scene(shared: Scene) -> Iterator[Scene]:
    """The five processes, well, with all their budgets; what one test has done to them the next one does not see."""
    shared.faults.clear()
    shared.slow.clear()
    shared.printed.truncate(0)
    shared.recover.budget = Budget(shared.recover.faults, time.monotonic)
    shared.recover.num_stale, shared.wait.deadline_s = 0, 60.0
    yield shared
    shared.until(*NAMES)


WANTED = ["p0/7/0", "p1/7/0", "p2/7/0", "p0/7/1", "p1/7/1"]


def test_others_do_what_a_dead_engine_had_and_its_successor_comes_with_the_weights_of_now(scene: Scene) -> None:
    scene.sync(0)
    before = scene.incarnations()
    died = scene.when_at_work("rollout-1", scene.send("rollout-1", signal.SIGKILL))
    assert scene.sample(0) == WANTED
    died.join()
    assert scene.events()[0] == ("lost", "rollout-1")
    scene.sync(1)  # the successor may be up by now, or not
    assert scene.sample(1) == WANTED
    scene.until("rollout-1")
    assert scene.events() == [("lost", "rollout-1"), ("back", "rollout-1")]
    back = scene.faults[-1].values
    assert 0 < back["faults/start_seconds"] <= back["faults/recovery_seconds"]
    assert scene.incarnations() == before | {"rollout-1": before["rollout-1"] + 1} and scene.process("rollout-1").identity.pid
    held = scene.when_at_work("rollout-1", lambda: None)
    assert scene.sample(1) == WANTED, "with a part of its own for the successor"
    held.join(10)
    assert not held.is_alive()
    assert "lost rollout-1: died" in scene.printed.getvalue() and "back rollout-1 on node" in scene.printed.getvalue()


def test_the_last_engine_is_waited_for(scene: Scene) -> None:
    scene.sync(3)
    threads = [scene.when_at_work(name, scene.send(name, signal.SIGKILL)) for name in ("rollout-0", "rollout-1")]
    assert scene.sample(3) == WANTED
    for thread in threads:
        thread.join()
    assert {event for event in scene.events() if event[0] == "lost"} == {("lost", "rollout-0"), ("lost", "rollout-1")}


def test_an_error_of_a_successor_is_not_taken_for_the_death_before_it(scene: Scene) -> None:
    scene.sync(4)
    threads = [scene.when_at_work(name, scene.send(name, signal.SIGKILL)) for name in ("rollout-0", "rollout-1")]
    (scene.directory / "broken-rollout-0").touch()
    with pytest.raises(RoleFailed, match="a broken cable"):
        scene.sample(4)
    for thread in threads:
        thread.join()


def test_a_scorer_is_given_all_that_it_held_and_asked_again(scene: Scene) -> None:
    scorer = scene.roles.scorer
    scene.wait("score", scorer.calibrate_on([]))
    for member in (1, 0):
        scene.wait("score", scorer.load(member, scene.directory / "draft" / str(member)))
    scorer.holds.committed(scene.directory / "draft", scene.directory / "round")
    died = scene.when_at_work("scorer-0", scene.send("scorer-0", signal.SIGKILL))
    held = scored(scene, [])
    died.join()
    assert held == [["calibrated", f"{scene.directory}/round/1=1", f"{scene.directory}/round/0=0"]]


def test_of_two_scorers_one_that_dies_scores_its_share_again_and_the_other_nothing(scene: Scene) -> None:
    scorer = scene.roles.scorer
    scene.wait("score", scorer.calibrate_on([]))
    scene.wait("score", scorer.load(0, scene.directory / "0"))
    batch = [Rollout(Prompt(name, "", (1, 2)), 0, (3,), "", (-1.0,), 0, True) for name in "aabb"]
    died = scene.when_at_work("scorer-1", scene.send("scorer-1", signal.SIGKILL))
    first, second = scored(scene, batch)
    died.join()
    assert first[-2:] != ["scored 2"] * 2 and first[-1] == "scored 2", "once"
    assert [row.partition("=")[2] for row in second] == ["", *map(str, scorer.holds.members), ""], "the other is given them all"
    assert second[-1] == "scored 2"
    assert {event for event in scene.events() if event[0] == "lost"} == {("lost", "scorer-1")}
    (alone,) = scored(scene, batch[:2])
    assert alone[-2:] == ["scored 2"] * 2, "of a single prompt there is one share"


def test_a_process_that_dies_while_nobody_asks_it_is_replaced_at_once(scene: Scene) -> None:
    scene.send("reward-0", signal.SIGKILL)()
    work = scene.when_at_work("scorer-0", lambda: time.sleep(3))
    scored(scene, [])
    work.join()
    assert scene.events()[0] == ("lost", "reward-0")
    fit = scene.roles.reward.fit(scene.directory, 0, None, None, None)
    assert scene.wait("reward", fit) == "fitted"  # type: ignore[comparison-overlap]


def test_a_fit_is_done_again(scene: Scene) -> None:
    died = scene.when_at_work("reward-0", scene.send("reward-0", signal.SIGKILL))
    assert scene.wait("reward", scene.roles.reward.fit(scene.directory, 0, None, None, None)) == "fitted"  # type: ignore[comparison-overlap]
    died.join()


def test_a_process_that_hangs_is_ended_and_replaced(scene: Scene) -> None:
    scene.sync(0)
    scene.wait.deadline_s = 3.0
    stopped = scene.when_at_work("rollout-0", scene.send("rollout-0", signal.SIGSTOP))
    assert scene.sample(0) == WANTED
    stopped.join()
    assert scene.events()[0] == ("lost", "rollout-0")
    assert scene.faults[0].why == "hung: no progress for 3 s (resources.deadline_s)"
    assert scene.faults[0].values["faults/detection_seconds"] >= 2


def test_who_hangs_is_told_from_who_works_on(scene: Scene) -> None:
    scene.sync(0)
    scene.wait.deadline_s = 3.0
    works = scene.when_at_work("rollout-0", lambda: time.sleep(8))
    stopped = scene.when_at_work("rollout-1", scene.send("rollout-1", signal.SIGSTOP))
    assert scene.sample(0) == WANTED
    works.join()
    stopped.join()
    assert [process for event, process in scene.events() if event == "lost"] == ["rollout-1"]


def test_the_loss_of_a_learner_begins_the_attempt_anew_and_late_answers_are_refused(scene: Scene) -> None:
    scene.sync(0)
    attempts: list[list[int]] = []
    late = scene.when_at_work("rollout-0", lambda: time.sleep(2))

    def play() -> Any:
        attempts.append([])
        if len(attempts) == 1:
            scene.send("learner-0", signal.SIGKILL)()
            scene.sample(0)  # it is given up: what comes of it belongs to an attempt that is over
        return scene.wait("policy", scene.roles.learner.update([], [], None, 5))

    assert scene.recover(play) == [5] and len(attempts) == 2
    late.join()
    scene.until("learner-0", "rollout-0")
    deadline = time.monotonic() + 30
    while not any(fault.event == "stale reply" for fault in scene.faults):
        assert time.monotonic() < deadline
        scene.wait("pass", Pending((ray.put(1),), ("driver",), ("",), list))
        time.sleep(0.1)
    refused = [fault for fault in scene.faults if fault.event == "stale reply"]
    assert {fault.process for fault in refused} <= {"rollout-0", "rollout-1"}
    assert refused[-1].values == {"faults/stale_replies": float(len(refused))}


def test_a_budget_ends_the_run(scene: Scene) -> None:
    def play() -> None:
        scene.until("learner-0")
        scene.send("learner-0", signal.SIGKILL)()
        scene.wait("policy", scene.roles.learner.update([], [], None, 0))
        scene.wait("policy", scene.roles.learner.update([], [], None, 1))

    with pytest.raises(
        GivenUp, match=r"learner-0 .* died.* failed more than 2 times within 3600 s \(faults\.infrastructure\)"
    ) as end:
        scene.recover(play)
    assert end.value.who == "learner-0"


def test_an_error_of_a_role_is_tried_once_more_by_another_process(scene: Scene) -> None:
    tries: list[int] = []

    def play() -> Any:
        tries.append(1)
        return scene.wait("reward", scene.roles.reward.fit(scene.directory, 0, None, None, None))

    broken = scene.directory / "broken-reward-0"
    broken.touch()
    before = scene.incarnations()
    assert scene.recover(play) == "fitted" and len(tries) == 2
    assert scene.events()[0] == ("raised", "reward-0")
    scene.until("reward-0")
    assert scene.incarnations() == before | {"reward-0": before["reward-0"] + 1}
    broken.touch()

    def again() -> None:
        play()
        broken.touch()
        play()

    with pytest.raises(
        GivenUp, match=r"ValueError: a broken cable.* failed more than 1 times before the round was done \(faults\.data\)"
    ):
        scene.recover(again)


def test_storage_that_is_away_is_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def play() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return len(tries)

    assert scene.recover(play) == 3
    assert scene.events() == [("storage away", "storage")] * 2
    tries.clear()
    with pytest.raises(GivenUp, match="the storage was away more than 2 times"):
        scene.recover(play)
    with pytest.raises(PermissionError):
        scene.recover(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def test_a_process_that_could_not_be_reached_is_asked_whether_it_is_there(scene: Scene) -> None:
    process, before = scene.process("scorer-0"), scene.process("scorer-0").identity.incarnation
    lost = RoleLost("scorer-0: out of reach", "scorer-0", "", "unreachable", "out of reach", process.actor._actor_id.hex())
    scene.recover.make_good(lost)  # it answers
    assert scene.events() == [("cleared", "scorer-0")] and process.identity.incarnation == before
    scene.send("scorer-0", signal.SIGKILL)()
    scene.recover.make_good(lost)
    assert process.identity.incarnation == before + 1
    stale = RoleLost("scorer-0: died", "scorer-0", "", "died", "of old", "0" * 32)
    scene.recover.make_good(stale)  # news of one that has a successor already
    assert process.identity.incarnation == before + 1


def test_processes_move_before_their_node_goes_and_the_learner_when_it_is_saved(scene: Scene) -> None:
    scene.sync(0)
    node, before = scene.process("learner-0").identity.node, scene.incarnations()
    for name in NAMES[2:]:  # the engines are elsewhere, say
        scene.process(name).identity = replace(scene.process(name).identity, node="about to go")
    assert not scene.recover.moving.saving_is_due()
    scene.recover.moving.warned(["about to go"])
    assert scene.recover.moving.saving_is_due(), "once because of the notice"
    deadline = time.monotonic() + 120
    while not scene.recover.moving.saving_is_due():  # and once more when another process is there to go on
        assert time.monotonic() < deadline
        scene.wait("pass", Pending((ray.put(1),), ("driver",), ("",), list))
        time.sleep(0.05)
    played: list[int] = []

    def play() -> Any:
        played.append(1)
        scene.recover.moving.move_learner()
        return scene.wait("policy", scene.roles.learner.update([], [], None, 5))

    assert scene.recover(play) == [5] and len(played) == 2
    while {process for event, process in scene.events() if event == "moved"} != set(NAMES[2:]):
        assert time.monotonic() < deadline, scene.events()
        scene.wait("pass", Pending((ray.put(1),), ("driver",), ("",), list))
        time.sleep(0.05)
    scene.until(*NAMES[2:])
    assert ("lost", "learner-0") not in scene.events()
    assert scene.incarnations() == before | {name: before[name] + 1 for name in NAMES[2:]}
    assert scene.process("learner-0").identity.node == node


def test_a_node_that_stays_after_all_costs_nothing(scene: Scene) -> None:
    scene.sync(0)
    identity = scene.process("rollout-1").identity
    scene.process("rollout-1").identity = replace(identity, node="about to go")
    scene.slow = {"rollout-1"}  # no other node has room
    scene.recover.moving.warned(["about to go"])
    assert [engine.identity.name for engine in scene.pool.serving()] == ["rollout-0"]
    assert scene.sample(0) == WANTED
    scene.recover.moving.warned([])
    assert len(scene.pool.serving()) == 2 and not scene.all.spares and not scene.faults
    scene.process("rollout-1").identity = identity


class Sampling(Doing):
    """An engine that answers as an elastic pool wants it."""

    def sample(self, prompts: Sequence[Prompt], k: int, seed: int, version: int, before: Sequence[int]) -> list[Any]:
        texts = super().sample(prompts, k, seed, version, before)
        rows = zip(prompts, texts, strict=True)
        return [Rollout(prompt, 0, (2,), text, (0.0,), version, True) for prompt, text in rows]


def test_the_process_of_an_elastic_pool_is_replaced_with_all_its_engines(shared: Scene, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": GROUPS}
    engine_class: Any = ray.remote(**options)(Sampling)
    engine = Process(engine_class.remote("rollout-0", tmp_path, 1), Identity("rollout-0", 0, ""))
    engine.identity = ray.get(engine.actor.identity.remote())
    seats = [Seat("rollout-0", False, f"{tmp_path.name}/rollout-0", engine_class, {}, ("rollout-0", tmp_path, 1))]
    config = load_config(TINY, ["--name", tmp_path.name, "--rollout.max_engines", "1"])
    pool = elastic_pool(config, seats, [engine], Request(({"CPU": 0.1},), ({},)), tmp_path, lambda line: None)
    first = pool.process.identity.pid

    class Places:
        """Puts another engine where one was."""

        def respawn(self, process: Process, incarnation: int) -> None:
            ray.kill(process.actor)
            process.actor = engine_class.remote("rollout-0", tmp_path, incarnation)
            process.identity = Identity("rollout-0", 0, "", incarnation)

        def room(self, name: str) -> Room:
            return shared.room(name)

        def spare(self, name: str, incarnation: int) -> Any:
            raise AssertionError("no node is about to go")

        def take_over(self, process: Process, spare: Any, incarnation: int) -> None:
            raise AssertionError("no node is about to go")

        def release(self, actor: Any) -> None:
            ray.kill(actor)

    wait, faults = Waiter(Console(), tmp_path, 60.0), list[Fault]()
    roles = replace(shared.roles, rollout=pool, processes=(engine,))
    never: Any = None
    said: list[str] = []
    processes = Replacing(Places(), roles, wait, never, True, faults.append, said.append, lambda: None)
    recover = Recovery(FaultsConfig(), processes, tmp_path)
    wait.look = recover.look
    wait("sync", pool.load(Parcels((), 0), 4, ()))
    (tmp_path / "hold-rollout-0").touch()
    asked = pool.sample([Prompt("p0", "", (1,)), Prompt("p1", "", (1,))], 1, 7, 4)
    while not (tmp_path / "has-rollout-0").exists():
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    (tmp_path / "hold-rollout-0").unlink()
    assert [rollout.text for rollout in wait("sample", asked)] == ["p0/7/0", "p1/7/0"]
    assert [(fault.event, fault.process) for fault in faults] == [("lost", NAME), ("back", NAME)]
    assert engine.identity.incarnation == 2 and pool.process.identity.pid not in (0, first)
    pool.close()
    ray.kill(engine.actor)


def test_no_room_leaves_an_engines_place_empty_and_ends_the_run_for_others(shared: Scene) -> None:
    """The last one: what it leaves is not well."""
    scene = shared
    scene.faults.clear()
    scene.recover.faults = FaultsConfig(restart_s=2.0)
    scene.sync(0)
    scene.slow = {"rollout-1", "scorer-0"}  # there is one CPU, they want five
    scene.send("rollout-1", signal.SIGKILL)()
    work = scene.when_at_work("reward-0", lambda: time.sleep(6))
    scene.wait("reward", scene.roles.reward.fit(scene.directory, 0, None, None, None))
    work.join()
    assert scene.events() == [("lost", "rollout-1"), ("given up", "rollout-1")]
    assert "5 CPU asked" in scene.faults[-1].why
    assert scene.sample(0) == WANTED
    scene.send("scorer-0", signal.SIGKILL)()
    with pytest.raises(GivenUp, match=r"scorer-0: it was not there again within faults\.restart_s = 2 s: 5 CPU asked"):
        scored(scene, [])
