"""Waiting for roles: the one place where the driver blocks, times phases, shows progress and explains failures."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.process import Progress
from cluster.console import Bar, Console
from cluster.signals import EXIT_TERMINATED, terminated
from tokens.errors import UserError

T = TypeVar("T")
POLL_S = 0.5
FINAL_S = 2.0
"""Longest wait for the last word on a phase's progress."""
DEATH_S = 5.0
"""How long Ray may need to notice that a process has died, after those that worked with it have."""


def no_space(error: BaseException) -> bool:
    """True if an error of a role means that the disk, or one's share of it, is full; safetensors has the number in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


class RoleFailed(RuntimeError):
    """A role died, raised or did not answer in time. Says which, where, in what phase, and where its log is."""


@dataclass(frozen=True)
class Pending(Generic[T]):
    """Work that was handed to processes of one role.

    Args:
        refs: one per process.
        names: of the processes, in the same order.
        nodes: where they run.
        combine: makes the answer of the processes' answers.
        progress_of: the actors to ask how far they are; may be none.
        on_answer: called with each process's answer as it comes.
    """

    refs: tuple[Any, ...]
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    combine: Callable[[list[Any]], T]
    progress_of: tuple[Any, ...] = ()
    on_answer: Callable[[Any], None] = lambda answer: None


class Waiter:
    """Waits, times, shows.

    Args:
        console: to show progress on.
        logs: directory of the processes' log files.
        deadline_s: longest that a call may go without progress.
    """

    def __init__(self, console: Console, logs: Path, deadline_s: float) -> None:
        self.console, self.logs, self.deadline_s = console, logs, deadline_s
        self.seconds: dict[str, float] = defaultdict(float)
        self.place = "start"

    def begin(self, place: str) -> None:
        """Forget the times of the last round; ``place`` names the new one in error messages."""
        self.seconds = defaultdict(float)
        self.place = place

    def __call__(self, phase: str, pending: Pending[T], bar: Bar | None = None) -> T:
        """Wait for one piece of work; its seconds are added to ``phase``.

        Args:
            phase: the metric's name.
            pending: the work.
            bar: a bar that shows the processes' own progress; None shows nothing.

        Raises:
            UserError: what a role raised as such, or a full disk.
            RoleFailed: anything else that went wrong.
            SystemExit: if SIGTERM has come.
        """
        began = moved = time.perf_counter()
        answers: dict[Any, Any] = {}
        waiting = list(pending.refs)
        asked: list[Any] = []
        said: list[Progress] = []
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S if bar else 5.0)
            if terminated():
                raise SystemExit(EXIT_TERMINATED)
            for ref in ready:
                answers[ref] = self._get(ref, pending, phase)
                pending.on_answer(answers[ref])
            before = said
            said, asked = self._listen(pending, said, asked)
            if ready or said != before:
                moved = time.perf_counter()
            if waiting and time.perf_counter() - moved > self.deadline_s:
                late = pending.refs.index(waiting[0])
                what = f"no progress for {self.deadline_s:g} s (resources.deadline_s)"
                raise RoleFailed(self._words(pending.names[late], pending.nodes[late], phase, what))
            if bar:
                bar.show(said)
        if bar:
            bar.show(self._listen(pending, said, [actor.progress.remote() for actor in pending.progress_of], FINAL_S)[0])
        self.seconds[phase] += time.perf_counter() - began
        return pending.combine([answers[ref] for ref in pending.refs])

    def _listen(
        self, pending: Pending[Any], said: list[Progress], asked: list[Any], timeout: float = 0.0
    ) -> tuple[list[Progress], list[Any]]:
        """What the processes last said of their progress, and the question that is open now."""
        if asked and len(ray.wait(asked, num_returns=len(asked), timeout=timeout)[0]) < len(asked):
            return said, asked
        with contextlib.suppress(RayActorError):  # the work's own reference tells what happened
            said = ray.get(asked) if asked else said
        return said, [actor.progress.remote() for actor in pending.progress_of]

    def _get(self, ref: Any, pending: Pending[Any], phase: str) -> Any:
        index = pending.refs.index(ref)
        name, node = pending.names[index], pending.nodes[index]
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if no_space(cause):
                raise OSError(errno.ENOSPC, str(cause)) from error
            self._blame_the_dead(ref, pending, phase)
            raise RoleFailed(self._words(name, node, phase, f"{type(cause).__name__}: {cause}")) from error
        except RayActorError as error:
            raise RoleFailed(self._words(name, node, phase, f"its process died ({error})")) from error
        except RayError as error:
            raise RoleFailed(self._words(name, node, phase, f"{type(error).__name__}: {error}")) from error

    def _blame_the_dead(self, failed: Any, pending: Pending[Any], phase: str) -> None:
        """Fail in the name of another process of the role that has died: the one that raised may only have waited for it."""
        others = [ref for ref in pending.refs if ref != failed]
        for ref in ray.wait(others, num_returns=len(others), timeout=DEATH_S)[0] if others else []:
            try:
                ray.get(ref)
            except RayActorError as error:
                index = pending.refs.index(ref)
                what = f"its process died ({error})"
                raise RoleFailed(self._words(pending.names[index], pending.nodes[index], phase, what)) from error
            except RayTaskError:
                continue

    def _words(self, name: str, node: str, phase: str, what: str) -> str:
        return f"{name} on node {node[:8]} failed in {self.place}, phase {phase}: {what}. Its log: {self.logs / name}.log"
