"""Who holds the device when several roles share it: before one works, the others rest. Chosen once, at set-up.

The driver waits for none of it. What a handle returns holds the moves too, ahead of the work, so that one that fails is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from actors.process import Identity
from cluster.telemetry import role_of
from cluster.waiting import Pending, shifted

T = TypeVar("T")

PARTS: Mapping[str, tuple[str, ...]] = {
    "rollout": ("weights", "kv_cache"),
    "reward": ("model",),
    "scorer": ("members",),
    "learner": ("policy", "training"),
}
"""What each role has on its device. ``training`` is critic, reference, SFT model and both optimizers' moments."""
MEETING: Mapping[str, tuple[str, ...]] = {"learner": ("policy",), "rollout": ("weights",)}
"""What must be there when weights go from the learner to the engines."""


@dataclass
class Process:
    """The process in a place. Everybody who talks to it holds this, so another one in its place is known to all at once."""

    actor: Any
    identity: Identity


@dataclass(frozen=True)
class Moves:
    """Rests and wakes that were submitted before some work.

    Args:
        refs: of their answers.
        names: of the processes.
        nodes: where they run.
    """

    refs: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def before(self, work: Pending[T]) -> Pending[T]:
        """The work, with the moves that it rests on."""
        number = len(self.refs)
        return replace(
            work,
            refs=(*self.refs, *work.refs),
            names=(*self.names, *work.names),
            nodes=(*self.nodes, *work.nodes),
            combine=lambda answers: work.combine(answers[number:]),
            redo=lambda who, parts: shifted(number, work.redo, who, parts),
        )


class Rota(Protocol):
    """Says what must move before a role works. To be asked before the work is submitted: an actor's calls keep their order."""

    def turn(self, role: str) -> Moves:
        """Give the device to one role."""

    def meet(self) -> Moves:
        """Give the device to learner and engines, as far as a sync needs it."""

    def came(self, name: str) -> None:
        """Another process was asked for in a place: it is as its role's processes are made."""


class OwnDevices:
    """Every role has devices of its own: nothing moves."""

    def turn(self, role: str) -> Moves:
        """Nothing to do."""
        return Moves()

    def meet(self) -> Moves:
        """Nothing to do."""
        return Moves()

    def came(self, name: str) -> None:
        """Nothing to remember."""


class SharedDevice:
    """The roles take turns.

    A process that wakes is handed the answers of those that rest, so Ray lets it begin when the device is free.

    Args:
        processes: of each role. Engines are made awake; the others hold nothing before their first turn.
    """

    def __init__(self, processes: Mapping[str, Sequence[Process]]) -> None:
        self.processes = processes
        self.awake: dict[str, tuple[str, ...]] = {}
        """Parts that each process has on the device, by its place."""
        for place in (process.identity.name for found in processes.values() for process in found):
            self.came(place)

    def came(self, name: str) -> None:
        """Another process was asked for in a place: an engine is made awake, the others hold nothing."""
        self.awake[name] = PARTS["rollout"] if role_of(name) == "rollout" else ()

    def turn(self, role: str) -> Moves:
        """Everybody else rests, then the role wakes."""
        return self._only({role: PARTS[role]})

    def meet(self) -> Moves:
        """Policy and engines' weights wake, all else rests."""
        return self._only(MEETING)

    def _only(self, wanted: Mapping[str, tuple[str, ...]]) -> Moves:
        target = {
            process.identity.name: wanted[role] if role in wanted else ()
            for role, found in self.processes.items()
            for process in found
        }
        everybody = [process for found in self.processes.values() for process in found]
        moved: list[tuple[Any, Process]] = []
        for process in everybody:
            name = process.identity.name
            leaving = tuple(part for part in self.awake[name] if part not in target[name])
            if leaving:
                moved.append((process.actor.rest.remote(leaving), process))
        rested = [ref for ref, _ in moved]
        for process in everybody:
            name = process.identity.name
            coming = tuple(part for part in target[name] if part not in self.awake[name])
            if target[name] and (coming or rested):
                moved.append((process.actor.wake.remote(coming, *rested), process))
        self.awake = target
        return Moves(
            tuple(ref for ref, _ in moved),
            tuple(process.identity.name for _, process in moved),
            tuple(process.identity.node for _, process in moved),
        )
