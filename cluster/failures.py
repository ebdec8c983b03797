"""A role's failure in words: which process, on which machine, at what point of the run, why, and where its log is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskUnschedulableError,
)

from tokens.guards import BadNumber

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
REFUSED = (RuntimeEnvSetupError, ActorUnschedulableError, TaskUnschedulableError)
"""What Ray cannot do however often it is asked."""
SHOWN_LINES = 8
"""Of a traceback, at its end, that the driver prints; the log file has all of it."""


class RoleFailed(RuntimeError):
    """A role died, raised or did not answer in time. Says which, where, in what phase, and where its log is.

    Args:
        words: all of that, in one line.
        who: the process; the driver where it found the fault itself.
        trace: of the exception in the process; "" where there is none.
    """

    def __init__(self, words: str, who: str = "driver", trace: str = "") -> None:
        super().__init__(words)
        self.who, self.trace = who, trace

    def shown(self) -> str:
        """The last lines of the traceback, each on a line of its own; "" where there is none."""
        lines = self.trace.rstrip().splitlines()
        cut = [f"  ... {len(lines) - SHOWN_LINES} lines more in the log"] if len(lines) > SHOWN_LINES else []
        return "".join(f"{line}\n" for line in cut + lines[-SHOWN_LINES:])


How = Literal["died", "hung", "unreachable", "moved"]
"""What became of a process: it or its machine is gone; it lives and does nothing; nobody knows; its machine is about to go, and
another one is there to take its place."""


class RoleLost(RoleFailed):
    """A process is gone for reasons that lie outside of the work: another one in its place can do it.

    Args:
        words: as of ``RoleFailed``.
        who: the process.
        trace: as of ``RoleFailed``.
        how: what became of it.
        why: the same in words, without the place.
        actor: Ray's id of it; there may be another one in its place by now.
    """

    def __init__(self, words: str, who: str, trace: str, how: How, why: str, actor: str) -> None:
        super().__init__(words, who, trace)
        self.how, self.why, self.actor = how, why, actor


class GivenUp(RoleFailed):
    """A failure that is not made good any more; the same command continues the run."""


class BadNumbers(RoleFailed):
    """A number went wrong in a role, which found it by itself and lives.

    Args:
        words: as of ``RoleFailed``.
        bad: the number, and whether weights have to be put back.
        who: the process; the driver where it found the number itself.
        trace: as of ``RoleFailed``.
    """

    def __init__(self, words: str, bad: BadNumber, who: str = "driver", trace: str = "") -> None:
        super().__init__(words, who, trace)
        self.bad = bad


@dataclass(frozen=True)
class Place:
    """Where something failed.

    Args:
        process: its name, e.g. ``learner-1``: the role, and which of its processes.
        node: Ray's id of the machine; "" where that is not known.
        when: e.g. ``round 3``.
        step: PPO step; None outside of them.
        phase: the metric's name.
        log: the process's log file.
    """

    process: str
    node: str
    when: str
    step: int | None
    phase: str
    log: Path

    def failure(self, what: str, error: BaseException | None = None) -> RoleFailed:
        """The failure, to be raised; the exception's traceback is added to the log.

        Args:
            what: happened, in words; "" takes them from ``error``.
            error: what Ray raised.
        """
        words, trace = self._written(what, error)
        return RoleFailed(words, self.process, trace)

    def loss(self, how: How, actor: str, what: str, error: BaseException | None = None) -> RoleLost:
        """The loss of the process; the arguments are those of ``failure``, and what became of which actor."""
        words, trace = self._written(what, error)
        return RoleLost(words, self.process, trace, how, what or reason(error), actor)

    def bad_number(self, bad: BadNumber, error: BaseException) -> BadNumbers:
        """A number that went wrong in the process.

        Args:
            bad: the number.
            error: what Ray raised.
        """
        words, trace = self._written(str(bad), error)
        return BadNumbers(words, bad, self.process, trace)

    def _written(self, what: str, error: BaseException | None) -> tuple[str, str]:
        words, trace = self.words(what or reason(error), error), trace_of(error)
        if trace:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as log:
                log.write(f"{words}\n{trace.rstrip()}\n")
        return f"{words}. Its log: {self.log}", trace

    def words(self, what: str, error: BaseException | None) -> str:
        """One line."""
        role, _, rank = self.process.rpartition("-")
        whose = f" (role {role}, rank {rank})" if role and rank.isdigit() else ""
        where = machine(self.node) if self.node else address_in(error)
        at = f"{self.when}, step {self.step}" if self.step is not None else self.when
        return f"{self.process}{whose}{f' on node {where}' if where else ''} failed in {at}, phase {self.phase}: {what}"


def machine(node: str) -> str:
    """A machine by address, name and the start of Ray's id, as far as the cluster knows it."""
    for known in ray.nodes():
        if known["NodeID"] == node:
            return f"{known['NodeManagerAddress']} ({known['NodeManagerHostname']}, {node[:8]})"
    return node[:8]


def address_in(error: BaseException | None) -> str:
    """The address of the machine that an error of Ray comes from; "" where it does not say."""
    found = re.search(r"\bip[:=] ?([0-9a-fA-F.:]+)", str(error)) if error else None
    return found[1] if found else ""


def lost_with(error: BaseException) -> bool:
    """Whether what Ray raised says that a process, a machine or an object on it is gone, and nothing of the work itself."""
    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    return isinstance(error, RayError) and not isinstance(error, (RayTaskError, *REFUSED))


def trace_of(error: BaseException | None) -> str:
    """For the log, without colours: the traceback in the process, or all that Ray knows of its death."""
    return COLOUR.sub("", str(error)) if isinstance(error, (RayTaskError, RayActorError)) else ""


def reason(error: BaseException | None) -> str:
    """Why, in one line: the exception in the process, or what Ray says of its death."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if isinstance(error, RayActorError):
        return f"its process died: {lines[-1].partition(' Some common causes')[0]}"
    return f"{type(error).__name__}: {' '.join(lines)}"
