"""What a run amounts to, in words: computed from its numbers, and no kinder than they are."""

from dataclasses import dataclass
from typing import Literal

from evaluation.baseline_words import description, judges_too, subject
from evaluation.best import JUDGE_NAMES
from evaluation.config import Judge
from evaluation.fit_words import collapsed, inflation
from evaluation.run import Evaluation, Run, series
from evaluation.text import TextStats, text_stats

COLLAPSE_SHARE = 0.1
"""One text given to this share of different prompts is worth a warning."""

OVER_OPTIMISED = frozenset({"proxy_up_gold_down", "proxy_up_held_out_down"})
"""Alarms that say that more wins were bought."""


@dataclass(frozen=True)
class Finding:
    """A sentence below the headline: a warning or a plain remark."""

    kind: Literal["warn", "note"]
    text: str


@dataclass(frozen=True)
class Headline:
    """The run's result: a verdict of a few words, a sentence, and the numbers behind it."""

    kind: Literal["good", "warn"]
    verdict: str
    text: str
    detail: str


def judge_in_words(judge: Judge) -> str:
    """How the judge is called in a sentence.

    Source: the config's ``evaluation.judge``.

    Args:
        judge: as in the ledger.

    Returns:
        Words that fit after "by" and "under".

    Padding contract: there is none.
    """
    return JUDGE_NAMES[judge]


def headline(run: Run) -> Headline:
    """The run's result in words: wins and losses against SFT after the last round, with the interval.

    better: the 95% interval of win - lose lies above 0; worse: below 0; otherwise the two cannot be told apart. Where a
    truth that is not the judge has fallen meanwhile (``OVER_OPTIMISED``), the round is called that.

    Source: ``evaluation.compare.win_tie_lose``, as the ledger holds it.

    Args:
        run: the run.

    Returns:
        The headline; ``good`` only where the interval lies above zero, and no alarm says what that is worth.

    Padding contract: there is none.
    """
    rounds = run.ledger.rounds
    e = rounds[-1].evaluation
    after = subject(rounds[-1].choices, len(rounds))
    if e.win is None or e.lose is None or e.margin is None or e.margin_low is None or e.margin_high is None:
        return Headline("warn", "Not compared with SFT", f"{after} has not been compared with SFT.", "The ledger has no outcome.")
    text = f"{after} wins {e.win:.0%} and loses {e.lose:.0%} against SFT under {judge_in_words(e.judge)}."
    detail = (
        f"Win minus lose {e.margin:+z.2f}, 95% interval {e.margin_low:+z.2f} to {e.margin_high:+z.2f} "
        f"over {len(run.start_rows)} held-out prompts"
    )
    if OVER_OPTIMISED & _alarmed(run):
        return Headline("warn", "Over-optimised", text, f"{detail}. Not to be trusted: see the first alarm.")
    if e.margin_low > 0:
        return Headline("good", "Better than SFT", text, f"{detail}.")
    if e.margin_high < 0:
        return Headline("warn", "Worse than SFT", text, f"{detail}: below zero.")
    return Headline("warn", "Not told apart from SFT", text, f"{detail}: zero lies inside it.")


def findings(run: Run) -> tuple[Finding, ...]:
    """What a careful reader would point at next: a judge that is not independent, over-optimisation, collapse, a meta
    step that is idle or only inflates, collapsed prototypes.

    Source: the warning signs of Secrets of RLHF I, section 5 (perplexity, length, KL) and Gao et al. 2023 (proxy against gold).

    Args:
        run: the run.

    Returns:
        Sentences, most important first; perhaps none.

    Padding contract: there is none.
    """
    start, last = run.ledger.start, run.ledger.rounds[-1].evaluation
    told = _alarmed(run)
    found: list[Finding | None] = [
        _baseline(run),
        _judge(run),
        _best(run),
        *(Finding("warn", f"Alarm {alarm.words()}.") for alarm in run.ledger.rounds[-1].alarms),
        None if "proxy_up_gold_down" in told else _gold_before(run),
        _collapsed(run),
        None if "truncation" in told else _unfinished(start, last),
        _meta(run),
        _inflation(run),
        _prototypes(run),
    ]
    return tuple(finding for finding in found if finding is not None)


