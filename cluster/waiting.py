"""Waiting for roles: the one place where the driver blocks, times phases, shows progress and explains failures."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.process import Progress
from cluster.console import Bar, Console
from cluster.failures import Place
from cluster.signals import obey_termination
from evaluation.timeline import DRIVER, Span
from tokens.errors import UserError
from tokens.guards import BadNumber

T = TypeVar("T")
POLL_S = 0.5
SAY_EVERY_S = 30.0
FINAL_S = 2.0
"""Longest wait for the last word on a phase's progress."""
DEATH_S = 5.0
"""How long Ray may need to notice that a process has died, after those that worked with it have."""


def no_space(error: BaseException) -> bool:
    """True if an error of a role means that the disk, or one's share of it, is full; safetensors has the number in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


class Room:
    """A wait for room on the cluster that talks: a pending request is what makes the autoscaler add nodes.

    Args:
        say: prints a line.
        asked: resources that the next process needs.
        limit_s: longest wait; None = as long as it takes.
    """

    def __init__(self, say: Callable[[str], None], asked: Mapping[str, float], limit_s: float | None) -> None:
        self.say, self.asked, self.limit_s = say, asked, limit_s
        self.began = self.said = time.perf_counter()

    def look(self, waiting: bool) -> None:
        """Say every 30 s what is short; to be called again and again.

        Args:
            waiting: False once there is room; the next wait counts from then.

        Raises:
            UserError: when ``resources.wait_limit_s`` has passed.
        """
        now = time.perf_counter()
        if not waiting:
            self.began = self.said = now
            return
        due, late = now - self.said >= SAY_EVERY_S, self.limit_s is not None and now - self.began >= self.limit_s
        if not (due or late):
            return
        short = self.short()
        if late:
            raise UserError(f"the cluster found no room within resources.wait_limit_s = {self.limit_s:g} s: {short}")
        self.said = now
        self.say(f"  waiting for the cluster ({now - self.began:.0f} s): {short}")

    def short(self) -> str:
        """What is asked and what is free."""
        free = ray.available_resources()
        return ", ".join(
            f"{amount:g} {key} asked, {free[key] if key in free else 0.0:g} free" for key, amount in self.asked.items()
        )


@dataclass(frozen=True)
class Pending(Generic[T]):
    """Work that was handed to processes of one role.

    Args:
        refs: one per process.
        names: of the processes, in the same order.
        nodes: where they run; "" where that is not known.
        combine: makes the answer of the processes' answers.
        progress_of: the actors to ask how far they are; may be none.
        on_answer: called with each process's answer as it comes.
        room: for work that may have to wait for room; no deadline runs while none of it has begun.
        log: name of the log file that the processes share; None where each has its own.
        step: PPO step that the work is for; None = that under way.
        submitted: when it was handed over, Unix time, s.
        spans: who made an answer, from when to when, where that was not the process that gave it; None = it was.
        news: True where nobody waits for the answer, and ``on_answer`` is all that it is for.
    """

    refs: tuple[Any, ...]
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    combine: Callable[[list[Any]], T]
    progress_of: tuple[Any, ...] = ()
    on_answer: Callable[[Any], None] = lambda answer: None
    room: Room | None = None
    log: str | None = None
    step: int | None = None
    submitted: float = field(default_factory=time.time)
    spans: Callable[[Any], Sequence[tuple[str, float, float]]] | None = None
    news: bool = False


class Waiter:
    """Waits, times, shows.

    Args:
        console: to show progress on.
        logs: directory of the processes' log files.
        deadline_s: longest that a call may go without progress.
        record: takes the span of every wait and of every process's work.
    """

    def __init__(
        self, console: Console, logs: Path, deadline_s: float, record: Callable[[Span], None] = lambda span: None
    ) -> None:
        self.console, self.logs, self.deadline_s, self.record = console, logs, deadline_s, record
        self.seconds: dict[str, float] = defaultdict(float)
        self.place = "start"
        self.round: int | None = None
        self.step: int | None = None
        self.look: Callable[[], None] = lambda: None
        """Called again and again while the driver waits."""
        self._watched: dict[Any, tuple[str, Pending[Any]]] = {}
        self._early: dict[Any, Any] = {}
        self._free_since: dict[tuple[str, str], float] = defaultdict(float)

    def begin(self, place: str, index: int | None = None) -> None:
        """Forget the times so far; ``place`` names what begins in error messages, ``index`` is its round."""
        self.seconds = defaultdict(float)
        self.place, self.round, self.step = place, index, None

    def watch(self, phase: str, pending: Pending[Any]) -> None:
        """Look out for work that is waited for later, during every wait until then.

        What it raises is raised by the wait that sees it, in the name of ``phase``; a process that dies is not found out only
        when its answer is needed.
        """
        self._watched |= dict.fromkeys(pending.refs, (phase, pending))

    def __call__(self, phase: str, pending: Pending[T], bar: Bar | None = None) -> T:
        """Wait for one piece of work; its seconds are added to ``phase``.

        Args:
            phase: the metric's name.
            pending: the work.
            bar: a bar that shows the processes' own progress; None shows nothing.

        Raises:
            UserError: what a role raised as such, a full disk, or no room within ``resources.wait_limit_s``.
            RoleFailed: anything else that went wrong.
            SystemExit: if SIGTERM has come.
        """
        began = moved = time.perf_counter()
        since = time.time()
        answers: dict[Any, Any] = {ref: self._early.pop(ref) for ref in pending.refs if ref in self._early}
        waiting = [ref for ref in pending.refs if ref not in answers]
        for ref in waiting:
            self._watched.pop(ref, None)
        asked: list[Any] = []
        said: list[Progress] = []
        while waiting:
            found, _ = ray.wait([*self._watched, *waiting], num_returns=1, timeout=POLL_S if bar else 5.0)
            obey_termination()
            self.look()
            ready = [ref for ref in found if ref not in self._watched]
            for ref in found:
                if ref in self._watched:
                    about, watched = self._watched.pop(ref)
                    answer = self._arrived(ref, about, watched)
                    if not watched.news:
                        self._early[ref] = answer
                else:
                    answers[ref] = self._arrived(ref, phase, pending)
                    waiting.remove(ref)
            before = said
            said, asked = self._listen(pending, said, asked)
            heard = bool(said) or not pending.progress_of
            queued = pending.room is not None and heard and all(progress.waiting for progress in said)
            if pending.room is not None:
                pending.room.look(queued)
            if ready or queued or said != before:
                moved = time.perf_counter()
            if waiting and time.perf_counter() - moved > self.deadline_s:
                late = pending.refs.index(waiting[0])
                what = f"no progress for {self.deadline_s:g} s (resources.deadline_s)"
                raise self._place(pending, late, phase).failure(what)
            if bar:
                bar.show(said)
        if bar:
            bar.show(self._listen(pending, said, [actor.progress.remote() for actor in pending.progress_of], FINAL_S)[0])
        self.seconds[phase] += time.perf_counter() - began
        self.record(Span(phase, DRIVER, self.round, self.step, since, time.time()))
        return pending.combine([answers[ref] for ref in pending.refs])

    def _arrived(self, ref: Any, phase: str, pending: Pending[Any]) -> Any:
        """The answer of one process. It was at work since it got the call, or since it was done with the call before."""
        answer = self._get(ref, pending, phase)
        pending.on_answer(answer)
        name, now = pending.names[pending.refs.index(ref)], time.time()
        start, step = max(pending.submitted, self._free_since[name, phase]), self.step if pending.step is None else pending.step
        self._free_since[name, phase] = now
        for who, since, until in [(name, start, now)] if pending.spans is None else pending.spans(answer):
            self.record(Span(phase, who, self.round, step, since, until))
        return answer

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
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if no_space(cause):
                raise OSError(errno.ENOSPC, str(cause)) from error
            if isinstance(cause, BadNumber):  # all ranks of a role find it together, and none of them waits for another
                raise self._place(pending, index, phase).bad_number(cause, error) from error
            self._blame_the_dead(ref, pending, phase)
            raise self._place(pending, index, phase).failure("", error) from error
        except RayError as error:
            raise self._place(pending, index, phase).failure("", error) from error

    def _blame_the_dead(self, failed: Any, pending: Pending[Any], phase: str) -> None:
        """Fail in the name of another process of the role that has died: the one that raised may only have waited for it."""
        others = [ref for ref in pending.refs if ref != failed]
        for ref in ray.wait(others, num_returns=len(others), timeout=DEATH_S)[0] if others else []:
            try:
                ray.get(ref)
            except RayTaskError:
                continue
            except RayError as error:  # an actor's or a task's process, or the machine under it
                raise self._place(pending, pending.refs.index(ref), phase).failure("", error) from error

    def _place(self, pending: Pending[Any], index: int, phase: str) -> Place:
        """Where a process is, and what it does for which part of the run."""
        name, step = pending.names[index], self.step if pending.step is None else pending.step
        return Place(name, pending.nodes[index], self.place, step, phase, self.logs / f"{pending.log or name}.log")
