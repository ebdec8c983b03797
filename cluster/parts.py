"""Parts of work that processes have been asked for: who has which now, since what a lost process had is asked of another."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:
    from cluster.waiting import Pending


@dataclass(frozen=True)
class Again:
    """A part that is asked for again.

    Args:
        ref: of the answer.
        name: of the process that is asked.
        node: where it runs; "" where that is not known yet.
        actor: it.
    """

    ref: Any
    name: str
    node: str
    actor: Any


@dataclass(frozen=True)
class Part:
    """What one process was asked for.

    Args:
        phase: the metric's name.
        pending: the work that it is a part of.
        slot: its place in that work.
        name: of the process that has it.
        node: where that runs.
        actor: it, where it took the part over from another; None = one of the work's own.
    """

    phase: str
    pending: Pending[Any]
    slot: int
    name: str
    node: str
    actor: Any = None

    @property
    def origin(self) -> Any:
        """The reference by which the work's owner knows the part."""
        return self.pending.refs[self.slot]


def asked_of(ref: Any) -> str:
    """Ray's id of the actor that was asked for what a reference is of."""
    name: str = ref.task_id().actor_id().hex()
    return name


def parts_of(phase: str, pending: Pending[Any]) -> dict[Any, Part]:
    """The parts of some work, by reference."""
    rows = enumerate(zip(pending.refs, pending.names, pending.nodes, strict=True))
    return {ref: Part(phase, pending, slot, name, node) for slot, (ref, name, node) in rows}


class Fence:
    """Answers that nobody may take any more: of processes that were replaced, and of work that was given up.

    The answer to a call is tied to the process that was asked, so a call that is behind the fence is out for good, whatever comes
    of it. What comes all the same is counted.

    Args:
        refused: called with the name of each process whose answer was refused.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        self.refused = refused
        self._out: dict[Any, str] = {}

    def put(self, refs: Collection[Any], name: str) -> None:
        """Refuse what these come to."""
        self._out |= dict.fromkeys(refs, name)

    def look(self) -> None:
        """Count what has come; an error is no answer."""
        if not self._out:
            return
        for ref in ray.wait(list(self._out), num_returns=len(self._out), timeout=0)[0]:
            name = self._out.pop(ref)
            try:
                ray.get(ref)
            except RayError:
                continue
            self.refused(name)


def moved(parts: dict[Any, Part], who: str, actor: str) -> list[Any]:
    """Ask again for what a process had.

    Args:
        parts: by reference; each that is asked for again takes the old one's place in it.
        who: the process's place.
        actor: Ray's id of the one that was lost; what its successor is asked for stays as it is.

    Returns:
        The references that are no longer waited for.
    """
    left: list[Any] = []
    works = {id(part.pending): part.pending for ref, part in parts.items() if asked_of(ref) == actor}
    for pending in works.values():
        held = {part.slot: ref for ref, part in parts.items() if part.pending is pending}
        mine = frozenset(slot for slot, ref in held.items() if asked_of(ref) == actor)
        for slot, again in pending.redo(who, mine).items():
            if slot in held:  # a rank that had answered works again only since the others need it
                old = parts.pop(held[slot])
                parts[again.ref] = replace(old, name=again.name, node=again.node, actor=again.actor)
                left.append(held[slot])
    return left
