"""Waiting for roles: the one place where the driver blocks, times phases, shows progress and explains failures."""

from __future__ import annotations

import errno
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, OutOfDiskError, RayError, RayTaskError

from cluster.console import Bar, Console
from cluster.failures import How, Place, RoleFailed, RoleLost, lost_with
from cluster.hearing import Hearing
from cluster.parts import Again, Fence, Part, asked_of, moved, parts_of
from cluster.patience import AWAY, errno_of
from cluster.signals import obey_termination
from evaluation.timeline import DRIVER, Span
from tokens.errors import UserError
from tokens.guards import BadNumber

T = TypeVar("T")
POLL_S = 0.5
SAY_EVERY_S = 30.0
FINAL_S = 2.0
"""Longest wait for the last word on a phase's progress."""
VIGIL = "vigil"
"""What the driver waits for all the time: that a process dies."""
DEATH_S = 5.0
"""How long Ray may need to notice that a process has died, after those that worked with it have."""


TAKES_NOTHING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What the system says of a disk that is full, or one's share of it, or that is mounted read-only."""


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


def nothing(who: str, parts: Collection[int]) -> dict[int, Again]:
    """Of work that cannot be asked for again by itself: whoever lost it begins anew."""
    return {}


Redo = Callable[[str, Collection[int]], Mapping[int, Again]]


def shifted(by: int, redo: Redo, who: str, parts: Collection[int]) -> dict[int, Again]:
    """``redo`` of work whose parts stand behind ``by`` others."""
    return {by + at: again for at, again in redo(who, [part - by for part in parts if part >= by]).items()}


