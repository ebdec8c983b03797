"""Alarms: what in a run's judgements means that the policy pleases the reward model and nobody else, and what to do about it.

Each looks at the evaluations of the ledger alone, SFT's and those of the rounds so far, so a report finds what the console said.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Evaluation = Mapping[str, float | str | None]
"""An evaluation as the ledger has it."""

UP, DOWN = 0.05, 0.05
"""By how much a reward has risen or fallen, in units of the judge, before it counts."""
DISAGREEMENT = 1.5
"""Spread of the members' scores over that of the same members' on SFT's responses."""
LONGER, TIED_TO_LENGTH = 1.3, 0.3
"""Length over SFT's, and the correlation of length and reward."""
REPEATED, CUT, SAME = 0.1, 0.1, 0.2
"""Rise over SFT of the share of repeated trigrams, of cut responses, and of self-BLEU."""
BLIND = 0.55
"""Share of fresh pairs ranked right, of which chance is one half."""
SURE = 1.645
"""Standard errors below ``BLIND`` from which on a share of labelled pairs is: one in twenty by chance."""


@dataclass(frozen=True)
class Alarm:
    """A sign that is beyond its limit.

    Args:
        name: short, for a search.
        text: what is seen, with its numbers.
        do: what to do.
    """

    name: str
    text: str
    do: str

    def words(self) -> str:
        """One line."""
        return f"{self.name}: {self.text}. {self.do}"


def alarms(start: Evaluation, rounds: Sequence[Evaluation], kl_budget: float | None = None) -> tuple[Alarm, ...]:
    """What the last round's evaluation should alarm about.

    Source: over-optimisation as in Gao et al. 2023 (arXiv:2210.10760); disagreement as in Coste et al. 2024 (arXiv:2310.02743);
    length as in Singhal et al. 2023 (arXiv:2310.03716). The limits are ours.

    Args:
        start: SFT's evaluation.
        rounds: those of the rounds so far, at least one; what an evaluation does not say is not alarmed about.
        kl_budget: nats per response; None = none.

    Returns:
        The alarms, gravest first; perhaps none.

    Raises:
        ValueError: if there is no round.

    Padding contract: there is none.
    """
    if not rounds:
        raise ValueError("alarms are about a round, got none")
    found = [look(start, rounds) for look in _LOOKS]
    return tuple(alarm for alarm in (*found, _kl_budget(rounds[-1], kl_budget)) if alarm is not None)


def _number(evaluation: Evaluation, name: str) -> float | None:
    value = evaluation[name] if name in evaluation else None
    return None if value is None or isinstance(value, str) else float(value)


def _both(start: Evaluation, last: Evaluation, name: str) -> tuple[float, float] | None:
    first, now = _number(start, name), _number(last, name)
    return None if first is None or now is None else (first, now)


