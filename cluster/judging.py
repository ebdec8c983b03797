"""Rollouts, scores and log-probs put side by side: the rows and the summary of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.console import Bar
from cluster.failures import BadNumbers
from cluster.inputs import Inputs
from cluster.roles import Roles
from cluster.waiting import Waiter
from evaluation.compare import win_tie_lose
from evaluation.config import Judge
from evaluation.records import EvaluationRow, MetaRow
from evaluation.signs import ranked_right, signs_of
from tokens.guards import BadNumber
from tokens.records import Rollout, newest

EVALUATION_SEED = 20_260
"""Every round is judged on samples of the same seed, so that rounds differ by the policy alone."""


@dataclass(frozen=True)
class Judgement:
    """One response per held-out prompt, judged.

    Args:
        rollouts: the responses.
        rows: with every score.
        summary: means, and win/tie/lose against SFT.
    """

    rollouts: tuple[Rollout, ...]
    rows: tuple[EvaluationRow, ...]
    summary: dict[str, Any]


def sample_for_judging(
    config: RunConfig, inputs: Inputs, roles: Roles, wait: Waiter, version: int, bar: Bar | None
) -> list[Rollout]:
    """One response of the current policy to each held-out prompt.

    Returns:
        The rollouts, in the prompts' order.
    """
    prompts = inputs.eval_prompts[: config.evaluation.num_prompts]
    return wait("evaluate", roles.rollout.sample(prompts, 1, EVALUATION_SEED, version), bar)


def judge(
    config: RunConfig,
    inputs: Inputs,
    roles: Roles,
    wait: Waiter,
    version: int,
    sft: Judgement | None,
    bar: Bar | None = None,
    rollouts: Sequence[Rollout] | None = None,
) -> Judgement:
    """Judge the current policy on the held-out prompts.

    Args:
        config: of the run.
        inputs: prompts and, for the sandbox, the truth.
        roles: engines, scorer, learner.
        wait: waits for them.
        version: policy version that the engines hold.
        sft: the SFT policy's own judgement; None when that is what is being judged.
        bar: shows progress.
        rollouts: responses sampled already.

    Returns:
        The judgement.
    """
    if rollouts is None:
        rollouts = sample_for_judging(config, inputs, roles, wait, version, bar)
    scores = wait("evaluate", roles.scorer.score(rollouts))
    held_out = wait("evaluate", roles.scorer.judge(rollouts)) if config.evaluation.num_held_out else None
    policy, reference = wait("evaluate", roles.learner.statistics(rollouts))
    check_likelihoods(parity_bound(config, rollouts, version), rollouts, policy, reference)
    rows = tuple(
        EvaluationRow(
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.text,
            domain=rollout.prompt.domain,
            response=rollout.text,
            finished=rollout.finished,
            num_tokens=len(rollout.response_ids),
            gold=None if inputs.gold is None else inputs.gold(rollout.prompt.text, rollout.text),
            proxy=scores.members[i][0],
            ensemble_mean=scores.mean[i],
            ensemble_std=scores.std[i],
            member_scores=scores.members[i],
            policy_logprob=policy[i],
            sft_logprob=reference[i],
            held_out=None if held_out is None else held_out.mean[i],
            held_out_std=None if held_out is None else held_out.std[i],
        )
        for i, rollout in enumerate(rollouts)
    )
    if sft is None:
        return Judgement(tuple(rollouts), rows, summarise(config, rows, rows) | watched(rows, None))
    theirs = rejudged(sft, wait, roles)
    gaps = (ours - other for ours, other in zip(verdicts(config, rows), verdicts(config, theirs), strict=True))
    against = tuple(replace(row, over_sft=gap) for row, gap in zip(rows, gaps, strict=True))
    of_sft = {"sft_ensemble_std": sum(row.ensemble_std for row in theirs) / len(theirs)}
    return Judgement(tuple(rollouts), against, summarise(config, against, theirs) | watched(against, theirs) | of_sft)


def comparable(config: RunConfig) -> bool:
    """True if engine and learner compute the same distribution in the same arithmetic."""
    return not config.rollout.reshaped() and config.resources.rollout.dtype == config.resources.learner.dtype == "float32"


def parity_bound(config: RunConfig, rollouts: Sequence[Rollout], version: int) -> float | None:
    """How far the engines' log-probs may lie from the learner's: that they agree proves that the last sync arrived whole.

    Args:
        config: of the run.
        rollouts: to be compared; those that older weights had a part in prove nothing.
        version: of the learner's weights.

    Returns:
        ``rollout.parity_bound``, nats per token; None where the two cannot be compared, or older weights had a part in all.
    """
    fresh = any(rollout.policy_version == version and not rollout.swaps for rollout in rollouts)
    return config.rollout.parity_bound if comparable(config) and fresh else None


def check_likelihoods(bound: float | None, rollouts: Sequence[Rollout], policy: Sequence[float], sft: Sequence[float]) -> None:
    """The sums of log-probs of an evaluation must be finite, and the engines' those of the learner.

    Args:
        bound: as ``parity_bound`` gives it.
        rollouts: N responses.
        policy: N sums of the learner's log-probs, nats.
        sft: the same of the SFT model.

    Raises:
        BadNumbers: if one is not finite; or the engines' lie further off, in the name of the engines.
    """
    for name, sums in (("policy", policy), ("SFT model", sft)):
        if not all(map(math.isfinite, sums)):
            bad = BadNumber(f"the log-prob of a response under the {name}", sum(sums), where="the evaluation", undo=True)
            raise BadNumbers(str(bad), bad, "learner-0")
    if bound is None:
        return
    gaps = [abs(sum(r.sampler_logprobs) - total) / len(r.response_ids) for r, total in zip(rollouts, policy, strict=True)]
    told = zip(rollouts, gaps, newest(rollouts), strict=True)
    engines = tuple(sorted({rollout.engine for rollout, gap, is_newest in told if is_newest and not gap <= bound}))
    if engines:
        what = f"the largest difference per token between a response's log-prob of {', '.join(engines)} and the learner's"
        limit = f"at most {bound:g} nats (rollout.parity_bound): the engine's weights are not the learner's"
        bad = BadNumber(what, max(gaps), limit, "the evaluation", engines=engines)
        raise BadNumbers(str(bad), bad, engines[0] or "driver")


def rejudged(sft: Judgement, wait: Waiter, roles: Roles) -> Sequence[EvaluationRow]:
    """The SFT policy's rows as this round's ensemble sees them: truth and held-out members do not change, the ensemble does."""
    scores = wait("evaluate", roles.scorer.score(sft.rollouts))
    return [
        replace(
            row,
            proxy=scores.members[i][0],
            ensemble_mean=scores.mean[i],
            ensemble_std=scores.std[i],
            member_scores=scores.members[i],
        )
        for i, row in enumerate(sft.rows)
    ]


def summarise(config: RunConfig, rows: Sequence[EvaluationRow], theirs: Sequence[EvaluationRow]) -> dict[str, Any]:
    """Means over the prompts, and win/tie/lose of ``rows`` against ``theirs`` on the same prompts.

    Returns:
        The ledger's ``evaluation`` entry.
    """

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    result = win_tie_lose(verdicts(config, rows), verdicts(config, theirs), config.evaluation.tie)
    golds = [row.gold for row in rows if row.gold is not None]
    held_out = [row.held_out for row in rows if row.held_out is not None]
    apart = [row.held_out_std for row in rows if row.held_out_std is not None]
    num_tokens = sum(row.num_tokens for row in rows)
    return {
        "proxy": mean([row.proxy for row in rows]),
        "ensemble_mean": mean([row.ensemble_mean for row in rows]),
        "ensemble_std": mean([row.ensemble_std for row in rows]),
        "gold": mean(golds) if golds else None,
        "held_out": mean(held_out) if held_out else None,
        "held_out_std": mean(apart) if apart else None,
        "kl": mean([row.policy_logprob - row.sft_logprob for row in rows]),
        "perplexity": math.exp(-sum(row.sft_logprob for row in rows) / num_tokens),
        "length": num_tokens / len(rows),
        "finished": mean([float(row.finished) for row in rows]),
        "win": result.win,
        "tie": result.tie,
        "lose": result.lose,
        "margin": result.margin,
        "margin_low": result.low,
        "margin_high": result.high,
        "judge": config.evaluation.judge,
    }


def verdicts(config: RunConfig, rows: Sequence[EvaluationRow]) -> list[float]:
    """What the config's judge says of each response."""
    judged: dict[Judge, list[float | None]] = {
        "gold": [row.gold for row in rows],
        "held_out": [row.held_out for row in rows],
        "ensemble": [row.ensemble_mean for row in rows],
    }
    return [value for value in judged[config.evaluation.judge] if value is not None]