def texts_of(run: Run) -> tuple[TextStats, ...]:
    """Text statistics of SFT's responses and of each round's.

    Source: ``evaluation.text``.

    Args:
        run: the run.

    Returns:
        [1 + R], SFT first.

    Padding contract: there is none.
    """
    return tuple(
        text_stats([r.response for r in rows], [r.num_tokens for r in rows], [r.finished for r in rows])
        for rows in (run.start_rows, *run.round_rows)
    )


def _baseline(run: Run) -> Finding | None:
    text = description(run.ledger.rounds[-1].choices)
    return None if text is None else Finding("note", text)


def _alarmed(run: Run) -> frozenset[str]:
    """Names of the last round's alarms."""
    return frozenset(alarm.name for alarm in run.ledger.rounds[-1].alarms)


def _best(run: Run) -> Finding | None:
    """What ``best/`` holds."""
    why = run.ledger.rounds[-1].best
    return Finding("note", f"best/: {why}.") if why else None


def _judge(run: Run) -> Finding | None:
    last = run.ledger.rounds[-1]
    if last.evaluation.judge == "gold":
        return None
    if last.evaluation.judge == "held_out":
        return Finding(
            "note",
            "The judges are reward models that nothing is trained by, fitted on pairs of their own: the policy does not learn to "
            "please them, and they can be wrong about texts that no pair is like.",
        )
    why = judges_too(last.choices)
    return Finding("note", f"The judge is the reward ensemble, {why}: it can be fooled along with it.")


def _gold_before(run: Run) -> Finding | None:
    """That an earlier round's gold reward was higher, by what two digits show."""
    scored = [(r.evaluation.gold, r.index) for r in run.ledger.rounds if r.evaluation.gold is not None]
    if not scored or len(scored) != len(run.ledger.rounds):
        return None
    best_gold, best = max(scored)
    gold, index = scored[-1]
    if best == index or f"{gold:z.2f}" == f"{best_gold:z.2f}":
        return None
    return Finding("note", f"The gold reward was highest after round {best} ({best_gold:z.2f}; {gold:z.2f} after round {index}).")


def _collapsed(run: Run) -> Finding | None:
    texts = texts_of(run)
    first, last = texts[0], texts[-1]
    if last.most_common_share >= COLLAPSE_SHARE and last.most_common_share > first.most_common_share:
        return Finding(
            "warn",
            f"Collapse: the policy gives one and the same text to {last.most_common_share:.0%} of the prompts "
            f"(SFT: {first.most_common_share:.0%}): “{last.most_common[:80]}”",
        )
    if last.distinct_2 < 0.5 * first.distinct_2:
        return Finding(
            "warn",
            f"Less variety: the share of distinct word pairs fell from {first.distinct_2:z.2f} to {last.distinct_2:z.2f}.",
        )
    return None


def _unfinished(start: Evaluation, last: Evaluation) -> Finding | None:
    if last.finished >= start.finished - 0.1:
        return None
    return Finding("warn", f"Only {last.finished:.0%} of the responses end by themselves (SFT: {start.finished:.0%}).")


def _meta(run: Run) -> Finding | None:
    rises = [
        (r.index, r.reward.j_before, r.reward.j_after)
        for r in run.ledger.rounds
        if r.reward.j_before is not None and r.reward.j_after is not None
    ]
    if not rises:
        return None if run.baseline else Finding("note", "The reward models were trained without MetaRM.")
    idle = [index for index, before, after in rises if after <= before]
    if idle:
        return Finding("warn", f"The meta step did not raise J in round {', '.join(map(str, idle))}: meta.eta may be too small.")
    return None


def _inflation(run: Run) -> Finding | None:
    """The last round's ascent, on the prompts of S_k that it did not see."""
    text = inflation(run.ledger.rounds[-1].reward.numbers)
    return None if text is None else Finding("warn", f"Round {run.ledger.rounds[-1].index}: {text}")


def _prototypes(run: Run) -> Finding | None:
    """The last round's contrastive loss."""
    last = run.ledger.rounds[-1].index
    text = collapsed([value for _, index, value in series(run, "reward", "reward/prototypes_effective") if index == last])
    return None if text is None else Finding("warn", f"Round {last}: {text}")
