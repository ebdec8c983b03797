"""Fresh labels: in every round somebody compares samples of the current policy, and r_k learns from what was said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cluster.asking import ask_in_both_orders, open_answers
from cluster.config import RunConfig
from cluster.console import Console
from cluster.endpoint_judge import EndpointJudge
from cluster.endpoint_options import EndpointOptions
from cluster.inputs import Source
from cluster.judges import FIRST, SECOND, Answer, EnsembleJudge, Judge, RewardJudge
from cluster.open_judge import open_judge
from cluster.run_directory import RunDirectory
from cluster.seeds import derive
from cluster.stages import Stages
from cluster.waiting import Waiter
from evaluation.records import FreshRow, read_rows, write_rows
from evaluation.signs import ranked_right
from preferences.formats import Texts
from preferences.fresh import carried, choose_twos
from preferences.labels import combine
from sandbox.labels import answers
from sandbox.world import World
from tokens.errors import UserError
from tokens.records import Pair, Rollout

FRESH = "fresh.parquet"
"""Of a round: the pairs that were labelled in it."""
ANSWERS = "fresh.answers.jsonl"
"""Of a run: every answer, so that nobody is asked twice."""
ANNOTATORS = "annotators"
FEWEST_TOLD = 32
"""Labelled pairs that an evaluation's ``fresh_accuracy`` rests on at least: of fewer it says little."""


class AnnotatorJudge:
    """The sandbox's annotators: right as often as those who labelled D, and of one opinion whatever is shown first.

    Args:
        world: whose ``annotator_beta`` and ``flip_rate`` are used.
        seed: of their errors.
    """

    batch_size = 1024
    template = None

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        digest = hashlib.sha256(f"{world.config.model_dump_json()}{seed}".encode()).hexdigest()
        self.name = f"{ANNOTATORS}:{digest}"

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        return [self._answer(*texts) for texts in zip(prompts, firsts, seconds, strict=True)]

    def _answer(self, prompt: str, first: str, second: str) -> int:
        one, other = sorted((first, second))
        rng = Random(derive(self.seed, ANNOTATORS, prompt, one, other))
        better = answers(self.world.gold(prompt, one) - self.world.gold(prompt, other), self.world.config, rng)
        return FIRST if better == (one == first) else SECOND


def open_labeller(config: RunConfig, source: Source, stack: ExitStack) -> Judge | None:
    """Who labels fresh pairs, checked: an endpoint is asked for one token.

    Args:
        config: of the run.
        source: of its pairs and prompts.
        stack: closes connections.

    Returns:
        The judge, which computes on the CPU if it is a reward model: GPUs belong to the roles. None where nothing is labelled.

    Raises:
        UserError: if it cannot be asked, or would read prompts by another chat template than the policy's.
    """
    fresh = config.fresh
    if fresh.judge is None:
        return None
    if fresh.judge == ANNOTATORS:
        return AnnotatorJudge(World(config.world), config.seed)
    options = EndpointOptions(fresh.concurrency, fresh.timeout_s, fresh.retries, fresh.max_tokens)
    judge = open_judge(fresh.judge, config, source.rendered, options, stack, on_gpu=False)
    if isinstance(judge, EndpointJudge):
        judge.check()
        judge.name = judge.name.replace(judge.base_url, "", 1)  # its answers are kept by the model, wherever that stands
    if source.rendered:
        members = judge.members if isinstance(judge, EnsembleJudge) else [judge] if isinstance(judge, RewardJudge) else ()
        for member in members:
            if member.tokenizer.chat_template != source.tokenizer.chat_template:
                raise UserError(
                    f"fresh.judge {fresh.judge}: the prompts are messages, rendered by the policy's chat template, and "
                    f"{member.path} has another one or none. Name a reward model that was trained with the same, or an endpoint"
                )
    return judge


