"""PPO steps whose numbers went wrong: what is done about each, and when there have been too many.

A step that found the number before it changed anything is left out. Where weights have moved, or the batch shows what the update
before it did, the round goes back to the last checkpoint before the one to blame, which is then left out. Engines that disagree
with the learner are given the weights again, once, and what they sampled is sampled again. Every such step has a line in the
round's journal, which is what counts them: a run that is killed and continued goes on counting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cluster.draft import BAD, Draft
from cluster.failures import BadNumbers
from cluster.metrics import Metrics
from tokens.guards import Budget, GuardsConfig

T = TypeVar("T")
Action = Literal["left out", "undone", "refitted"]
ACTIONS: tuple[Action, ...] = ("left out", "undone", "refitted")
SHIFTED, EVALUATED = ("shifted",), ("evaluation",)
"""Keys of the stages before the first step and after the last in which engines sample."""


class StepUndone(RuntimeError):
    """The round has to be played again from its last checkpoint; what is to be left out of it is recorded."""


@dataclass(frozen=True)
class Event:
    """What was done about a number that went wrong.

    Args:
        action: left out = the batch was not learned from, and nothing had changed; undone = the same, after weights had been put
            back; refitted = engines were given the weights again.
        what: the quantity.
        value: in words, since JSON has no name for what is not finite.
        limit: what it should have been.
        where: it was found.
        who: process that found it, or the engines that gave it.
    """

    action: Action
    what: str
    value: str
    limit: str
    where: str
    who: str

    @classmethod
    def of(cls, action: Action, found: BadNumbers) -> Event:
        """What is remembered of a number."""
        bad = found.bad
        return cls(action, bad.what, f"{bad.value:.6g}", bad.limit, bad.where, ", ".join(bad.engines) or found.who)

    def words(self) -> str:
        """One line."""
        return f"{self.what} is {self.value} at {self.where}, expected {self.limit} ({self.who})"


def events(draft: Draft) -> dict[int, Event]:
    """The steps of a round whose numbers went wrong, and what was done.

    Args:
        draft: of the round.
    """
    return {int(key.split()[1]): Event(**entry.facts) for key, entry in draft.journal.alive.items() if key.split()[0] == BAD}


def counts(draft: Draft) -> dict[str, int]:
    """How many of a round's steps met each action, as the ledger has it.

    Args:
        draft: of the round.
    """
    found = [event.action for event in events(draft).values()]
    return {action.replace(" ", "_"): found.count(action) for action in ACTIONS}


def budget(draft: Draft, guards: GuardsConfig, step: int) -> Budget:
    """What a round has spent, once a step is among its bad ones.

    Args:
        draft: of the round.
        guards: how much there is.
        step: the last bad one.
    """
    bad = events(draft)
    row = next(count for count in range(step + 2) if step - count not in bad)
    ever = sum(entry.key.split()[0] == BAD for entry in draft.journal.entries)  # those that no longer count, too
    return Budget(guards.in_a_row, guards.in_a_round, row, ever)


class Guard:
    """Sees a round's PPO steps through.

    Args:
        guards: how much is put up with.
        draft: of the round, whose journal remembers.
        index: of the round.
        metrics: writes it down.
        say: shows a line.
        refit: gives the engines the learner's weights again, and drops what they were asked for ahead.
    """

    def __init__(
        self,
        guards: GuardsConfig,
        draft: Draft,
        index: int,
        metrics: Metrics,
        say: Callable[[str], None],
        refit: Callable[[], Any],
    ) -> None:
        self.guards, self.draft, self.index, self.metrics, self.say, self.refit = guards, draft, index, metrics, say, refit

    def step(self, step: int, learn: Callable[[], None]) -> None:
        """One PPO step, unless it is one to be left out.

        Args:
            step: of the round.
            learn: samples, scores, updates.

        Raises:
            StepUndone: if the round has to go back; the step to blame is recorded as one to be left out.
            BadNumbers: if there have been too many, or nothing can be undone.
        """
        known = events(self.draft)
        if step in known:  # the round is played again
            self.metrics.guard(self.index, step, counts(self.draft), vars(known[step]))
            if known[step].action != "refitted":
                return
        try:
            _, refitted = self._trusting((f"rollouts {step}", f"scores {step}"), learn, undoable=True)
        except BadNumbers as found:
            if found.bad.engines and found.bad.undo:
                self._put_back(step, found)
            self._leave_out(step, found)
            return
        if refitted is not None:
            self._remember(step, Event.of("refitted", refitted), refitted)

    def trusting(self, keys: tuple[str, ...], act: Callable[[], T]) -> T:
        """Do what compares engines and learner; where they disagree, once more, with engines that were given the weights again.

        Args:
            keys: of the stages that are made again.
            act: to be done.

        Raises:
            BadNumbers: what else ``act`` raises, or what it raises the second time.
        """
        return self._trusting(keys, act, undoable=False)[0]

    def _trusting(self, keys: tuple[str, ...], act: Callable[[], T], undoable: bool) -> tuple[T, BadNumbers | None]:
        """The answer, and what the engines were given the weights again for; None where they were not.

        Where the work is ``undoable``, and has moved the learner before it found that they disagree, it is not simply done again.
        """
        try:
            return act(), None
        except BadNumbers as found:
            if not found.bad.engines or (undoable and found.bad.undo):
                raise
            self.say(f"[yellow]note[/] {found}; the engines are given the weights again, and sample again")
            self.draft.undo(keys, str(found))
            self.refit()
            return act(), found

    def _put_back(self, step: int, found: BadNumbers) -> None:
        """Engines disagree with a learner that has moved for this step already: all roles are put back, and it is done again."""
        self.say(f"[yellow]note[/] {found}; step {step} is done again, with new samples")
        self.draft.undo_steps(step, str(found))
        self._remember(step, Event.of("refitted", found), found)
        raise StepUndone(str(found)) from found

    def _leave_out(self, step: int, found: BadNumbers) -> None:
        blamed, back = self._blamed(step) if found.bad.earlier else step, found.bad.undo or found.bad.earlier
        if blamed is None:
            raise self._end(found, "it is the first batch of its round: no step of it is to blame") from found
        self.say(f"[yellow]note[/] {found}; step {blamed} is {'undone' if back else 'left out'}")
        if back:
            self.draft.undo_steps(blamed, str(found))
        self._remember(blamed, Event.of("undone" if back else "left out", found), found)
        if back:
            raise StepUndone(str(found)) from found

    def _blamed(self, step: int) -> int | None:
        """The last step before another one that was learned from."""
        known = events(self.draft)
        learned = [s for s in range(step) if s not in known or known[s].action == "refitted"]
        return learned[-1] if learned else None

    def _remember(self, step: int, event: Event, found: BadNumbers) -> None:
        self.draft.note(f"{BAD} {step}", vars(event))
        self.metrics.guard(self.index, step, counts(self.draft), vars(event))
        spent = budget(self.draft, self.guards, step).spent()
        if spent:
            raise self._end(found, f"that is {spent}") from found

    def _end(self, found: BadNumbers, why: str) -> BadNumbers:
        point = self.draft.point
        steps = 0 if point is None else point.steps
        kept = (
            f"its last checkpoint, after step {steps}, is intact"
            if steps
            else "its reward model is kept, and so is every committed round"
        )
        return BadNumbers(f"{found}; {why}: round {self.index + 1} ends here, {kept}", found.bad, found.who, found.trace)


@contextlib.contextmanager
def moved(learner: bool) -> Iterator[None]:
    """Work that begins by moving the learner: what goes wrong in it is undone, not only left out.

    Args:
        learner: whether it does.
    """
    try:
        yield
    except BadNumbers as found:
        if not learner:
            raise
        raise BadNumbers(str(found), found.bad.found(undo=True), found.who, found.trace) from found


def until_good(play: Callable[[], T]) -> T:
    """Play a round, again from its last checkpoint whenever a step was undone.

    Args:
        play: goes on from where the round's draft stands.

    Raises:
        BadNumbers: if there have been too many.
    """
    while True:
        try:
            return play()
        except StepUndone:
            continue
