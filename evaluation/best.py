"""Which round of a run is the best by its judgements, and whether another one is worth playing: read off the ledger.

Letters: R rounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation.config import Judge

JUDGED_BY: Mapping[Judge, str] = {"gold": "gold", "held_out": "held_out", "ensemble": "ensemble_mean"}
"""The mean of each judge in an evaluation of the ledger."""
JUDGE_NAMES: Mapping[Judge, str] = {
    "gold": "the gold reward",
    "held_out": "held-out reward models",
    "ensemble": "the reward ensemble",
}
"""As they stand in a sentence."""
OUT = "disqualified"
"""Key of a round in the ledger: its alarms that ``evaluation.disqualify`` names."""
RULE = (
    "the highest mean of the judge over the held-out prompts, less that of SFT's responses to the same prompts; SFT counts as 0, "
    "and of equals the earlier one is taken; rounds with an alarm of evaluation.disqualify do not count"
)


@dataclass(frozen=True)
class Best:
    """The best of SFT and R rounds.

    Args:
        judge: whose mean it is.
        gains: [R] of each round's mean over SFT's, in units of the judge.
        round: the best; None = SFT, which no round beats.
    """

    judge: Judge
    gains: tuple[float, ...]
    round: int | None
    out: tuple[tuple[str, ...], ...] = ()
    """[R] alarms for which a round does not count (``evaluation.disqualify``); none at all where every round counts."""
    alarms: tuple[str, ...] = ()
    """Names of those that the best round raised itself."""

    @property
    def counted(self) -> tuple[float, ...]:
        """The gains, -inf of rounds that do not count."""
        out = self.out or ((),) * len(self.gains)
        return tuple(-math.inf if names else gain for gain, names in zip(self.gains, out, strict=True))

    @property
    def gain(self) -> float:
        """Of the best, over SFT."""
        return 0.0 if self.round is None else self.gains[self.round]

    @property
    def independent(self) -> bool:
        """Whether the policy was trained by something else than the judge."""
        return self.judge != "ensemble"

    def words(self) -> str:
        """Why it is this one: a sentence without its full stop."""
        by, num = JUDGE_NAMES[self.judge], len(self.gains)
        if not num:
            return "no round is committed yet: SFT's policy is all there is"
        if self.round is None:
            nearest = max(range(num), key=lambda index: (self.counted[index], self.gains[index], -index))
            which = f"the nearest is round {nearest} of {num}" if num > 1 else "it is round 0"
            return (
                f"no round {'that counts ' if any(self.out) else ''}beats SFT by {by} ({which}, "
                f"{self.gains[nearest]:+z.3f}){self.without()}: SFT's policy stays the best"
            )
        last = "" if self.round == num - 1 else f"; the last one, round {num - 1}, is {self.gains[-1]:+z.3f}"
        most = "the most of those that count" if any(self.out) else "the most of all"
        alarmed = f"; its own alarms: {', '.join(self.alarms)}" if self.alarms else ""
        return f"round {self.round} of {num} is {self.gain:+z.3f} above SFT by {by}, {most}{last}{alarmed}{self.without()}"

    def without(self) -> str:
        """Which rounds do not count, and why: a bracket with a blank before it; nothing where all do."""
        rounds = [str(index) for index, names in enumerate(self.out) if names]
        if not rounds:
            return ""
        alarms = ", ".join(dict.fromkeys(name for names in self.out for name in names))
        return f" (not counted: round{'s' if len(rounds) > 1 else ''} {', '.join(rounds)}, by {alarms})"


def best_of(ledger: Mapping[str, Any]) -> Best:
    """The best round of a run by its judgements.

        gain_r = mean judge(round r) - mean judge(SFT), on the same prompts;  best = the first of argmax over {0 of SFT, gain_r}

    over the rounds r that count: with no alarm that the ledger says disqualifies them.

    With the reward ensemble as the judge, SFT's mean is 0 by every round's ensemble: its scores are in units of SFT's samples.

    Source: none needed; the early stopping that Gao et al. 2023 (arXiv:2210.10760) suggest by a gold reward.

    Args:
        ledger: parsed JSON with ``start`` committed.

    Returns:
        The best, of the rounds there are.

    Padding contract: there is none.
    """
    start = ledger["start"]["evaluation"]
    judge: Judge = start["judge"]
    name = JUDGED_BY[judge]
    gains = tuple(float(entry["evaluation"][name]) - float(start[name]) for entry in ledger["rounds"])
    out = tuple(tuple(entry[OUT]) if OUT in entry else () for entry in ledger["rounds"])
    best = Best(judge, gains, None, out)
    top = max(best.counted, default=0.0)
    if top <= 0:
        return best
    chosen = best.counted.index(top)
    entry = ledger["rounds"][chosen]
    told = entry["alarms"] if "alarms" in entry else ()  # as in the ledgers of early versions
    return replace(best, round=chosen, alarms=tuple(alarm["name"] for alarm in told))


def rounds_waited(gains: Sequence[float], min_delta: float) -> int:
    """Rounds since the last one whose judgement was better than all before it, SFT's 0 included.

    better: gain > (the gain that was last called better) + min_delta

    Source: early stopping with patience, as in Prechelt 1998, "Early stopping - but when?".

    Args:
        gains: [R] over SFT.
        min_delta: what is to be exceeded, >= 0.

    Returns:
        0 if the last round was better, R if none ever was.

    Padding contract: there is none.
    """
    mark, waited = 0.0, 0
    for gain in gains:
        waited += 1
        if gain > mark + min_delta:
            mark, waited = gain, 0
    return waited


def why_stopped(best: Best, patience: int | None, min_delta: float, num_rounds: int) -> str | None:
    """Why no further round is played.

    Source: ``rounds_waited``; ``rounds.stop`` and ``rounds.num_rounds``.

    Args:
        best: of the run so far.
        patience: of ``rounds.stop``; None = it never stops by itself.
        min_delta: of ``rounds.stop``.
        num_rounds: that the config asks for.

    Returns:
        A clause for a reader; None where the run goes on.

    Padding contract: there is none.
    """
    if len(best.gains) >= num_rounds:
        return f"all {num_rounds} rounds are played (rounds.num_rounds)"
    waited = rounds_waited(best.counted, min_delta)
    if patience is None or waited < patience:
        return None
    more = f" by more than {min_delta:g} (rounds.stop.min_delta)" if min_delta else ""
    return (
        f"{waited} round{'s' if waited > 1 else ''} in a row brought no better judgement by {JUDGE_NAMES[best.judge]}{more} "
        f"(rounds.stop.patience {patience}){best.without()}"
    )