@dataclass(frozen=True)
class Labels:
    """What came of asking.

    Args:
        rows: the labelled pairs.
        counts: by name: "wanted", "compared" (two samples of a prompt with different texts), "labelled", "undecided" (the judge
            changed its mind with the order, or did not say), "not_asked" (more than it can take).
    """

    rows: list[FreshRow]
    counts: dict[str, int]


def label(config: RunConfig, judge: Judge, place: Path, index: int, shifted: Sequence[Rollout], console: Console) -> Labels:
    """Ask about pairs of samples, in both orders. However few get a label, that is what is known of the round, as long as the
    judge says anything at all.

    Args:
        config: of the run.
        judge: who is asked.
        place: directory of the run, where answers are kept.
        index: of the round.
        shifted: k samples of each prompt.
        console: shows how far it is.

    Returns:
        The labels.

    Raises:
        UserError: if no question at all was answered.
        JudgeFailed: if the judge cannot go on; its answers so far are kept.
    """
    twos = choose_twos(shifted, config.fresh.num_pairs, derive(config.seed, "fresh", index))
    texts = [Texts(first.prompt.text, first.text, second.text) for first, second in twos]
    with open_answers(place / ANSWERS) as known:
        forward, backward, not_asked = ask_in_both_orders(texts, judge, known, console, few_will_do=True)
    if not_asked:
        first = next(iter(not_asked.values()))
        console.say(
            f"[yellow]note[/] {len(not_asked):,} of {len(twos):,} pairs were more than the judge can take; first: {first}"
        )
    rows = [
        _row(f"round_{index:03d}-{number:05d}", *(two if said == FIRST else two[::-1]), judge.name)
        for number, (two, *both) in enumerate(zip(twos, forward.tolist(), backward.tolist(), strict=True))
        if (said := combine(*both)) in (FIRST, SECOND)
    ]
    counts = {"wanted": config.fresh.num_pairs, "compared": len(twos), "labelled": len(rows)}
    undecided = len(twos) - len(rows) - len(not_asked)
    return Labels(rows, counts | {"undecided": undecided, "not_asked": len(not_asked)})


def _row(name: str, chosen: Rollout, rejected: Rollout, judge: str) -> FreshRow:
    return FreshRow(
        id=name,
        prompt_id=chosen.prompt.id,
        prompt=chosen.prompt.text,
        domain=chosen.prompt.domain,
        chosen=chosen.text,
        rejected=rejected.text,
        prompt_ids=chosen.prompt.token_ids,
        chosen_ids=chosen.response_ids,
        rejected_ids=rejected.response_ids,
        chosen_sample=chosen.sample,
        rejected_sample=rejected.sample,
        judge=judge,
    )