def watched(rows: Sequence[EvaluationRow], theirs: Sequence[EvaluationRow] | None) -> dict[str, float | None]:
    """Signs of over-optimisation in judged responses; docs/monitor.md.

    Args:
        rows: of the policy.
        theirs: SFT's to the same prompts, with scores of the same r_k; None for SFT itself.

    Returns:
        Part of the ledger's ``evaluation`` entry.
    """
    signs = signs_of(
        [row.response for row in rows],
        [row.num_tokens for row in rows],
        [row.finished for row in rows],
        [row.proxy for row in rows],
    )
    pairs = [(row, other) for row, other in zip(rows, theirs or (), strict=False) if row.gold is not None]
    return vars(signs) | {
        "reward_accuracy": ranked_right(
            [(row.proxy, other.proxy) for row, other in pairs], [(row.gold or 0.0, other.gold or 0.0) for row, other in pairs]
        )
    }


def monitored(
    rollouts: Sequence[Rollout],
    proxies: Sequence[float],
    golds: Sequence[float] | None,
    held_out: tuple[float, float] | None,
    update: Mapping[str, float],
) -> dict[str, float | None]:
    """The same signs in the rollouts of a PPO step.

        perplexity under the reference = exp(entropy + KL / length), of the sampled tokens

    Args:
        rollouts: B of the step.
        proxies: [B] of r_k.
        golds: [B] of the truth; None where it is not known.
        held_out: mean score of the held-out members and mean of their spread; None without.
        update: metrics of the step's update, which began with these rollouts.

    Returns:
        By name, as a row of metrics.jsonl has it.
    """
    signs = signs_of([r.text for r in rollouts], [len(r.response_ids) for r in rollouts], [r.finished for r in rollouts], proxies)
    samples: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        samples.setdefault(rollout.prompt.id, []).append(place)
    pairs = [pair for places in samples.values() for pair in combinations(places, 2)] if golds is not None else []
    mean, spread = (None, None) if held_out is None else held_out
    return {
        **vars(signs),
        "reward_accuracy": ranked_right(
            [(proxies[a], proxies[b]) for a, b in pairs], [] if golds is None else [(golds[a], golds[b]) for a, b in pairs]
        ),
        "held_out": mean,
        "held_out_std": spread,
        "perplexity": math.exp(update["policy/entropy"] + update["policy/kl"] / update["policy/length"]),
        "distance": math.sqrt(max(0.0, update["policy/kl"])),
    }


