"""How a process stands, and how often a role may fail: plain bookkeeping, without Ray.

HEALTHY -> SUSPECT -> DEAD -> RESTARTING -> STALE -> (it is given what it must hold) -> HEALTHY
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from enum import Enum
from typing import Literal

from pydantic import Field

from tokens.section import Section

Kind = Literal["infrastructure", "data"]
"""Why something failed: a process or machine is gone, or a role raised an error at its work."""


class FaultsConfig(Section):
    """What is made good when a process or a machine is lost, and how often. docs/faults.md."""

    infrastructure: int = Field(5, ge=0)
    """Processes that one role may lose within ``window_s``; one more ends the run, which the same command continues. 0 = every
    death ends it."""
    data: int = Field(1, ge=0)
    """Errors that one role may raise at its work within one round: another process does it once more, from the last checkpoint.
    An error that comes again before the round is committed ends the run, however long that takes."""
    window_s: float = Field(3600.0, gt=0)
    """How long a process that was lost counts, s."""
    suspect_s: float = Field(30.0, gt=0)
    """How long a process that Ray cannot reach may take to answer again before it is taken for dead, s."""
    restart_s: float = Field(1800.0, gt=0)
    """How long a process may take to be there again, s; a wait for room counts. After that an engine's place stays empty if
    others serve, and the run ends for any other."""
    storage_s: float = Field(300.0, gt=0)
    """How long a directory that gives errors, as a mount does whose server is away, is waited for before the run ends, s."""


class State(Enum):
    """How a process stands."""

    HEALTHY = "healthy"
    """It works, or could."""
    SUSPECT = "suspect"
    """It cannot be reached, or does not get on with its work."""
    DEAD = "dead"
    """It is gone, or ended by us; what it says from now on is not listened to."""
    RESTARTING = "restarting"
    """Another one was asked for in its place."""
    STALE = "stale"
    """That is there, and does not hold yet what it needs: the current weights, the ensemble."""


EDGES: dict[State, frozenset[State]] = {
    State.HEALTHY: frozenset({State.SUSPECT, State.DEAD}),
    State.SUSPECT: frozenset({State.HEALTHY, State.STALE, State.DEAD}),
    State.DEAD: frozenset({State.RESTARTING}),
    State.RESTARTING: frozenset({State.STALE, State.DEAD}),
    State.STALE: frozenset({State.HEALTHY, State.SUSPECT, State.DEAD}),
}
"""Where each state may lead. From SUSPECT it goes back to where it came from; nothing serves that was not given what it needs."""


class ForbiddenEdge(RuntimeError):
    """A process was said to be in a state that it cannot have come to."""


class Health:
    """How one process stands.

    Args:
        name: of its place.
        state: to begin with.
    """

    def __init__(self, name: str, state: State = State.HEALTHY) -> None:
        self.name, self.state, self.incarnation = name, state, 1
        self._before_suspicion = state

    def move(self, to: State) -> None:
        """Go to another state; from DEAD to RESTARTING there is one incarnation more.

        Args:
            to: the state.

        Raises:
            ForbiddenEdge: if this one does not lead there.
        """
        allowed = EDGES[self.state]
        if self.state is State.SUSPECT:
            allowed = frozenset({self._before_suspicion, State.DEAD})
        if to not in allowed:
            ways = ", ".join(sorted(state.value for state in allowed))
            raise ForbiddenEdge(f"{self.name} is {self.state.value} and cannot become {to.value}; from there: {ways}")
        if to is State.SUSPECT:
            self._before_suspicion = self.state
        if to is State.RESTARTING:
            self.incarnation += 1
        self.state = to

    def admits(self, incarnation: int) -> bool:
        """Whether the word of a process of this place is listened to: it must be the one that is there now, and not be dead."""
        return incarnation == self.incarnation and self.state is not State.DEAD


class Budget:
    """How often each role may still fail.

    Args:
        faults: the limits.
        clock: seconds that only go forward.
    """

    def __init__(self, faults: FaultsConfig, clock: Callable[[], float]) -> None:
        self.faults, self.clock = faults, clock
        self._times: dict[tuple[str, Kind], list[float]] = defaultdict(list)

    def limit(self, kind: Kind) -> int:
        """How many failures of a kind one role may have within the window."""
        return self.faults.infrastructure if kind == "infrastructure" else self.faults.data

    def spend(self, role: str, kind: Kind) -> bool:
        """A role has failed.

        Args:
            role: that has.
            kind: why.

        Returns:
            Whether it may be made good; False leaves the run to end.
        """
        now = self.clock()
        times = self._times[role, kind]
        times[:] = [*(time for time in times if kind == "data" or now - time < self.faults.window_s), now]
        return len(times) <= self.limit(kind)

    def committed(self) -> None:
        """A round is done: what was raised in it did not come again."""
        for role, kind in self._times:
            if kind == "data":
                self._times[role, kind].clear()