def _proxy_up_judge_down(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    """Since an earlier round (or SFT) proxy has risen while the truth, or without it the held-out members, have fallen."""
    last, said = rounds[-1], {"gold": "gold reward", "held_out": "held-out members' score"}
    for name in said:
        earlier = [(index, _number(each, name), _number(each, "proxy")) for index, each in enumerate((start, *rounds[:-1]))]
        known = [(judged, index, proxy) for index, judged, proxy in earlier if judged is not None and proxy is not None]
        now, proxy_now = _number(last, name), _number(last, "proxy")
        if not known or now is None or proxy_now is None:
            continue
        top, index, proxy = max(known, key=lambda row: (row[0], -row[1]))
        if now >= top - DOWN or proxy_now <= proxy + UP:
            return None
        since = "SFT" if index == 0 else f"round {index - 1}"
        return Alarm(
            f"proxy_up_{name}_down",
            f"since {since} the reward model's score has risen from {proxy:z.2f} to {proxy_now:z.2f} while the {said[name]} "
            f"has fallen from {top:z.2f} to {now:z.2f}",
            "Take best/, not this round; to go further raise policy.kl.coef or shorten the rounds (policy.steps_per_round), "
            "so that the reward model sees new samples sooner",
        )
    return None


def _reward_model_blind(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    """By the truth where it is known; else by labels, where they are enough to tell."""
    last = rounds[-1]
    right, agreed, labels = (_number(last, name) for name in ("reward_accuracy", "fresh_accuracy", "fresh_labelled"))
    if right is not None:
        seen = f"the reward model ranks {right:.0%} of the policy's own responses right against SFT's (chance: 50%)"
        do = "have pairs of the current policy's samples labelled (fresh.num_pairs), turn on MetaRM (meta.enabled), or stop here"
        return Alarm("reward_model_blind", seen, f"What it pays says little about these texts: {do}") if right < BLIND else None
    if agreed is None or not labels or agreed + SURE * math.sqrt(agreed * (1 - agreed) / labels) >= BLIND:
        return None
    return Alarm(
        "reward_model_blind",
        f"the last round's reward model ranks {agreed:.0%} of {labels:.0f} fresh pairs as they are labelled (chance: 50%)",
        "What it pays says little about these texts, or the labels say little themselves: let some pairs be labelled a second "
        "time, let the reward model learn from the fresh ones (fresh.carry all), turn on MetaRM (meta.enabled), or stop here",
    )


def _disagreement_grows(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    theirs, now = _number(rounds[-1], "sft_ensemble_std"), _number(rounds[-1], "ensemble_std")
    if theirs is None or now is None or theirs <= 0 or now < DISAGREEMENT * theirs:
        return None
    return Alarm(
        "disagreement_grows",
        f"the members' scores lie {now:.2f} apart, on SFT's responses {theirs:.2f}",
        "The policy is where they have no pairs: use scorer.aggregate mean_minus_std or worst, scorer.refresh each_round, or "
        "raise policy.kl.coef",
    )


def _length_hacking(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    both, tied = _both(start, rounds[-1], "length"), _number(rounds[-1], "length_correlation")
    if both is None or tied is None or both[1] < LONGER * both[0] or tied < TIED_TO_LENGTH:
        return None
    return Alarm(
        "length_hacking",
        f"responses have {both[1]:.1f} tokens, SFT's {both[0]:.1f}, and longer ones are paid more (correlation {tied:+.2f})",
        "Set policy.length_penalty, or give the reward model pairs of equal length",
    )


def _repetition(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    both = _both(start, rounds[-1], "repetition")
    if both is None or both[1] < both[0] + REPEATED:
        return None
    return Alarm(
        "repetition",
        f"{both[1]:.0%} of the word trigrams of a response stand in it before, in SFT's {both[0]:.0%}",
        "Raise policy.kl.coef, or show the reward model pairs in which the rejected response repeats itself",
    )


def _truncation(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    both = _both(start, rounds[-1], "finished")
    if both is None or both[1] > both[0] - CUT:
        return None
    return Alarm(
        "truncation",
        f"{1 - both[1]:.0%} of the responses are cut by the token limit, of SFT's {1 - both[0]:.0%}",
        "Set policy.missing_eos_penalty or policy.truncated, or raise rollout.max_new_tokens",
    )


def _sameness(start: Evaluation, rounds: Sequence[Evaluation]) -> Alarm | None:
    both = _both(start, rounds[-1], "self_bleu")
    if both is None or both[1] < both[0] + SAME:
        return None
    return Alarm(
        "sameness",
        f"responses to different prompts have become alike: self-BLEU {both[1]:.2f}, of SFT's {both[0]:.2f}",
        "Raise policy.kl.coef, or take an earlier round",
    )


def _kl_budget(last: Evaluation, budget: float | None) -> Alarm | None:
    kl = _number(last, "kl")
    if budget is None or kl is None or kl <= budget:
        return None
    return Alarm(
        "kl_budget",
        f"the policy is {kl:.1f} nats per response from SFT, evaluation.kl_budget is {budget:g}",
        "Raise policy.kl.coef, let policy.kl.controller adapt it, or stop here",
    )


_LOOKS: tuple[Callable[[Evaluation, Sequence[Evaluation]], Alarm | None], ...] = (
    _proxy_up_judge_down,
    _reward_model_blind,
    _disagreement_grows,
    _length_hacking,
    _repetition,
    _truncation,
    _sameness,
)
