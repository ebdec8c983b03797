"""The samples of a run, to be searched and sorted in its page: S_k with each member's scores, judged responses beside SFT's.

Letters: M ensemble members, k samples of a prompt.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.curves import spread
from evaluation.records import EvaluationRow, MetaRow
from evaluation.run import Run
from evaluation.run_config import flat_config, tie_of

MAX_PROMPTS = 40
"""Of a group."""
MAX_ROUNDS = 8
MAX_BYTES = 1_600_000
"""Of all samples together, about; so that the page stays small enough for a phone."""
MAX_TEXT = 1200
"""Characters of a text that are shown."""
MARKUP = 700
"""Bytes around a text, about."""

Verdict = Literal["win", "tie", "lose", ""]


@dataclass(frozen=True)
class Shown:
    """A response as the page shows it; numbers that are not known are None."""

    who: str
    text: str
    left_out: int  # characters
    tokens: int
    finished: bool
    mean: float
    spread: float | None
    gold: float | None
    members: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class PromptSamples:
    """A prompt with its responses, and what it is sorted and filtered by."""

    prompt: str
    domain: str
    responses: tuple[Shown, ...]
    disagreement: float | None
    score: float
    gold: float | None
    length: float
    gain: float | None = None
    verdict: Verdict = ""


@dataclass(frozen=True)
class Group:
    """The prompts of one round, of S_k or of the evaluation: those shown, of how many."""

    name: str
    title: str
    note: str
    judged: bool
    prompts: tuple[PromptSamples, ...]
    total: int


@dataclass(frozen=True)
class Browser:
    """What the page's section is made of; ``digest`` admits its script, templates/samples.js, and no other."""

    groups: tuple[Group, ...]
    digest: str


