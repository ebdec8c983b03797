"""Numbers that training cannot go on with: what they are called when one is found, and how many a run puts up with."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from tokens.section import Section

FINITE = "a finite number"


class GuardsConfig(Section):
    """Numbers that go wrong: what counts as wrong, and how often a run may meet it. docs/guards.md."""

    update_kl: float | None = Field(2.0, gt=0)
    """An update is undone where it has moved the policy further than this: mean k3 per token of KL(before || after), nats,
    measured after it on some of its rollouts; null = it may go as far as it likes. ``policy.max_update_kl`` ends an update
    earlier."""
    collapse: float | None = Field(4.0, gt=0)
    """The policy counts as collapsed where the mean score of a batch lies this many standard deviations of a score below the mean
    of the scores before it, all scores are one, or all responses are; the update before is then undone. null = not looked at."""
    bad_scores: float = Field(0.02, ge=0, lt=1)
    """Share of a batch's scores, over all members of the ensemble, that may be NaN or infinite: each is left out of its sample's
    score. More of them are an error, which names the member."""
    in_a_row: int = Field(3, ge=1)
    """PPO steps, or steps of a reward model's fit, whose numbers went wrong one after another: with the last of these the run
    ends."""
    in_a_round: int = Field(6, ge=1)
    """The same, one after another or not, in a round or in a fit."""


ONLY_FINITE = GuardsConfig(update_kl=None, collapse=None)
"""Numbers must be finite, and may be as large as they like."""


class BadNumber(FloatingPointError):
    """A number that training cannot go on with. It is raised before it is applied, or says that it was.

    Args:
        what: the quantity.
        value: that it has.
        limit: what it should be, in words.
        where: round, update and minibatch, or step of a fit; "" where the caller knows.
        undo: True where weights have moved since the batch came, or are not finite themselves: they must be put back. False
            where everything is as it was, and the batch can simply be left out.
        earlier: True where the batch shows what the update before it did, False where it is to blame itself.
        engines: of the rollout pool, that gave the number; none where it is not theirs.
        note: what else is to be said; may be empty.
    """

    def __init__(
        self,
        what: str,
        value: float,
        limit: str = FINITE,
        where: str = "",
        undo: bool = False,
        earlier: bool = False,
        engines: tuple[str, ...] = (),
        note: str = "",
    ) -> None:
        super().__init__(what, value, limit, where, undo, earlier, engines, note)  # all of it, so that it survives pickling
        self.what, self.value, self.limit, self.where = what, value, limit, where
        self.undo, self.earlier, self.engines, self.note = undo, earlier, engines, note

    def __str__(self) -> str:
        at, note = f" at {self.where}" if self.where else "", f"; {self.note}" if self.note else ""
        return f"{self.what} is {self.value:.4g}{at}, expected {self.limit}{note}"

    def found(self, where: str = "", undo: bool = False, note: str = "") -> BadNumber:
        """The same, with what is known by now.

        Args:
            where: taken where it was not known.
            undo: True if weights have moved, or are not finite.
            note: taken if there was none.
        """
        known = (self.where or where, undo or self.undo, self.earlier, self.engines, self.note or note)
        return BadNumber(self.what, self.value, self.limit, *known)


@dataclass
class Budget:
    """How many steps with bad numbers there may be.

    Args:
        in_a_row: this many one after another are too many.
        in_all: this many together are too many.
        row: bad ones since the last good one.
        count: bad ones.
    """

    in_a_row: int
    in_all: int
    row: int = 0
    count: int = 0

    @classmethod
    def of(cls, guards: GuardsConfig) -> Budget:
        """What the config allows in a round or a fit."""
        return cls(guards.in_a_row, guards.in_a_round)

    def good(self) -> None:
        """A step went well."""
        self.row = 0

    def bad(self) -> None:
        """A step did not."""
        self.row, self.count = self.row + 1, self.count + 1

    def spent(self) -> str:
        """Why there may be no more of them; "" while there may."""
        if self.row >= self.in_a_row:
            return f"{self.row} in a row (guards.in_a_row)"
        if self.count >= self.in_all:
            return f"{self.count} since it began (guards.in_a_round)"
        return ""
