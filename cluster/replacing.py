"""Another process in a place, and all that it must hold before it is healthy again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from actors.pool import NAME
from actors.process import Identity
from cluster.failures import How, RoleFailed, RoleLost
from cluster.fixed_pool import FixedPool
from cluster.health import Health, State
from cluster.pool import ElasticPool, Places
from cluster.roles import Roles, only
from cluster.rota import Process
from cluster.telemetry import role_of
from cluster.waiting import VIGIL, Pending, Room, Waiter

MOVE = "move"
"""The phase of what makes room on a shared device for a process that comes."""
RESTART = "restart"
"""The phase of what a process does before it is healthy again."""
PLACE_OF_THE_POOL = "rollout-0"
"""What an elastic pool waits for room for: its first engine."""


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
class Absence:
    """A process that is away."""

    began: float
    room: Room
    up: float | None = None
    identity: Any = None


class Replacing:
    """The processes of a run, how they stand, and others in their places.

    Args:
        places: where processes are put.
        roles: that there are.
        wait: waits for them.
        load_learner: asks a learner that has just come to load its models.
        separate: False where weights go directly from learner to engines, so that neither does without the other.
        note: writes a fault down.
        say: prints a line.
        identified: called when processes have other ids than before.
    """

    def __init__(
        self,
        places: Places,
        roles: Roles,
        wait: Waiter,
        load_learner: Callable[[], Pending[None]],
        separate: bool,
        note: Callable[[Fault], None],
        say: Callable[[str], None],
        identified: Callable[[], None],
    ) -> None:
        self.places, self.roles, self.wait, self.load_learner, self.separate = places, roles, wait, load_learner, separate
        self.write_down, self.say, self.identified = note, say, identified
        self.engines = roles.rollout if isinstance(roles.rollout, FixedPool) else None
        self.pool = roles.rollout if isinstance(roles.rollout, ElasticPool) else None
        """It replaces its engines by itself (``actors.pool``), and is replaced with all of them."""
        others = [each for each in roles.processes if self.engines is not None or role_of(each.identity.name) != "rollout"]
        mine = others if self.pool is None else [*others, self.pool.process]
        self.processes = {process.identity.name: process for process in mine}
        self.health = {name: Health(name) for name in self.processes}
        self.away: dict[str, Absence] = {}
        self.spares: dict[str, tuple[Any, Any]] = {}
        """Processes that may take over where a node is about to go, with references of their identities."""
        self.unfit: dict[str, tuple[int, int]] = {}
        """Engines whose weights were lost on the way: incarnation, and which weights those were (``FixedPool.num_loads``)."""
        self.free_since = 0.0
        """When the last process that comes had the device to itself, on the monotonic clock, s."""
        for process in self.processes.values():
            self.keep_vigil(process)

    def group(self, name: str) -> list[str]:
        """The processes that cannot do without each other, of which this is one."""
        roles = {role_of(name)}
        if roles <= {"learner", "rollout"} and not self.separate:
            roles = {"learner", "rollout"}
        elif roles & {"rollout", "scorer"}:
            return [name]
        return [other for other in self.processes if role_of(other) in roles]

    def replace(self, names: Collection[str]) -> None:
        """Others in their places, which are given what they must hold as soon as they are there."""
        for name in names:
            process, health = self.processes[name], self.health[name]
            if health.state is not State.DEAD:
                health.move(State.DEAD)
            health.move(State.RESTARTING)
            self.wait.drop(id_of(process))
            self._put(process, health.incarnation)
            self.roles.rota.came(name)
            began = self.away[name].began if name in self.away else time.monotonic()
            room = self.places.room(PLACE_OF_THE_POOL if name == NAME else name)
            self.away[name] = Absence(began, room, identity=process.actor.identity.remote())
            self.wait.starting.add(name)
            self._watch(RESTART, process, self.away[name].identity, partial(self._up, name, health.incarnation))
            self.keep_vigil(process)
        for role in sorted({role_of(name) for name in names}):
            self._refit(role, [name for name in names if role_of(name) == role])

    def replace_the_unfitted(self) -> None:
        """Others in the places of processes that are up, but could not be given what they must hold, and are given it no more."""
        trying = self.wait.watched(RESTART) | self.unfit.keys()
        left = [name for name in self.away if name not in trying and self.health[name].state is not State.DEAD]
        self.replace(sorted({member for name in left for member in self.group(name)}))

    def unfitted_for(self, seconds: float) -> list[str]:
        """Processes that could have been given long ago what they must hold.

        The time of one that needs others, or a device that others hold, runs from when those are there.

        Args:
            seconds: how long ago.
        """
        before, busy = time.monotonic() - seconds, self.wait.watched(MOVE)
        if busy:
            self.free_since = time.monotonic()
        late: list[str] = []
        for name in self.away.keys() - self.unfit.keys():
            ups = [self.away[member].up for member in self.group(name) if member in self.away]
            there = [up for up in ups if up is not None]
            if self.health[name].state is State.STALE and len(there) == len(ups) and max(*there, self.free_since) < before:
                late.append(name)
        return sorted(late)

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
        """Give processes that are about to come what they must hold.

        Work may be asked for at once: the calls of a role keep their order, and samples wait for what was loaded before them.
        """
        if self.pool is not None and role == "rollout":
            self._fitted(self.pool.process, self.pool.refit())
            return
        if role == "rollout":
            if self.separate:
                self._turn(role)
            for name in names:
                self._refit_engine(name)
            return
        if role == "scorer":
            self._turn(role)
            for name in names:
                self._fitted(self.processes[name], self.roles.scorer.refit(self.processes[name]))
            return
        if role == "reward":
            for process, ref in self.roles.reward.regroup():
                self._fitted(process, ref)
            return
        for process, ref in self.roles.learner.regroup():
            self._watch(RESTART, process, ref, lambda answer: None)
        loading = self.load_learner()
        calls = list(zip(loading.names, loading.refs, strict=True))
        moves = len(calls) - len(self.roles.learner.ranks)  # that make room on a device for it, and wake it
        for name, ref in calls[:moves]:
            self._watch(MOVE, self.processes[name], ref, lambda answer: None)
        for name, ref in calls[moves:]:
            self._fitted(self.processes[name], ref)

    def _turn(self, role: str) -> None:
        """Give the device to a role before one of its processes loads: calls keep their order."""
        moves = self.roles.rota.turn(role)
        for name, ref in zip(moves.names, moves.refs, strict=True):
            self._watch(MOVE, self.processes[name], ref, lambda answer: None)

    def _refit_engine(self, name: str) -> None:
        engines, process, incarnation = self.engines, self.processes[name], self.health[name].incarnation
        assert engines is not None, "an elastic pool replaces its own"
        if not self.separate:  # the learner has come anew with it, and its next sync brings all engines their weights
            self._fitted(process, process.actor.identity.remote())
            return
        engines.leave(name)
        ref, given = engines.refit(process), engines.num_loads

        def loaded(answer: Any) -> None:
            if given != engines.num_loads:
                self._refit_engine(name)  # there are newer weights by now
            else:
                self._healthy(name, incarnation)

        def failed(failure: RoleFailed) -> None:
            """Whoever laid the weights out is gone: the next ones come when he is there again."""
            self.say(f"[yellow]note[/] {name} waits for weights: {failure}")
            self.unfit[name] = (incarnation, given)

        self._watch(RESTART, process, ref, loaded, failed)

    def refit_the_unfit(self) -> None:
        """Engines that could not be given the weights of their time are given the next ones."""
        for name, (incarnation, given) in list(self.unfit.items()):
            if not self.health[name].admits(incarnation):
                del self.unfit[name]
            elif self.engines is not None and self.engines.num_loads != given:
                del self.unfit[name]
                self._refit_engine(name)

    def _fitted(self, process: Process, ref: Any) -> None:
        name, incarnation = process.identity.name, process.identity.incarnation
        self._watch(RESTART, process, ref, lambda answer: self._healthy(name, incarnation))

    def _watch(
        self,
        phase: str,
        process: Process,
        ref: Any,
        on_answer: Callable[[Any], None],
        on_failure: Callable[[RoleFailed], None] | None = None,
    ) -> None:
        identity = process.identity
        pending = Pending((ref,), (identity.name,), (identity.node,), only, on_answer=on_answer, on_failure=on_failure, news=True)
        self.wait.watch(phase, replace(pending, spans=lambda answer: ()))  # the timeline says nothing of it

    def keep_vigil(self, process: Process) -> None:
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
        self.note("back", process, f"incarnation {incarnation}", values)
        took = f"{now - absence.began:.1f} s after its loss was noticed ({absence.up - absence.began:.1f} s until it was up)"
        self.say(f"  back {name} on node {process.identity.node[:8]}, {took}")

    def note(self, event: str, process: Process, why: str, values: dict[str, float]) -> None:
        """Write down what happened to a process."""
        self.write_down(Fault(event, process.identity.name, process.identity.node, why, values))

    def lost(self, name: str, how: How, why: str) -> RoleLost:
        """The loss of the process that is in a place now."""
        return RoleLost(f"{name}: {why}", name, "", how, why, id_of(self.processes[name]))


def id_of(process: Process) -> str:
    """Ray's id of the actor in a place."""
    name: str = process.actor._actor_id.hex()
    return name
