"""What the papers claim, and whether it holds here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.experiments.common import interval_text
from benchmarks.markdown import markdown
from benchmarks.reproduce.arms import AGAIN, AGGREGATES, RESTARTED
from benchmarks.reproduce.rows import (
    Row,
    elsewhere,
    evenness,
    fallen,
    gold,
    last_gold,
    log_jumps,
    log_kl,
    margin,
    matched,
    of_arm,
    paired,
    planned,
)
from evaluation.compare import mean_interval

NOT_RUN = "not run"
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told at this scale"
BEST = "iterated, tuned"
RELEVANT, RELEVANT_SHARE, RELEVANT_FIT = 0.05, 0.1, 0.02
"""Effects below it are none: of gold and of shares of prompts; of log KL and log jumps (a tenth of them); of R squared."""


@dataclass(frozen=True)
class Claim:
    """A claim, and what the rows say of it.

    Args:
        source: who claims it.
        words: what.
        what: is subtracted from what, or counted.
        found: of each seed that was run.
        seeds: planned.
        above: it says that the figure is above 0; else below.
        relevant: a smaller figure is no effect.
    """

    source: str
    words: str
    what: str
    found: Sequence[float]
    seeds: int
    above: bool = True
    relevant: float = RELEVANT

    @property
    def verdict(self) -> str:
        """By the 95% t-interval over the seeds; nothing before all are there.

        It does not hold where the interval leaves out that the figure is ``relevant`` or more in the claim's favour.
        """
        if len(self.found) < self.seeds:
            return f"{len(self.found)} of {self.seeds} seeds run" if self.found else NOT_RUN
        _, low, high = mean_interval([each if self.above else -each for each in self.found])
        if low > 0:
            return HOLDS
        return FAILS if high < self.relevant else UNTOLD


@dataclass(frozen=True)
class _Told:
    """Claims from rows of one kind of prompts."""

    rows: Sequence[Row]

    def more(
        self, source: str, words: str, arm: str, base: str, value: Callable[[Row], float] = gold, above: bool = True
    ) -> Claim:
        """An arm has more than another, or less; paired by seed."""
        what, relevant = MEASURES[value]
        return Claim(source, words, what, paired(self.rows, arm, base, value), planned(arm, base), above, relevant)

    def won(self, source: str, words: str, arm: str) -> Claim:
        """The best round wins more than it loses against SFT."""
        return Claim(source, words, MEASURES[margin][0], [margin(row) for row in of_arm(self.rows, arm).values()], planned(arm))

    def at_one_kl(self, source: str, words: str, arm: str, base: str) -> Claim:
        """An arm has more gold than another where both are as far from SFT."""
        return Claim(source, words, "gold at one KL", matched(self.rows, arm, base), planned(arm, base))


MEASURES: dict[Callable[[Row], float], tuple[str, float]] = {
    gold: ("gold", RELEVANT),
    margin: ("win - lose", RELEVANT),
    last_gold: ("gold, last round", RELEVANT),
    fallen: ("gold, best round - last", RELEVANT),
    log_kl: ("log of the last KL", RELEVANT_SHARE),
    evenness: ("R squared of a line through the steps' KL", RELEVANT_FIT),
    log_jumps: ("log of the steps' jumps in score", RELEVANT_SHARE),
}
"""What a difference is of, of the best round where none is named, and from where on it is one."""


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """All of them, in the order of the items.

    Args:
        rows: of the results.
    """
    here, away = _Told(rows), _Told(elsewhere(rows))
    iterated, five = list(of_arm(rows, "iterated").values()), planned("iterated")
    rise = [gold(row) - row["rounds"][1]["gold"] for row in iterated]
    fall = [last_gold(row) - gold({**row, "rounds": [row["rounds"][0], *row["rounds"][3:5]]}) for row in iterated]
    yield here.won("Table 2", "rounds beat SFT", "iterated")
    yield Claim("Table 2", "later rounds beat the first", "gold, best round - first", rise, five)
    yield Claim("Table 2", "after the third or fourth it falls", "gold, round 5 - the better of 3 and 4", fall, five, False)
    for source, arm, other in (("Table 3", "vanilla PPO, tuned", "vanilla PPO"), ("MetaRM", "DPO", "DPO")):
        yield here.more(source, f"the best round beats {other}, both tuned", BEST, arm)
        yield here.at_one_kl(source, f"the best round beats {other}, both tuned", BEST, arm)
        yield here.more(source, f"with r_k alone (M = 1), untuned, it beats {other}", "M = 1", other)
    yield here.more("Table 3", "it beats vanilla PPO, neither tuned", "iterated", "vanilla PPO")
    yield here.more("ours", "the best round, tuned, beats best of 16", BEST, "best of 16")
    yield here.at_one_kl("ours", "the best round, tuned, beats best of 16", BEST, "best of 16")
    yield away.won("Fig. 15", "in domains without preferences it beats SFT too", BEST)
    yield away.more("Fig. 15", "in domains without preferences it beats vanilla PPO, both tuned", BEST, "vanilla PPO, tuned")
    yield away.more("ours", "in domains without preferences it beats DPO, both tuned", BEST, "DPO")
    yield away.more("ours", "in domains without preferences it beats best of 16", BEST, "best of 16")
    new = "new domain, S_k from it"
    yield here.won("Fig. 15", "trained for such a domain, with S_k from it, it beats SFT", new)
    yield here.more("Fig. 15", "and vanilla PPO for that domain", new, "new domain, vanilla PPO")
    yield here.more("ours", "and S_k from the old domains", new, "new domain, S_k from the old ones")
    for method in ("flip", "soft+margin"):
        yield here.more("Fig. 9", f"{method}: without a penalty KL grows less", f"no KL, {method}", "no KL", log_kl, False)
        yield here.more("Fig. 9", f"{method}: and more steadily", f"no KL, {method}", "no KL", evenness)
    for method in ("margin", "flip", "soft+margin"):
        yield here.more("Fig. 10", f"{method} wins", f"no KL, {method}", "no KL")
    for method in ("SimCSE", "SwAV"):
        yield here.more("Fig. 12", f"{method}: rewards are more stable", f"no KL, {method}", "no KL", log_jumps, False)
        yield here.more("Fig. 13", f"{method} wins", f"no KL, {method}", "no KL")
    yield here.more("Fig. 13", "SimCSE is better than SwAV", "no KL, SimCSE", "no KL, SwAV")
    for flips in ("0%", "25%"):
        for rule in (name for name in AGGREGATES if name != "single"):
            arm, single = f"{rule}, {flips} flips", f"single, {flips} flips"
            yield here.more("Coste et al.", f"{arm}: falls less than one model", arm, single, fallen, False)
            yield here.more("Coste et al.", f"{arm}: ends higher", arm, single, last_gold)
    yield here.more("MetaRM", "the ascent (eta 0.1) beats none", AGAIN, "eta 0 (MetaRM off)")
    for value in (gold, last_gold):
        yield here.more(
            "ours", "a policy that starts from SFT each round, with 60 steps in each, is better", RESTARTED, AGAIN, value
        )
    yield here.more("ours", "192 fresh labels a round, carried on, beat none", "fresh labels, all", AGAIN, last_gold)
    yield here.more("Wolf et al.", "labels of all rounds beat the newest", "fresh labels, all", "fresh labels, latest", last_gold)


def table(rows: Sequence[Row]) -> str:
    """Claim, figure and verdict, a line each.

    Args:
        rows: of the results.
    """
    lines = [
        (
            one.source, one.words, one.what, "above 0" if one.above else "below 0", interval_text(one.found), str(len(one.found)),
            one.verdict,
        )
        for one in claims(rows)
    ]  # fmt: skip
    return markdown(("whose", "claim", "difference of", "claimed", "here", "seeds", "verdict"), lines)
