"""For whom a policy is better than another, and for whom worse.

Letters: N prompts, m people.
"""

import math
from collections.abc import Sequence

from evaluation.compare import mean_interval
from evaluation.records import PersonRow

FEWEST_PROMPTS = 2
"""That an interval is made of."""
Table = Sequence[Sequence[float]]
"""[N, m]."""


def person_rows(
    names: Sequence[str],
    ours: Table,
    theirs: Table,
    our_gold: Table | None,
    their_gold: Table | None,
    whose: Sequence[str] | None = None,
) -> list[PersonRow]:
    """What our responses are worth to everybody, beside theirs to the same prompts.

        gain_h = mean_i (ours_ih - theirs_ih), with Student's 95% interval over the prompts

    Source: a paired comparison for each person by itself, so that the mean over people hides nobody.

    Args:
        names: [m].
        ours: [N, m] everybody's reward of our responses.
        theirs: [N, m] of theirs.
        our_gold: [N, m] true rewards, NaN for a person whose is not known; None where nobody's is.
        their_gold: likewise.
        whose: [N] names, whom each prompt is written for: a person is asked about their own prompts alone; None = about all.

    Returns:
        A row for everybody who is asked about two prompts or more.

    Raises:
        ValueError: if there are fewer than two prompts, or tables differ in shape.

    Padding contract: there is none.
    """
    rows = []
    for place, name in enumerate(names):
        own = [i for i in range(len(ours)) if whose is None or whose[i] == name]
        if whose is not None and len(own) < FEWEST_PROMPTS:
            continue
        score, *gain = _gain(ours, theirs, place, own)
        gold: list[float] | list[None] = [None] * 4
        if our_gold is not None and their_gold is not None and not math.isnan(our_gold[0][place]):
            gold = _gain(our_gold, their_gold, place, own)
        rows.append(PersonRow(name, len(own), score, *gain, *gold))
    return rows


def _gain(ours: Table, theirs: Table, place: int, own: Sequence[int]) -> list[float]:
    """Mean of ours; mean, low and high of the difference."""
    if len(ours) != len(theirs):
        raise ValueError(f"a paired comparison needs as many of ours as of theirs, got {len(ours)} and {len(theirs)}")
    pairs = [(ours[i][place], theirs[i][place]) for i in own]
    return [math.fsum(a for a, _ in pairs) / len(pairs), *mean_interval([a - b for a, b in pairs])]


def who_gains(rows: Sequence[PersonRow]) -> str:
    """How many gain, how many lose, and who is worst off, in a sentence: minorities stay visible.

    By the true reward of those whose it is known of, else by what the reward model says of everybody.

    Source: none needed.

    Args:
        rows: of everybody; at least one.

    Returns:
        The sentence.

    Raises:
        ValueError: if there is nobody.

    Padding contract: there is none.
    """
    if not rows:
        raise ValueError("for whom a policy is better can be said of somebody only, got nobody")
    told: list[tuple[str, float, float, float]] = [
        (r.name, r.gold_gain, r.gold_low, r.gold_high)
        for r in rows
        if r.gold_gain is not None and r.gold_low is not None and r.gold_high is not None
    ]
    by = "true reward" if told else "reward model"
    found = told or [(r.name, r.gain, r.low, r.high) for r in rows]
    hint = "" if told else "; it is what the policy was paid by, and flatters it"
    better, worse = sum(low > 0 for _, _, low, _ in found), sum(high < 0 for *_, high in found)
    name, gain, *_ = min(found, key=lambda row: row[1])
    return (
        f"of {len(found)} people, by the {by} of each: better than SFT for {better}, worse for {worse}, not told apart for "
        f"{len(found) - better - worse} (95% intervals: one in forty of each kind by chance); worst off is {name} with "
        f"{gain:+.2f}{hint}"
    )
