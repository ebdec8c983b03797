"""What processes are given that take a lost one's place, and when they are well: the bookkeeping, without Ray."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from actors.process import Identity
from cluster.baselines import VanillaPPO
from cluster.console import Console
from cluster.failures import RoleFailed
from cluster.health import FaultsConfig, State
from cluster.load_config import load_config
from cluster.parts import Part
from cluster.recovery import Recovery
from cluster.replacing import Fault, Replacing
from cluster.rota import OwnDevices, Process, Rota, SharedDevice
from cluster.waiting import Pending, Room, Waiter
from tests.cluster.command import TINY
from tests.cluster.five_roles import NAMES, five_roles
from tokens.records import Prompt


@dataclass(frozen=True)
class Call:
    """Stands for an actor's method and, once called, for the reference of its answer; each call is one of its own."""

    actor: Asked
    what: str
    given: tuple[Any, ...] = ()
    number: int = 0

    def remote(self, *given: Any) -> Call:
        call = Call(self.actor, self.what, given, len(self.actor.calls))
        self.actor.calls.append(call)
        return call

    def __hash__(self) -> int:
        return hash((id(self.actor), self.number))

    def task_id(self) -> Asked:
        return self.actor


@dataclass(eq=False)
class Asked:
    """An actor that writes down what it is asked for."""

    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, what: str) -> Call:
        if what.startswith("__"):
            raise AttributeError(what)
        return Call(self, what)

    @property
    def _actor_id(self) -> Asked:
        return self

    def actor_id(self) -> Asked:
        return self

    def hex(self) -> str:
        return f"{id(self):x}"

    def was_asked(self) -> list[str]:
        return [call.what for call in self.calls if call.what != "vigil"]


class Scene:
    """A run of such processes, none of which ever answers by itself."""

    def __init__(self, directory: Path, separate: bool, shared: bool = False) -> None:
        processes = [Process(Asked(), Identity(name, 1, "node")) for name in NAMES]
        e0, e1, reward, *scorers, learner = processes
        of = {"rollout": [e0, e1], "reward": [reward], "scorer": scorers, "learner": [learner]}
        rota: Rota = SharedDevice(of) if shared else OwnDevices()
        (self.pool, self.roles), self.ended = five_roles(processes, rota), list[Asked]()
        self.wait, self.faults = Waiter(Console(), directory, 60.0), list[Fault]()
        told: tuple[Any, ...] = (self.faults.append, lambda line: None, lambda: None)
        self.all = Replacing(self, self.roles, self.wait, self.load_learner, separate, *told)

    def load_learner(self) -> Pending[None]:
        return self.roles.learner.load(self.pool, None, Path("sft"))

    def respawn(self, process: Process, incarnation: int) -> None:
        self.ended.append(process.actor)
        process.actor, process.identity = Asked(), Identity(process.identity.name, 0, "", incarnation)

    def room(self, name: str) -> Room:
        return Room(lambda line: None, {}, None)

    def spare(self, name: str, incarnation: int) -> Any:
        raise AssertionError("no node is about to go")

    def take_over(self, process: Process, spare: Any, incarnation: int) -> None:
        raise AssertionError("no node is about to go")

    def release(self, actor: Any) -> None:
        raise AssertionError("no node is about to go")

    def actor(self, name: str) -> Asked:
        found: Asked = self.all.processes[name].actor
        return found

    def open(self, name: str, what: str) -> Any:
        """The first call of that name whose answer is still watched for."""
        return next(ref for ref in self.wait._watched if ref.actor is self.actor(name) and ref.what == what)

    def answer(self, name: str, what: str) -> None:
        """That call is answered."""
        part = self.wait._watched.pop(self.open(name, what))
        part.pending.on_answer(Identity(name, 2, "node", 2) if what == "identity" else None)


Make = Callable[..., Scene]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda separate=True, shared=False: Scene(tmp_path, separate, shared)


