"""Making good what is lost: another process in a dead one's place, with all that it must hold, and the work done again.

An engine, the scorer and the reward trainer are replaced in the middle of whatever goes on, and what they had is asked for again.
The learner holds what is in no other place, so its loss ends the attempt: the round is played again from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from actors.pool import NAME
from actors.process import Identity
from cluster.failures import BadNumbers, GivenUp, RoleFailed, RoleLost
from cluster.fixed_pool import FixedPool
from cluster.health import Budget, FaultsConfig, Health, Kind, State
from cluster.parts import Fence
from cluster.patience import is_away, until_there
from cluster.pool import ElasticPool, Places
from cluster.pulse import Pulse
from cluster.roles import Roles, only
from cluster.rota import Process
from cluster.signals import obey_termination
from cluster.telemetry import role_of
from cluster.waiting import VIGIL, Pending, Room, Waiter

T = TypeVar("T")
RESTART = "restart"
"""The phase of what a process does before it is healthy again."""
PLACE_OF_THE_POOL = "rollout-0"
"""What an elastic pool waits for room for: its first engine."""
PING_S = 1.0
"""How often a process that is out of reach is asked whether it is there."""


@dataclass(frozen=True)
class Fault:
    """What happened to a process, for the record.

    Args:
        event: lost, raised, moved, back, cleared, given up, stale reply, or storage away.
        process: its name.
        node: where it ran, or runs; "" where that is not known.
        why: in words.
        values: numbers, by the names of metrics.jsonl.
    """

    event: str
    process: str
    node: str
    why: str
    values: dict[str, float]


@dataclass
class _Absence:
    """A process that is away."""

    began: float
    room: Room
    up: float | None = None
    identity: Any = None


class Recovery:
    """Makes good what is lost, as far as the budgets go.

    Args:
        faults: the limits.
        places: where processes are put.
        roles: that there are.
        wait: whose losses are made good.
        load_learner: asks a learner that has just come to load its models.
        separate: False where weights go directly from learner to engines, so that neither does without the other.
        note: writes a fault down.
        say: prints a line.
        identified: called when processes have other ids than before.
        storage: directory of the run.
    """

    def __init__(
        self,
        faults: FaultsConfig,
        places: Places,
        roles: Roles,
        wait: Waiter,
        load_learner: Callable[[], Pending[None]],
        separate: bool,
        note: Callable[[Fault], None],
        say: Callable[[str], None],
        identified: Callable[[], None],
        storage: Path,
    ) -> None:
        self.storage = storage
        self.faults, self.places, self.roles, self.wait = faults, places, roles, wait
        self.load_learner, self.separate, self.note, self.say, self.identified = load_learner, separate, note, say, identified
        self.engines = roles.rollout if isinstance(roles.rollout, FixedPool) else None
        self.pool = roles.rollout if isinstance(roles.rollout, ElasticPool) else None
        """It replaces its engines by itself (``actors.pool``), and is replaced with all of them."""
        others = [each for each in roles.processes if self.engines is not None or role_of(each.identity.name) != "rollout"]
        mine = others if self.pool is None else [*others, self.pool.process]
        self.processes = {process.identity.name: process for process in mine}
        self.health = {name: Health(name) for name in self.processes}
        self.budget = Budget(faults, time.monotonic)
        self.away: dict[str, _Absence] = {}
        self.unfit: dict[str, tuple[int, Any]] = {}
        """Engines whose weights were lost on the way: incarnation, and which weights those were."""
        self.num_losses, self.num_stale = 0, 0
        self.spares: dict[str, tuple[Any, Any]] = {}
        """Processes that may take over where a node is about to go, with references of their identities."""
        self.save_soon = False
        self._warned: set[str] = set()
        self.pulse = Pulse(self.processes)
        for process in self.processes.values():
            self._keep_vigil(process)
        wait.make_good, wait.fence = self.make_good, Fence(self._refused)

    def __call__(self, play: Callable[[], T]) -> T:
        """Play something that goes on where it was left, until it is done.

        Args:
            play: it.

        Raises:
            RoleFailed: if something failed more often than it is made good, or is not made good at all.
        """
        while True:
            try:
                return play()
            except (GivenUp, BadNumbers):  # numbers that went wrong have a budget of their own: cluster.guarding
                raise
            except RoleLost as lost:
                if lost.who not in self.processes:
                    raise
                self.say(f"  goes on from the last checkpoint: {lost.who} {lost.how}")
            except RoleFailed as failure:
                self._do_once_more(failure)
            except OSError as error:
                if not is_away(error, self.storage):
                    raise
                self._wait_for_storage(error)

    def look(self) -> None:
        """Look after those that are away, and whether the others live; called again and again while the driver waits.

        Raises:
            RoleLost: if a process is not there again in time, or another one takes over from it.
        """
        self.pulse.look(self.wait.starting)
        self._refit_the_unfit()
        for name in self._spares_that_are_up():
            if role_of(name) != "learner":  # that one moves when it is saved
                raise self._moves(name)
        for name in sorted(self.wait.starting):
            absence = self.away[name]
            absence.room.look(waiting=True)
            if time.monotonic() - absence.began > self.faults.restart_s:
                what = f"it was not there again within faults.restart_s = {self.faults.restart_s:g} s: {absence.room.short()}"
                raise RoleLost(f"{name}: {what}", name, "", "unreachable", what, _id(self.processes[name]))

    def make_good(self, lost: RoleLost) -> None:
        """Put another process in the place of a lost one. Its calls are then asked for again by whoever waits for them.

        Raises:
            RoleLost: if what it held cannot be given to another: the round must go on from its last checkpoint.
            GivenUp: if that is one too many, or there is no room for another.
        """
        name = lost.who
        if name not in self.processes:
            raise lost
        process = self.processes[name]
        if lost.actor != _id(process):
            return  # another one has its place already
        if name in self.wait.starting and time.monotonic() - self.away[name].began > self.faults.restart_s:
            self._give_up(process, lost)
            return
        if lost.how == "unreachable" and self._answers_again(process, lost):
            return
        if lost.how == "moved":
            self._note("moved", process, lost.why, {})
            self.say(f"  {name} moves: {lost.why}")
        else:
            self._count(process, lost)
        group = self._group(name)
        self._replace(group)
        if any(role_of(member) == "learner" for member in group):
            raise lost

    def _count(self, process: Process, lost: RoleLost) -> None:
        """Tell of a loss.

        Raises:
            GivenUp: if it is one too many.
        """
        name = process.identity.name
        silent = self.pulse.silent_s(name)
        self.num_losses += 1
        values = {"faults/losses": float(self.num_losses), "faults/detection_seconds": silent}
        self._note("lost", process, f"{lost.how}: {lost.why}", values)
        self.say(f"  [yellow]lost[/] {name}: {lost.how}, {silent:.1f} s after its last sign of life ({lost.why})")
        self._spend(name, "infrastructure", lost)

    def warned(self, nodes: Collection[str]) -> None:
        """Nodes are about to go: others are asked for in the places of their processes, and take over when they are up.

        Meanwhile engines there get no new work while others serve, and the learner is saved after its step. Ranks that share a
        model do not move; they are replaced when their node is gone.

        Args:
            nodes: Ray's ids; those of before that are not among them stay after all, or are gone.
        """
        there = {name for name, process in self.processes.items() if process.identity.node in nodes}
        if self.engines is not None:
            self.engines.leaving = {name for name in there if role_of(name) == "rollout"}
        learners = {name for name in there if role_of(name) == "learner"}
        self.save_soon = self.save_soon or bool(learners - self._warned)
        self._warned = learners
        for name in self.spares.keys() - there:
            self.places.release(self.spares.pop(name)[0])
        for name in sorted(there - self.spares.keys() - {NAME}):
            if self.health[name].state is State.HEALTHY and self._group(name) == [name]:
                spare = self.places.spare(name, self.health[name].incarnation + 1)
                self.spares[name] = (spare, spare.identity.remote())

    def _spares_that_are_up(self) -> list[str]:
        up = [name for name, (_, identity) in self.spares.items() if ray.wait([identity], timeout=0)[0]]
        return [name for name in up if self.health[name].state is State.HEALTHY]

    def _moves(self, name: str) -> RoleLost:
        process = self.processes[name]
        words = f"node {process.identity.node[:8]} is about to go"
        return RoleLost(f"{name}: {words}", name, "", "moved", words, _id(process))

    def saving_is_due(self) -> bool:
        """Whether what the learner holds should be saved now: its node was just said to go, or another one can take over."""
        due, self.save_soon = self.save_soon, False
        return due or any(role_of(name) == "learner" for name in self._spares_that_are_up())

    def move_learner(self) -> None:
        """What the learner holds is saved: the moment to go on in another process, if one is there for it.

        Raises:
            RoleLost: then the round goes on from what was saved.
        """
        for name in self._spares_that_are_up():
            if role_of(name) == "learner":
                self.wait.lose(self._moves(name))

    def _wait_for_storage(self, error: OSError) -> None:
        """Nothing can be saved or read meanwhile; what was being written when it went is written again.

        Raises:
            OSError: if it stays away.
            GivenUp: if it is away too often.
        """
        limit_s = self.faults.storage_s
        self.say(f"  [yellow]storage[/] {self.storage} does not answer ({error}); waiting up to {limit_s:g} s for it")
        took = until_there(self.storage, limit_s, obey_termination)
        why = f"{error.strerror}: away for {took:.1f} s"
        self.note(Fault("storage away", "storage", "", why, {"faults/recovery_seconds": took}))
        self.say(f"  storage is there again after {took:.1f} s; the round goes on from what is recorded")
        if not self.budget.spend("storage", "infrastructure"):
            raise GivenUp(f"the storage was away more than {self.faults.infrastructure} times within {self.faults.window_s:g} s")

    def _do_once_more(self, failure: RoleFailed) -> None:
        """A role raised an error: another process does its work once more."""
        if failure.who not in self.processes:
            raise failure
        process = self.processes[failure.who]
        self._note("raised", process, str(failure), {})
        self._spend(failure.who, "data", failure)
        self.say(f"  [yellow]failed[/] {failure}; another process does it once more, from the last checkpoint")
        self._replace(self._group(failure.who))

    def _spend(self, name: str, kind: Kind, failure: RoleFailed) -> None:
        role = role_of(name)
        if not self.budget.spend(role, kind):
            limit = self.budget.limit(kind)
            if not limit:
                raise GivenUp(str(failure), failure.who, failure.trace) from failure
            raise GivenUp(
                f"{failure}. Role {role} failed more than {limit} times within {self.faults.window_s:g} s (faults.{kind})",
                failure.who,
                failure.trace,
            ) from failure

    def _group(self, name: str) -> list[str]:
        """The processes that cannot do without each other, of which this is one."""
        roles = {role_of(name)}
        if roles <= {"learner", "rollout"} and not self.separate:
            roles = {"learner", "rollout"}
        elif "rollout" in roles:
            return [name]
        return [other for other in self.processes if role_of(other) in roles]

    def _replace(self, names: Collection[str]) -> None:
        """Others in their places, which are given what they must hold as soon as they are there."""
        for name in names:
            process, health = self.processes[name], self.health[name]
            if health.state is not State.DEAD:
                health.move(State.DEAD)
            health.move(State.RESTARTING)
            self._put(process, health.incarnation)
            began = self.away[name].began if name in self.away else time.monotonic()
            room = self.places.room(PLACE_OF_THE_POOL if name == NAME else name)
            self.away[name] = _Absence(began, room, identity=process.actor.identity.remote())
            self.wait.starting.add(name)
            self._watch(RESTART, process, self.away[name].identity, partial(self._up, name, health.incarnation))
            self._keep_vigil(process)
        for role in sorted({role_of(name) for name in names}):
            self._refit(role, [name for name in names if role_of(name) == role])

    def _put(self, process: Process, incarnation: int) -> None:
        """Another process in a place: a spare one that is up, else one that is asked for now."""
        name = process.identity.name
        if name in self.spares:
            spare, identity = self.spares.pop(name)
            if ray.wait([identity], timeout=0)[0]:
                self.places.take_over(process, spare, incarnation)
                return
            self.places.release(spare)
        if self.pool is not None and name == NAME:
            self.pool.respawn(self.places, incarnation)
        else:
            self.places.respawn(process, incarnation)

    def _refit(self, role: str, names: Collection[str]) -> None:
        """Give processes that are about to come what they must hold. Their calls keep their order, so work may follow at once."""
        if self.pool is not None and role == "rollout":
            self._fitted(self.pool.process, self.pool.refit())
            return
        if role == "rollout":
            for name in names:
                self._refit_engine(name)
            return
        if role == "scorer":
            self._fitted(self.roles.scorer.process, self.roles.scorer.refit())
            return
        ranked = self.roles.learner if role == "learner" else self.roles.reward
        for process, ref in ranked.regroup():
            self._fitted(process, ref)
        if role == "learner":
            self.wait.watch(RESTART, _quiet(self.load_learner()))

    def _refit_engine(self, name: str) -> None:
        engines, process, incarnation = self.engines, self.processes[name], self.health[name].incarnation
        assert engines is not None, "an elastic pool replaces its own"
        engines.leave(name)
        ref, version = engines.refit(process)

        def loaded(answer: Any) -> None:
            if version != engines.version:
                self._refit_engine(name)  # there are newer weights by now
            else:
                self._healthy(name, incarnation)

        def failed(failure: RoleFailed) -> None:
            """Whoever laid the weights out is gone: the next ones come when he is there again."""
            self.say(f"  [yellow]note[/] {name} waits for weights: {failure}")
            self.unfit[name] = (incarnation, engines.weights)

        self._watch(RESTART, process, process.actor.identity.remote() if ref is None else ref, loaded, failed)

    def _refit_the_unfit(self) -> None:
        """Engines that could not be given the weights of their time are given the next ones."""
        for name, (incarnation, weights) in list(self.unfit.items()):
            if not self.health[name].admits(incarnation):
                del self.unfit[name]
            elif self.engines is not None and self.engines.weights is not weights:
                del self.unfit[name]
                self._refit_engine(name)

    def _fitted(self, process: Process, ref: Any) -> None:
        name = process.identity.name
        self._watch(RESTART, process, ref, lambda answer: self._healthy(name, process.identity.incarnation))

    def _watch(
        self,
        phase: str,
        process: Process,
        ref: Any,
        on_answer: Callable[[Any], None],
        on_failure: Callable[[RoleFailed], None] | None = None,
    ) -> None:
        identity = process.identity
        pending = Pending((ref,), (identity.name,), (identity.node,), only, on_answer=on_answer, on_failure=on_failure)
        self.wait.watch(phase, _quiet(pending))

    def _keep_vigil(self, process: Process) -> None:
        """Learn of its death at once."""
        self._watch(VIGIL, process, process.actor.vigil.remote(), lambda answer: None)

    def _up(self, name: str, incarnation: int, identity: Identity) -> None:
        """A process is there; it may not hold yet what it must."""
        health = self.health[name]
        if health.state is not State.RESTARTING or not health.admits(incarnation):
            return
        health.move(State.STALE)
        self.processes[name].identity = identity
        self.wait.starting.discard(name)
        self.away[name].up = time.monotonic()
        self.identified()

    def _healthy(self, name: str, incarnation: int) -> None:
        """A process holds all that it must."""
        health = self.health[name]
        if not health.admits(incarnation):
            return
        absence = self.away[name]
        if health.state is State.RESTARTING:  # this answer came before the one that says who it is
            self._up(name, incarnation, ray.get(absence.identity))
        health.move(State.HEALTHY)
        if self.engines is not None:
            self.engines.come(name)
        now, process = time.monotonic(), self.processes[name]
        del self.away[name]
        assert absence.up is not None, "it was up before it held anything"
        values = {"faults/recovery_seconds": now - absence.began, "faults/start_seconds": absence.up - absence.began}
        self._note("back", process, f"incarnation {incarnation}", values)
        took = f"{now - absence.began:.1f} s after its loss was noticed ({absence.up - absence.began:.1f} s until it was up)"
        self.say(f"  [green]back[/] {name} on node {process.identity.node[:8]}, {took}")

    def _answers_again(self, process: Process, lost: RoleLost) -> bool:
        """Whether a process that could not be reached is there after all, and its call may be made again."""
        name = process.identity.name
        health, until = self.health[name], time.monotonic() + self.faults.suspect_s
        if health.state is State.RESTARTING:
            return False
        health.move(State.SUSPECT)
        before = State.STALE if name in self.away else State.HEALTHY
        while time.monotonic() < until:
            try:
                ray.get(process.actor.identity.remote(), timeout=PING_S)
            except ActorUnavailableError:
                time.sleep(PING_S)
            except GetTimeoutError:
                continue
            except RayActorError:
                return False
            else:
                health.move(before)
                self._note("cleared", process, lost.why, {})
                self.say(f"  {name} could not be reached for a while, and answers again")
                return True
        return False

    def _give_up(self, process: Process, lost: RoleLost) -> None:
        """There is no room for another one: an engine's place stays empty if others serve, and the run ends for any other.

        Raises:
            GivenUp: if nobody else does its work.
        """
        name = process.identity.name
        serving = [] if self.engines is None else self.engines.serving()
        others = [engine for engine in serving if engine.identity.name not in self.wait.starting]
        if role_of(name) != "rollout" or not others:
            raise GivenUp(str(lost), name) from lost
        self.health[name].move(State.DEAD)
        self.wait.starting.discard(name)
        ray.kill(process.actor)
        self._note("given up", process, lost.why, {})
        self.say(f"  [yellow]given up[/] {name}: {lost.why}; {len(others)} engines go on")

    def _refused(self, name: str) -> None:
        """An answer came that nobody may take."""
        self.num_stale += 1
        process = self.processes[name]
        self._note("stale reply", process, "of a call that was given up", {"faults/stale_replies": float(self.num_stale)})

    def _note(self, event: str, process: Process, why: str, values: dict[str, float]) -> None:
        self.note(Fault(event, process.identity.name, process.identity.node, why, values))


def _id(process: Process) -> str:
    """Ray's id of the actor in a place."""
    name: str = process.actor._actor_id.hex()
    return name


def _quiet(pending: Pending[Any]) -> Pending[Any]:
    """Work that nobody waits for, and of which the timeline says nothing."""
    return replace(pending, news=True, spans=lambda answer: ())