@dataclass(frozen=True)
class Labelling:
    """The stage of a round in which its samples are labelled.

    Args:
        config: of the run.
        judge: who labels.
        directory: of the run.
        wait: keeps the time.
        console: shows it.
    """

    config: RunConfig
    judge: Judge
    directory: RunDirectory
    wait: Waiter
    console: Console

    def label(
        self,
        index: int,
        work: Stages,
        shifted: Sequence[Rollout],
        back: Collection[int],
        before: Callable[[], Sequence[float] | None],
    ) -> None:
        """Have pairs of S_k labelled, once, and look how many the reward model so far would have ranked so.

        Args:
            index: of the round.
            work: its stages.
            shifted: S_k.
            back: places of its prompts that are not asked about: MetaRM's ascent does not see them either.
            before: gives the scores of S_k by r_(k-1), None where some were not finite; not asked in round 0.
        """
        if work.draft.done(FRESH) is not None:
            return
        places = {name: place for place, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in shifted))}
        shown = [rollout for rollout in shifted if places[rollout.prompt.id] not in back]
        with self.wait.doing("label"):
            labels = label(self.config, self.judge, self.directory.path, index, shown, self.console)
        scores = before() if index and labels.rows else None
        right = None if scores is None else share_right(labels.rows, shifted, scores)
        write_rows(work.draft.partial(FRESH), labels.rows, FreshRow)
        work.record(FRESH, [FRESH], {**labels.counts, "accuracy": right, "judge": self.judge.name})

    def learnt(self, index: int, work: Stages, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        """What r_k learns from, and a line that says so.

        Args:
            index: of the round.
            work: its stages.
            pairs: D.

        Raises:
            UserError: if that is nothing.
        """
        places = [*(self.directory.round_path(before) for before in range(index)), work.draft.path]
        learnt = learnt_from(self.config, pairs, [read_rows(place / FRESH, FreshRow) for place in places])
        facts = told(work)
        self.console.say(f"  {in_words(facts, len(learnt))}")
        last = self.directory.ledger["rounds"][-1:]
        if last and last[0]["fresh"]["judge"] != facts["judge"]:
            self.console.say(f"[yellow]note[/] fresh.judge {self.config.fresh.judge} is not what labelled the round before")
        if not learnt:
            raise UserError(
                f"fresh.carry is latest, and none of round {index}'s {facts['compared']} pairs got a label: nothing is there "
                f"that a reward model could learn from. What the judge said is in {self.directory.path / ANSWERS}. Begin another "
                "run (--name) with another fresh.judge, or with fresh.carry all"
            )
        return learnt


def told(work: Stages) -> Mapping[str, Any]:
    """What came of labelling in a round: counts of ``Labels``, "accuracy" and "judge"; nothing where nobody labels.

    Args:
        work: stages of the round.
    """
    done = work.draft.done(FRESH)
    return {} if done is None else done.facts


def told_accuracy(work: Stages) -> float | None:
    """The accuracy of r_(k-1) on a round's labels, where these are enough to say something.

    Args:
        work: stages of the round.
    """
    facts = told(work)
    accuracy: float | None = facts["accuracy"] if facts and facts["labelled"] >= FEWEST_TOLD else None
    return accuracy


def learnt_from(config: RunConfig, pairs: Sequence[Pair], rounds: Sequence[Sequence[FreshRow]]) -> tuple[Pair, ...]:
    """What the reward model of the last of some rounds learns from.

    Args:
        config: of the run.
        pairs: D.
        rounds: fresh pairs of each round so far.
    """
    fresh = [[Pair(row.id, row.prompt_ids, row.chosen_ids, row.rejected_ids, row.domain) for row in rows] for rows in rounds]
    return carried(pairs, fresh, config.fresh.carry, derive(config.seed, "fresh", "carried", len(rounds)))


def share_right(rows: Sequence[FreshRow], shifted: Sequence[Rollout], scores: Sequence[float]) -> float | None:
    """How many of the fresh pairs a reward model ranks as they are labelled; equal scores count half.

    Args:
        rows: the pairs; at least one.
        shifted: S_k, which they were chosen from.
        scores: of each of these.
    """
    by_sample = {(rollout.prompt.id, rollout.sample): score for rollout, score in zip(shifted, scores, strict=True)}
    pairs = [(by_sample[row.prompt_id, row.chosen_sample], by_sample[row.prompt_id, row.rejected_sample]) for row in rows]
    return ranked_right(pairs, [(1.0, 0.0)] * len(pairs))


def in_words(facts: Mapping[str, Any], learnt: int) -> str:
    """What came of labelling, for the console.

    Args:
        facts: counts of ``Labels``, and "accuracy": what ``share_right`` says of the reward model before; None in round 0.
        learnt: pairs that the round's reward model learns from.
    """
    counted = {"undecided": "undecided", "not_asked": "not asked about"}
    without = ", ".join(f"{facts[name]:,} {words}" for name, words in counted.items() if facts[name])
    before = "" if facts["accuracy"] is None else f"; the last round's reward model ranks {facts['accuracy']:.0%} of them so"
    return (
        f"fresh labels: {facts['labelled']:,} of {facts['compared']:,} pairs{f' ({without})' if without else ''}{before}. "
        f"The reward model learns from {learnt:,} pairs"
    )