def sample_browser(run: Run) -> Browser:
    """The samples that the page shows, and the digest of the script that searches them.

    Where there are more prompts than are shown, those shown lie evenly from the most to the least disagreement of the ensemble.

    Source: meta_rollouts.parquet and evaluation.parquet of the rounds.

    Args:
        run: as read.

    Returns:
        Two groups a round, the last round first; rounds without S_k (baselines) have one.

    Padding contract: there is none.
    """
    rounds = spread(tuple(zip(run.ledger.rounds, run.meta_rows, run.round_rows, strict=True)), MAX_ROUNDS)
    start, tie = {row.prompt_id: row for row in run.start_rows}, tie_of(flat_config(run))
    num_groups = sum(1 + bool(shifted) for _, shifted, _ in rounds)
    groups: list[Group] = []
    for round_, shifted, judged in reversed(rounds):
        where = f"round {round_.index}"
        if shifted:
            note = "Responses of the policy that the round began with, which r_k is trained to tell apart; the best scored first."
            groups.append(_group(f"shifted-{round_.index}", f"S_k of {where}", note, False, shifted_prompts(shifted), num_groups))
        pairs = [_against(row, start[row.prompt_id], where, tie, round_.evaluation.judge == "gold") for row in judged]
        note = "One response to each held-out prompt by the policy that the round ended with, and SFT's to the same prompt."
        groups.append(_group(f"judged-{round_.index}", f"Evaluation of {where}", note, True, pairs, num_groups))
    script = (Path(__file__).parent / "templates" / "samples.js").read_text("utf-8").removesuffix("\n")  # as it is included
    return Browser(tuple(groups), base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def shifted_prompts(rows: Sequence[MetaRow]) -> list[PromptSamples]:
    """The prompts of S_k, each with its k responses, the best scored first.

    disagreement = mean over the k responses of the population standard deviation over the M members' scores

    Source: Secrets of RLHF Part II, section 2.1, has the standard deviation over an ensemble as a measure of trust in it.

    Args:
        rows: of one round.

    Returns:
        One entry per prompt, in the order of first appearance.

    Padding contract: there is none.
    """
    by_prompt: dict[str, list[MetaRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    found = []
    for group in by_prompt.values():
        shown = sorted((_of_shifted(row) for row in group), key=lambda response: -response.mean)
        spreads = [response.spread for response in shown if response.spread is not None]
        golds = [response.gold for response in shown if response.gold is not None]
        found.append(
            PromptSamples(
                prompt=group[0].prompt,
                domain="",
                responses=tuple(shown),
                disagreement=_mean(spreads) if spreads else None,
                score=_mean([response.mean for response in shown]),
                gold=_mean(golds) if golds else None,
                length=_mean([float(response.tokens) for response in shown]),
            )
        )
    return found


def verdict_of(row: EvaluationRow, sft: EvaluationRow, tie: float, by_gold: bool) -> tuple[float | None, Verdict]:
    """How the judge decided between a response and SFT's to the same prompt.

    win where judge(row) - judge(sft) > tie, lose where it is < -tie, else tie

    Source: ``evaluation.compare.win_tie_lose``.

    Args:
        row: of a round.
        sft: of the start.
        tie: differences up to this are ties.
        by_gold: whether the gold reward judged; what the ensemble said of SFT's response then is not in files from before
            ``over_sft`` was kept.

    Returns:
        (difference, verdict); (None, "") where it is not known.

    Padding contract: there is none.
    """
    gap = row.over_sft
    if gap is None and by_gold and row.gold is not None and sft.gold is not None:
        gap = row.gold - sft.gold
    if gap is None:
        return None, ""
    return gap, "win" if gap > tie else "lose" if -gap > tie else "tie"


def _against(row: EvaluationRow, sft: EvaluationRow, who: str, tie: float, by_gold: bool) -> PromptSamples:
    gap, verdict = verdict_of(row, sft, tie, by_gold)
    return PromptSamples(
        prompt=row.prompt,
        domain=row.domain,
        responses=(_of_evaluation(who, row), _of_evaluation("SFT", sft)),
        disagreement=row.ensemble_std,
        score=row.ensemble_mean,
        gold=row.gold,
        length=float(row.num_tokens),
        gain=gap,
        verdict=verdict,
    )


def _of_shifted(row: MetaRow) -> Shown:
    named = tuple((_member(member), score) for member, score in zip(row.members, row.member_scores, strict=True))
    if not named:
        vanilla = () if row.score_vanilla is None else (("vanilla", row.score_vanilla),)
        named = (("r_k", row.score_metarm), *vanilla)
    kept = np.array(row.member_scores)
    return Shown(
        who=f"sample {row.sample}",
        text=row.response[:MAX_TEXT],
        left_out=max(0, len(row.response) - MAX_TEXT),
        tokens=len(row.token_ids),
        finished=row.finished,
        mean=float(kept.mean()) if len(kept) else row.score_metarm,
        spread=float(kept.std()) if len(kept) else None,
        gold=row.gold,
        members=named,
    )


def _of_evaluation(who: str, row: EvaluationRow) -> Shown:
    return Shown(
        who=who,
        text=row.response[:MAX_TEXT],
        left_out=max(0, len(row.response) - MAX_TEXT),
        tokens=row.num_tokens,
        finished=row.finished,
        mean=row.ensemble_mean,
        spread=row.ensemble_std,
        gold=row.gold,
        members=tuple((f"#{place}", score) for place, score in enumerate(row.member_scores)),
    )


def _member(number: int) -> str:
    return "r_k" if number == 0 else f"member {number}"


def _group(name: str, title: str, note: str, judged: bool, found: Sequence[PromptSamples], num_groups: int) -> Group:
    """At most MAX_PROMPTS of the prompts, and no more than the group's share of MAX_BYTES."""
    order = sorted(found, key=lambda prompt: -(prompt.disagreement or 0.0))
    number = min(MAX_PROMPTS, len(order))
    while number > 2 and sum(map(_size, spread(order, number))) > MAX_BYTES / num_groups:
        number = max(2, number * 3 // 4)
    return Group(name, title, note, judged, tuple(spread(order, max(2, number))), len(order))


def _size(prompt: PromptSamples) -> int:
    texts = [prompt.prompt, *(response.text for response in prompt.responses)]
    return sum(len(text.encode("utf-8", "replace")) + MARKUP for text in texts)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
