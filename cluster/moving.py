"""Nodes that are about to go: other processes are asked for in time, and take over when they are up."""

from __future__ import annotations

from collections.abc import Collection

import ray

from actors.pool import NAME
from cluster.failures import RoleLost
from cluster.health import State
from cluster.replacing import Replacing
from cluster.telemetry import role_of


class Moving:
    """Moves processes off nodes that are about to go.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: Replacing) -> None:
        self.all = processes
        self.save_soon = False
        self._warned: set[str] = set()

    def warned(self, nodes: Collection[str]) -> None:
        """Nodes are about to go: others are asked for in the places of their processes, and take over when they are up.

        Meanwhile engines there get no new work while others serve, and the learner is saved after its step. Ranks that share a
        model do not move; they are replaced when their node is gone.

        Args:
            nodes: Ray's ids; those of before that are not among them stay after all, or are gone.
        """
        there = {name for name, process in self.all.processes.items() if process.identity.node in nodes}
        if self.all.engines is not None:
            self.all.engines.leaving = {name for name in there if role_of(name) == "rollout"}
        learners = {name for name in there if role_of(name) == "learner"}
        self.save_soon = self.save_soon or bool(learners - self._warned)
        self._warned = learners
        for name in self.all.spares.keys() - there:
            self.all.places.release(self.all.spares.pop(name)[0])
        for name in sorted(there - self.all.spares.keys() - {NAME}):
            if self.all.health[name].state is State.HEALTHY and self.all.group(name) == [name]:
                spare = self.all.places.spare(name, self.all.health[name].incarnation + 1)
                self.all.spares[name] = (spare, spare.identity.remote())

    def _up(self) -> list[str]:
        """Places for which another process is there."""
        up = [name for name, (_, identity) in self.all.spares.items() if ray.wait([identity], timeout=0)[0]]
        return [name for name in up if self.all.health[name].state is State.HEALTHY]

    def _move(self, name: str) -> RoleLost:
        node = self.all.processes[name].identity.node
        return self.all.lost(name, "moved", f"node {node[:8]} is about to go")

    def look(self) -> None:
        """Move whoever can.

        Raises:
            RoleLost: of a process that another one takes over from; the learner waits until it is saved.
        """
        for name in self._up():
            if role_of(name) != "learner":
                raise self._move(name)

    def saving_is_due(self) -> bool:
        """Whether what the learner holds should be saved now: its node was just said to go, or another one can take over."""
        due, self.save_soon = self.save_soon, False
        return due or any(role_of(name) == "learner" for name in self._up())

    def move_learner(self) -> None:
        """What the learner holds is saved: the moment to go on in another process, if one is there for it.

        Raises:
            RoleLost: then the round goes on from what was saved.
        """
        for name in self._up():
            if role_of(name) == "learner":
                self.all.wait.lose(self._move(name))