def meta_rows(
    shifted: Sequence[Rollout],
    scores: Scores,
    vanilla: int | None,
    gold: Callable[[str, str], float] | None,
    back: Collection[int] = (),
) -> list[MetaRow]:
    """S_k as it is kept: every sample with what r_k, a reward model trained without MetaRM, and each member say of it.

    Args:
        shifted: the samples.
        scores: of the ensemble.
        vanilla: the member that was trained without MetaRM; None = there is none.
        gold: the sandbox's truth; None where there is none.
        back: places of the prompts that MetaRM's ascent never saw, as they come first in ``shifted``.

    Returns:
        One row per rollout.
    """
    unseen = {name for place, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in shifted)) if place in back}
    column = scores.ids.index(vanilla) if vanilla in scores.ids else None
    return [
        MetaRow(
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.text,
            sample=rollout.sample,
            response=rollout.text,
            token_ids=rollout.response_ids,
            sampler_logprobs=rollout.sampler_logprobs,
            policy_version=rollout.policy_version,
            finished=rollout.finished,
            score_vanilla=None if column is None else scores.members[i][column],
            score_metarm=scores.members[i][0],
            members=scores.ids,
            member_scores=scores.members[i],
            gold=None if gold is None else gold(rollout.prompt.text, rollout.text),
            kept_back=rollout.prompt.id in unseen,
        )
        for i, rollout in enumerate(shifted)
    ]