def test_where_the_learner_sends_directly_its_next_sync_brings_the_weights_to_all(make: Make) -> None:
    scene = make(separate=False)
    scene.pool.load("live", 3, ())
    scene.all.replace(scene.all.group("rollout-1"))
    for name in ("rollout-0", "rollout-1"):  # a load would take the next sending, and its own would wait for another one
        assert scene.actor(name).was_asked() == ["identity", "identity"]
    scene.answer("rollout-0", "identity")
    scene.pool.load("live", 4, ())
    assert [scene.actor(name).was_asked()[-1] for name in ("rollout-0", "rollout-1")] == ["load", "load"]
    scene.answer("rollout-0", "identity")
    assert [scene.all.health[name].state for name in ("rollout-0", "rollout-1")] == [State.HEALTHY, State.RESTARTING]


def test_a_version_that_came_again_with_other_weights_is_loaded_again(make: Make) -> None:
    scene = make()
    scene.pool.load("before", 5, ())
    scene.all.replace(["rollout-1"])
    scene.answer("rollout-1", "identity")
    scene.pool.load("after", 5, ())  # a step was undone meanwhile
    scene.answer("rollout-1", "load")
    assert scene.all.health["rollout-1"].state is State.STALE
    assert [call.given for call in scene.actor("rollout-1").calls if call.what == "load"] == [("before", 5), ("after", 5)]
    scene.answer("rollout-1", "load")
    assert scene.all.health["rollout-1"].state is State.HEALTHY


def test_an_engine_samples_only_once_it_holds_the_weights_that_it_was_given_when_it_came(make: Make) -> None:
    """Ray answers loads and samples side by side: without waiting, the samples could come first."""
    scene = make()
    scene.pool.load("now", 5, ())
    prompts = [Prompt(name, "", (1,)) for name in "ab"]
    scene.all.replace(["rollout-0", "rollout-1"])  # nobody serves: those that come have it to do
    scene.pool.sample(prompts, 1, 0, 5)
    for name in ("rollout-0", "rollout-1"):
        calls = scene.actor(name).calls
        load, sample = (next(call for call in calls if call.what == what) for what in ("load", "sample"))
        assert sample.given[-1] is load
        scene.answer(name, "identity")
        scene.answer(name, "load")
    scene.pool.sample(prompts, 1, 0, 5)
    assert all(len(scene.actor(name).calls[-1].given) == 5 for name in ("rollout-0", "rollout-1")), "nothing to wait for any more"


def test_on_a_shared_device_a_process_that_came_takes_its_turn_before_it_loads(make: Make) -> None:
    scene = make(shared=True)
    scene.roles.scorer.calibrate_on([])
    scene.roles.scorer.load(0, Path("r0"))
    scene.roles.rota.turn("learner")
    scene.all.replace(["scorer-0", "rollout-1"])  # both come as their roles' processes are made: an engine awake
    learner, scorer, engine = (scene.actor(name) for name in ("learner-0", "scorer-0", "rollout-1"))
    assert learner.was_asked() == ["wake", "rest"], "the engine's load comes after the learner has left the device"
    assert scorer.was_asked()[:3] == ["identity", "wake", scorer.was_asked()[2]] and len(scorer.was_asked()) > 2
    assert engine.was_asked()[-1] == "rest" and engine.calls[-1].given == (("weights", "kv_cache"),)
    rest = next(call for call in engine.calls if call.what == "rest")
    wake = next(call for call in scorer.calls if call.what == "wake")
    assert rest in wake.given


def test_a_learner_that_has_only_woken_is_not_well(make: Make) -> None:
    scene = make(shared=True)
    scene.all.replace(["learner-0"])
    assert scene.actor("learner-0").was_asked() == ["identity", "identity", "wake", "load"]
    for what in ("identity", "wake"):
        scene.answer("learner-0", what)
    assert scene.all.health["learner-0"].state is State.STALE
    scene.answer("learner-0", "load")
    assert scene.all.health["learner-0"].state is State.HEALTHY