def not_made_good(lost: RoleLost) -> None:
    """Nobody takes a lost process's place."""
    raise lost


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
        on_failure: for news: called with an error of the role, which is then not raised; None = it is.
        redo: asks again for what a process had that was lost and replaced: given its name and its parts that are open, by their
            place in ``refs``, all that must be asked for again, and of whom. Nothing = the whole must begin anew.
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
    on_failure: Callable[[RoleFailed], None] | None = None
    redo: Redo = nothing


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
        self.make_good: Callable[[RoleLost], None] = not_made_good
        """Puts another process in the place of a lost one, or raises; what the lost one had is then asked for again."""
        self.starting: set[str] = set()
        """Processes that are not up yet, and say nothing of their progress; no deadline of a call runs meanwhile."""
        self.fence = Fence(lambda name: None)
        self._watched: dict[Any, Part] = {}
        self._early: dict[Any, Any] = {}
        self._free_since: dict[tuple[str, str], float] = defaultdict(float)

    def begin(self, place: str, index: int | None = None) -> None:
        """Forget the times so far; ``place`` names what begins in error messages, ``index`` is its round."""
        self.seconds = defaultdict(float)
        self.place, self.round, self.step = place, index, None

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """The driver works itself; the seconds are added to ``phase``.

        Args:
            phase: the metric's name.
        """
        began, since = time.perf_counter(), time.time()
        yield
        self.seconds[phase] += time.perf_counter() - began
        self.record(Span(phase, DRIVER, self.round, self.step, since, time.time()))

    def watch(self, phase: str, pending: Pending[Any]) -> None:
        """Look out for work that is waited for later, during every wait until then.

        What it raises is raised by the wait that sees it, in the name of ``phase``; a process that dies is not found out only
        when its answer is needed.
        """
        self._watched |= parts_of(phase, pending)

    def forget(self, pending: Pending[Any]) -> None:
        """Work that was watched is not waited for after all; what it comes to is refused."""
        for ref, part in self._watched_parts(pending).items():
            del self._watched[ref]
            self.fence.put([ref], part.name)
        for ref in pending.refs:
            self._early.pop(ref, None)

    def drop(self, actor: str) -> None:
        """A process is about to be ended: news of it is not waited for any more, whatever it has come to.

        Args:
            actor: Ray's id of it.
        """
        mine = {ref: part for ref, part in self._watched.items() if part.pending.news and part.pending.redo is nothing}
        for ref in [ref for ref in mine if asked_of(ref) == actor]:
            del self._watched[ref]

    def watched(self, phase: str) -> set[str]:
        """Processes from which an answer is watched for in a phase."""
        return {part.name for part in self._watched.values() if part.phase == phase}

    def _watched_parts(self, pending: Pending[Any]) -> dict[Any, Part]:
        return {ref: part for ref, part in self._watched.items() if part.origin in pending.refs}

    def __call__(self, phase: str, pending: Pending[T], bar: Bar | None = None) -> T:
        """Wait for one piece of work; its seconds are added to ``phase``.

        Args:
            phase: the metric's name.
            pending: the work.
            bar: a bar that shows the processes' own progress; None shows nothing.

        Raises:
            UserError: what a role raised as such, a full disk, or no room within ``resources.wait_limit_s``.
            RoleLost: a process was lost, and the work cannot go on with another one in its place.
            RoleFailed: anything else that went wrong.
            SystemExit: if SIGTERM has come.
        """
        began, since = time.perf_counter(), time.time()
        known = {part.origin: (ref, part) for ref, part in self._watched_parts(pending).items()}
        answers: dict[int, Any] = {}
        waiting: dict[Any, Part] = {}
        for ref, part in parts_of(phase, pending).items():
            if ref in self._early:
                answers[part.slot] = self._early.pop(ref)
            elif ref in known:  # perhaps another process has it by now
                now, moved_part = known[ref]
                del self._watched[now]
                waiting[now] = replace(part, name=moved_part.name, node=moved_part.node, actor=moved_part.actor)
            else:
                waiting[ref] = part
        try:
            hearing = self._until_answered(phase, pending, waiting, answers, bar)
        except BaseException:
            for ref, part in waiting.items():
                self.fence.put([ref], part.name)
            raise
        if bar:
            bar.show(hearing.listen(self._speaking(pending, waiting), FINAL_S))
        self.seconds[phase] += time.perf_counter() - began
        self.record(Span(phase, DRIVER, self.round, self.step, since, time.time()))
        try:
            return pending.combine([answers[slot] for slot in range(len(pending.refs))])
        except BadNumber as bad:  # found in what all of them said together
            raise self._place(parts_of(phase, pending)[pending.refs[-1]]).bad_number(bad, bad) from bad

    def _until_answered(
        self, phase: str, pending: Pending[Any], waiting: dict[Any, Part], answers: dict[int, Any], bar: Bar | None
    ) -> Hearing:
        """Wait until nothing is in ``waiting``; what comes goes into ``answers``. Returns what was heard of the progress."""
        moved_at = time.perf_counter()
        hearing, since = Hearing(), dict[Any, float]()
        while waiting:
            found, _ = ray.wait([*self._watched, *waiting], num_returns=1, timeout=POLL_S if bar else 1.0)
            obey_termination()
            self.fence.look()
            num_before = len(answers)
            try:
                self.look()
                for ref in found:
                    self._take(ref, waiting, answers)
            except RoleLost as lost:
                self._ask_others(lost, waiting)
                moved_at = time.perf_counter()
            said = hearing.listen(self._speaking(pending, waiting))
            heard = bool(said) or not pending.progress_of
            queued = pending.room is not None and heard and all(progress.waiting for progress in said)
            if pending.room is not None:
                pending.room.look(queued)
            now = time.perf_counter()
            if len(answers) > num_before:
                moved_at = now
            since = {
                ref: now if queued or part.name in self.starting or ref not in since else since[ref]
                for ref, part in waiting.items()
            }
            late = self._latest(since, moved_at, hearing)
            if late is not None:
                what = f"no progress for {self.deadline_s:g} s (resources.deadline_s)"
                self._ask_others(self._place(waiting[late]).loss("hung", asked_of(late), what), waiting)
                moved_at = time.perf_counter()
            if bar:
                bar.show(said)
        return hearing

    def _latest(self, since: Mapping[Any, float], moved_at: float, hearing: Hearing) -> Any | None:
        """What has gone longest without progress, if that is too long.

        Args:
            since: when the time of each reference's call began to run.
            moved_at: when anything was last answered, which counts for those that say nothing of their own progress.
            hearing: what the others say of theirs.
        """
        any_moved = max([moved_at, *hearing.since.values()])

        def last(ref: Any) -> float:
            who = asked_of(ref)
            return max(since[ref], hearing.since[who] if who in hearing.since else any_moved)

        oldest = min(since, key=last, default=None)
        return oldest if oldest is not None and time.perf_counter() - last(oldest) > self.deadline_s else None

    def _take(self, ref: Any, waiting: dict[Any, Part], answers: dict[int, Any]) -> None:
        """Take an answer in, where somebody still waits for it."""
        if ref in self._watched and self._watched[ref].pending.on_failure is not None:
            self._told(ref, self._watched.pop(ref))
        elif ref in self._watched:
            part = self._watched[ref]
            try:
                answer = self._arrived(ref, part)
            except RoleLost:  # what it had is asked of another
                raise
            except BaseException:  # it is told once
                del self._watched[ref]
                raise
            del self._watched[ref]
            if not part.pending.news:
                self._early[part.origin] = answer
        elif ref in waiting:
            answer = self._arrived(ref, waiting[ref])
            answers[waiting.pop(ref).slot] = answer

    def _told(self, ref: Any, part: Part) -> None:
        """Take news in whose failure is news as well."""
        assert part.pending.on_failure is not None
        try:
            answer = self._get(ref, part)
        except RoleLost:
            raise
        except RoleFailed as failure:
            part.pending.on_failure(failure)
        else:
            part.pending.on_answer(answer)

    def lose(self, lost: RoleLost) -> None:
        """Give a process up while nobody waits for it.

        Raises:
            RoleLost: if what it held cannot be given to another.
        """
        self._ask_others(lost, {})

    def _ask_others(self, lost: RoleLost, waiting: dict[Any, Part]) -> None:
        """Have a lost process replaced, and ask again for all that it had.

        Raises:
            RoleLost: if it is not replaced, or something of that must begin anew.
        """
        had = {ref: part for parts in (waiting, self._watched) for ref, part in parts.items() if asked_of(ref) == lost.actor}
        left: list[Any] = []
        try:
            self.make_good(lost)
            left += [*moved(waiting, lost.who, lost.actor), *moved(self._watched, lost.who, lost.actor)]
        finally:
            for ref in had:
                self._watched.pop(ref, None)
            self.fence.put([*had, *left], lost.who)
        if any(not part.pending.news for ref, part in had.items() if ref not in left):
            raise lost

    def _speaking(self, pending: Pending[Any], waiting: Mapping[Any, Part]) -> list[Any]:
        """Whom to ask how far the work is: those named at first, or those that took over from them, once they are up."""
        if not pending.progress_of:
            return []
        over = [part for part in waiting.values() if part.actor is not None]
        if not over:
            return list(pending.progress_of)
        return list({part.name: part.actor for part in over if part.name not in self.starting}.values())

    def _arrived(self, ref: Any, part: Part) -> Any:
        """The answer of one process. It was at work since it got the call, or since it was done with the call before."""
        pending, phase = part.pending, part.phase
        answer = self._get(ref, part)
        pending.on_answer(answer)
        name, now = part.name, time.time()
        start, step = max(pending.submitted, self._free_since[name, phase]), self.step if pending.step is None else pending.step
        self._free_since[name, phase] = now
        for who, since, until in [(name, start, now)] if pending.spans is None else pending.spans(answer):
            self.record(Span(phase, who, self.round, step, since, until))
        return answer

    def _get(self, ref: Any, part: Part) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if (number := errno_of(cause)) in TAKES_NOTHING:
                raise OSError(number, str(cause)) from error
            if number in AWAY:
                raise OSError(number, f"{part.name}: {cause}") from error
            if isinstance(cause, BadNumber):  # all ranks of a role find it together, and none of them waits for another
                raise self._place(part).bad_number(cause, error) from error
            self._blame_the_dead(ref, part, lost_with(cause))
            raise self._place(part).failure("", error) from error
        except OutOfDiskError as error:
            raise OSError(errno.ENOSPC, str(error)) from error
        except RayError as error:
            raise self._loss(ref, part, error) from error

    def _loss(self, ref: Any, part: Part, error: RayError) -> RoleFailed:
        if not lost_with(error):
            return self._place(part).failure("", error)
        how: How = "unreachable" if isinstance(error, ActorUnavailableError) else "died"
        return self._place(part).loss(how, asked_of(ref), "", error)

    def _blame_the_dead(self, failed: Any, part: Part, certain: bool) -> None:
        """Fail in the name of another process that has died: the one that raised may only have waited for it.

        Args:
            failed: reference of the one that raised.
            part: that it had.
            certain: True if somebody has died, or what he had made is gone.
        """
        vigils = {ref: other for ref, other in self._watched.items() if other.phase == VIGIL}
        living = {asked_of(ref) for ref in vigils}
        others = {
            ref: other
            for ref, other in parts_of(part.phase, part.pending).items()
            if ref != failed and (not living or asked_of(ref) in living)  # not of one that another has replaced by now
        }
        dead = ray.wait(list(others), num_returns=len(others), timeout=DEATH_S)[0] if others else []
        if vigils:
            dead += ray.wait(list(vigils), num_returns=1, timeout=DEATH_S if certain and not dead else 0)[0]
        for ref in dead:
            try:
                ray.get(ref)
            except RayTaskError:
                continue
            except RayError as error:  # an actor's or a task's process, or the machine under it
                raise self._loss(ref, (others | vigils)[ref], error) from error

    def _place(self, part: Part) -> Place:
        """Where a process is, and what it does for which part of the run."""
        pending = part.pending
        step = self.step if pending.step is None else pending.step
        return Place(part.name, part.node, self.place, step, part.phase, self.logs / f"{pending.log or part.name}.log")