def test_a_refit_that_failed_is_told_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make()
    scene.all.replace(["scorer-0"])
    hold = scene.open("scorer-0", "hold")

    def fails(ref: Any, part: Part) -> None:
        raise RoleFailed("a broken cable", part.name)

    monkeypatch.setattr(scene.wait, "_get", fails)
    with pytest.raises(RoleFailed, match="a broken cable"):
        scene.wait._take(hold, {}, {})
    assert hold not in scene.wait._watched
    before = scene.actor("scorer-0")
    scene.all.replace(["scorer-0"])
    assert not [ref for ref in scene.wait._watched if ref.actor is before], "what it had failed with is told no more"
    assert scene.open("scorer-0", "hold")


def test_a_refit_that_found_the_storage_away_is_made_by_another_process(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = make()
    recover = Recovery(FaultsConfig(), scene.all, tmp_path)
    scene.all.replace(["scorer-0", "reward-0"])
    scene.answer("scorer-0", "identity")
    hold = scene.open("scorer-0", "hold")

    def fails(ref: Any, part: Part) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(scene.wait, "_get", fails)
    tries: list[int] = []

    def play() -> str:
        tries.append(1)
        if hold in scene.wait._watched:
            scene.wait._take(hold, {}, {})
        return "played"

    assert recover(play) == "played" and len(tries) == 2
    assert scene.all.health["scorer-0"].incarnation == 3 and scene.all.health["reward-0"].incarnation == 2
    scene.answer("scorer-0", "identity")
    scene.answer("scorer-0", "hold")
    assert scene.all.health["scorer-0"].state is State.HEALTHY


def test_a_process_that_is_up_and_never_fitted_is_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, now = make(), [1000.0]
    monkeypatch.setattr("cluster.replacing.time.monotonic", lambda: now[0])
    scene.all.replace(["rollout-1", "scorer-0"])
    now[0] = 2000.0
    assert scene.all.unfitted_for(60.0) == [], "they are not up"
    scene.answer("rollout-1", "identity")
    now[0] = 2059.0
    assert scene.all.unfitted_for(60.0) == []
    now[0] = 2061.0
    assert scene.all.unfitted_for(60.0) == ["rollout-1"]


def test_whoever_waits_for_a_process_out_of_reach_obeys_a_signal(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = make()
    recover = Recovery(FaultsConfig(suspect_s=1e9), scene.all, tmp_path)

    def silent(ref: Any, timeout: float) -> None:
        raise GetTimeoutError

    def stop() -> None:
        raise SystemExit(143)

    monkeypatch.setattr("cluster.recovery.ray.get", silent)
    monkeypatch.setattr("cluster.recovery.obey_termination", stop)
    with pytest.raises(SystemExit):
        recover.make_good(scene.all.lost("scorer-0", "unreachable", "out of reach"))


def test_the_baseline_that_keeps_r_0_loads_it_under_the_same_care_as_a_round(make: Make, tmp_path: Path) -> None:
    scene, asked = make(), list[str]()

    def recover(play: Callable[[], None]) -> None:
        asked.append("recovering")
        play()

    def wait(phase: str, pending: Pending[None]) -> None:
        asked.append(phase)

    class Directory:
        num_committed, finished = 1, True

        def round_path(self, index: int) -> Path:
            return tmp_path / str(index)

    unused: Any = None
    config = load_config(TINY, ["--name", "kept", "--rounds.baseline", "vanilla_ppo", "--rounds.num_rounds", "1"])
    stands_in: tuple[Any, ...] = (wait, unused, unused, unused, 0, None, recover)
    directory: Any = Directory()
    VanillaPPO(config, directory, unused, scene.roles, unused, *stands_in).run()
    assert asked == ["recovering", "score"] and scene.actor("scorer-0").was_asked() == ["load"]
