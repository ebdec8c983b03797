"""Does a reward model that was meta-learnt over labelled domains do better on one that nobody labelled?

    python -m benchmarks.experiments.generalize sandbox [--seeds 5] [--KEY VALUE ...]
    python -m benchmarks.experiments.generalize reviews --folder DIRECTORY --cache DIRECTORY [--seeds 1] [--KEY VALUE ...]
    python -m benchmarks.experiments.generalize dsp --folder DIRECTORY --cache DIRECTORY [--seen] [--seeds 5] [--KEY VALUE ...]

Ten domains, two left out at a time (sandbox), or one (reviews; dsp has four); every one is left out once a seed.
configs/generalize.yaml has the sizes. All arms that train a reward model on several domains take the same batches in the same
order from the same head; they differ in the loss alone:

    pooled b    Bradley-Terry on the pairs of all labelled domains, of b times the reward
    bilevel b   the closed form (rm.hypergradient), with reward factor b
    metarm      pooled 1, each gradient taken where the left-out domain's own unlabelled samples are told apart
    both        bilevel 1 with that
    nearest     Bradley-Terry on the one labelled domain whose reference policy gives the left-out domain's texts most likelihood
    oracle      Bradley-Terry on the left-out domain's own pairs, which no other arm sees
    sft         no reward: log-probability per token of the left-out domain's reference policy
    dpo         DPO on the pooled pairs; its implicit reward

A pair counts as ranked by the reward alone ("reward"), and by the policy that it makes of the left-out domain's reference,
log pi_ref per token + b r ("policy"). Of n samples of that reference policy the best by the reward has a gold value ("gold"): in
the sandbox the one of the domain's user; on reviews, where the reference policy writes reviews of its kind, what a classifier of
other texts than any model saw thinks of it, log odds of positive; on dsp, where it answers queries, that classifier's log odds of
the domain. The reference policy fine-tuned on samples that are drawn with weights softmax(b r) has a gold value too ("tuned": of
what it writes anew, above that of the reference policy's samples).

On dsp the domains answer the same queries, each preferring its own answers to the others'. A left-out domain's answers are taken
out of the labelled domains' queries, where they would only ever lose; --seen leaves them there.

Prints the tables; appends a row for each seed, left-out domain and arm to
benchmarks/results/generalize_WHAT.jsonl (dsp_seen with --seen), and continues there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.experiments.common import RESULTS, ROOT, Results, single_thread
from benchmarks.experiments.generalize_dsp import dsp_setting
from benchmarks.experiments.generalize_report import ARMS, BETAS, tables
from benchmarks.experiments.generalize_settings import Example, Place, Setting, reviews_setting, sandbox_setting
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.seeds import derive
from evaluation.best_of_n import pick_best, pick_softly
from policy.config import DPOConfig, SFTConfig
from policy.dpo import fit_dpo
from policy.library import load
from policy.reference import draw_responses, sequence_logprobs
from policy.sft import fit_language_model
from rm.batches import score_sequences
from rm.bilevel_fit import OuterLoop, ReferredQuery, Shift, fit_general
from rm.domain_config import GeneralStageConfig
from rm.domain_fit import fit_stage
from rm.hypergradient import ClosedForm
from rm.model import RewardModel
from rm.ranked import response_sequences
from rm.ranking import comparisons, ranking_accuracy
from tokens.queries import Query
from tokens.records import Pair

RECIPE = ROOT / "configs" / "generalize.yaml"
OWN = GeneralStageConfig(lr=3e-3, batch_size=8, epochs=4, warmup_ratio=0.1)
DPO = DPOConfig(beta=0.1, lr=1e-3, batch_size=32)
ETA, META_PROMPTS = 0.5, 8
NEAREST_TEXTS = 50
DRAWS = 8
"""Samples of each prompt that are drawn by the tilt, to fine-tune the reference policy on."""


@dataclass(frozen=True)
class Referred:
    """A domain with what its reference policy says.

    Args:
        place: the domain.
        train: its queries to train on, with log-probabilities per token.
        test: the held-out ones.
        groups: samples to each of its prompts.
        kin: how likely each domain's texts are under this one's policy, nats per token.
        reference: the policy, a directory.
    """

    place: Place
    train: tuple[ReferredQuery, ...]
    test: tuple[ReferredQuery, ...]
    groups: tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], ...]
    kin: dict[str, float]
    reference: Path


def referred(setting: Setting, place: Place, config: RunConfig, seed: int, folder: Path) -> Referred:
    """Fine-tune a domain's reference policy into a folder."""
    given, pad_id = config.generalize, setting.tokenizer.pad_token_id
    model = tuned(setting, setting.base, place.texts, config, seed, folder / place.name)

    def with_reference(queries: Sequence[Query]) -> tuple[ReferredQuery, ...]:
        values = iter(sequence_logprobs(model, response_sequences(queries), pad_id, 128, given.length_normalised))
        return tuple(ReferredQuery(query, tuple(next(values) for _ in query.responses)) for query in queries)

    drawn = draw_responses(
        model, place.prompts, given.samples_per_prompt, config.rollout.max_new_tokens, 1.0, derive(seed, f"draw {place.name}")
    )
    kin = {other.name: fmean(sequence_logprobs(model, other.texts[:NEAREST_TEXTS], pad_id, 64, True)) for other in setting.places}
    groups = tuple(tuple((prompt, response) for response in own) for prompt, own in zip(place.prompts, drawn, strict=True))
    return Referred(place, with_reference(place.train), with_reference(place.test), groups, kin, folder / place.name)


def tuned(setting: Setting, start: Path, texts: Sequence[Example], config: RunConfig, seed: int, out: Path) -> Any:
    """A language model fine-tuned on texts by the recipe of reference policies, in evaluation mode."""
    stage = SFTConfig(model=str(start), **config.generalize.reference.model_dump())
    fit_language_model([(list(p), list(r)) for p, r in texts], setting.tokenizer, out, stage, seed)
    return load(out, torch.float32).eval()


class Fold:
    """Some domains left out, on one seed.

    Args:
        setting: all domains.
        config: the recipe.
        seed: of heads and orders.
        labelled: to learn from.
        targets: left out.
    """

    def __init__(
        self,
        setting: Setting,
        config: RunConfig,
        seed: int,
        labelled: Sequence[Referred],
        targets: Sequence[Referred],
    ) -> None:
        self.setting, self.config, self.seed, self.labelled, self.targets = setting, config, seed, labelled, targets
        self.pad_id = int(setting.tokenizer.pad_token_id)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each left-out domain and arm."""
        rows = []
        for arm, beta, offset, shifted in [
            *((f"pooled {beta:g}", beta, False, False) for beta in BETAS),
            *((f"bilevel {beta:g}", beta, True, False) for beta in BETAS),
            ("metarm", 1.0, False, True),
            ("both", 1.0, True, True),
        ]:
            began = time.process_time()
            model = self._learn(beta, offset, shifted)
            seconds = time.process_time() - began
            rows += [self._measure(arm, target, model, beta, seconds) for target in self.targets]
        for target in self.targets:
            kin = max(self.labelled, key=lambda each: each.kin[target.place.name])
            for arm, each in (("nearest", kin), ("oracle", target)):
                began = time.process_time()
                model = own_model(self.setting, self.config, self.seed, [q.query for q in each.train])
                rows.append(self._measure(arm, target, model, 1.0, time.process_time() - began))
            rows.append(self._row("sft", target, None, [value for each in target.test for value in each.reference], None, 0.0))
        return rows + self._dpo()

    def _learn(self, beta: float, offset: bool, shifted: bool) -> RewardModel:
        given = self.config.generalize
        domains = {
            each.place.name: each.train if offset else tuple(replace(q, reference=(0.0,) * len(q.reference)) for q in each.train)
            for each in self.labelled
        }
        loop = OuterLoop(given.steps, given.domains_per_step, given.queries_per_step, beta, ClosedForm())
        groups = [group for target in self.targets for group in target.groups]
        shift = Shift(groups, ETA, META_PROMPTS) if shifted else None
        model = fresh(self.setting, self.config, self.seed)
        order = derive(self.seed, "order")
        fit_general(model, domains, loop, self.config.reward, order, self.pad_id, lambda step: None, shift=shift)
        return model

    def _measure(self, arm: str, target: Referred, model: RewardModel, beta: float, seconds: float) -> dict[str, Any]:
        queries = [each.query for each in target.test]
        scores = score_sequences(model, response_sequences(queries), 256, self.pad_id).tolist()
        reference = [value for each in target.test for value in each.reference]
        policy = [beta * r + p for r, p in zip(scores, reference, strict=True)]
        return self._row(arm, target, scores, policy, model, seconds, beta)

    def _row(
        self,
        arm: str,
        target: Referred,
        scores: Sequence[float] | None,
        policy: Sequence[float] | None,
        model: RewardModel | None,
        seconds: float,
        beta: float = 1.0,
    ) -> dict[str, Any]:
        compared = comparisons([each.query for each in target.test])
        accuracy = {
            name: None if values is None else float(ranking_accuracy(torch.tensor(values), compared))
            for name, values in (("reward", scores), ("policy", policy))
        }
        gold, wrote = (None, None) if model is None else self._judged(target, model, beta)
        judged = {"gold": gold, "tuned": wrote}
        return {"seed": self.seed, "domain": target.place.name, "arm": arm, **accuracy, **judged, "cpu_seconds": seconds}

    def _judged(self, target: Referred, model: RewardModel, beta: float) -> tuple[float, float]:
        """Gold above that of a sample at random: of the best of n, and of what the reference policy writes after fine-tuning on
        samples drawn by the tilt."""
        flat, number = [sequence for group in target.groups for sequence in group], len(target.groups[0])
        scores = score_sequences(model, flat, 256, self.pad_id).tolist()
        values = [target.place.gold(*sequence) for sequence in flat]
        best = fmean(values[i] for i in pick_best(scores, number))
        return best - fmean(values), fmean(self._written(target, flat, scores, beta)) - fmean(values)

    def _written(self, target: Referred, flat: Sequence[Example], scores: Sequence[float], beta: float) -> list[float]:
        """Gold of what the fine-tuned reference policy writes."""
        number, length = len(target.groups[0]), self.config.rollout.max_new_tokens
        drawn = [i for draw in range(DRAWS) for i in pick_softly(scores, number, 1 / beta, derive(self.seed, f"draw {draw}"))]
        with tempfile.TemporaryDirectory() as folder:
            texts, seed = [flat[i] for i in drawn], derive(self.seed, "weighted")
            policy = tuned(self.setting, target.reference, texts, self.config, seed, Path(folder) / "policy")
        written = draw_responses(policy, target.place.prompts, number, length, 1.0, derive(self.seed, "written"))
        return [target.place.gold(p, r) for p, own in zip(target.place.prompts, written, strict=True) for r in own]

    def _dpo(self) -> list[dict[str, Any]]:
        began = time.process_time()
        pairs = [
            Pair(f"{q.id}-{i}-{j}", q.prompt_ids, q.responses[i], q.responses[j], q.domain)
            for each in self.labelled
            for q in (referred_query.query for referred_query in each.train)
            for i, j in q.comparisons
        ]
        with tempfile.TemporaryDirectory() as folder:
            fit_dpo(self.setting.base, pairs, self.setting.tokenizer, Path(folder), DPO, self.seed, bfloat16=False)
            tuned, start = load(folder, torch.float32).eval(), load(self.setting.base, torch.float32).eval()
        seconds, rows = time.process_time() - began, []
        for target in self.targets:
            sequences = response_sequences([each.query for each in target.test])
            ours, theirs = (sequence_logprobs(model, sequences, self.pad_id, 128) for model in (tuned, start))
            implicit = [a - b for a, b in zip(ours, theirs, strict=True)]
            rows.append(self._row("dpo", target, implicit, None, None, seconds))
        return rows


def fresh(setting: Setting, config: RunConfig, seed: int) -> RewardModel:
    """The base under the seed's head."""
    return RewardModel.from_language_model(
        setting.base,
        pooling=config.reward.pooling,
        seed=derive(seed, "head"),
        dtype=torch.float32,
        pad_id=setting.tokenizer.pad_token_id,
    )


def own_model(setting: Setting, config: RunConfig, seed: int, queries: Sequence[Query]) -> RewardModel:
    """A reward model of one domain's pairs alone."""
    model, pad_id = fresh(setting, config, seed), int(setting.tokenizer.pad_token_id)
    fit_stage(model, queries, OWN, config.reward, derive(seed, "order"), pad_id, 10**9, lambda done: None, lambda step: None)
    return model


def without(each: Referred, left_out: Collection[str], authors: Mapping[str, tuple[str, ...]]) -> Referred:
    """A labelled domain whose training queries hold no text of domains that are left out.

    Args:
        each: the domain.
        left_out: names.
        authors: as of ``Setting``.
    """

    def trimmed(referred: ReferredQuery) -> ReferredQuery:
        query = referred.query
        if query.id not in authors:
            return referred
        kept = [place for place, name in enumerate(authors[query.id]) if name not in left_out]
        trimmed_query = replace(
            query, responses=tuple(query.responses[place] for place in kept), scores=tuple(query.scores[place] for place in kept)
        )
        return ReferredQuery(trimmed_query, tuple(referred.reference[place] for place in kept))

    return replace(each, train=tuple(map(trimmed, each.train)))


def play(setting: Setting, config: RunConfig, seed: int, at_once: int, results: Results) -> None:
    """Leave every domain out once, ``at_once`` of them together; what is there is not done again.

    Args:
        setting: all domains.
        config: the recipe.
        seed: of this round.
        at_once: domains of a fold.
        results: that rows are appended to.
    """
    names = [place.name for place in setting.places]
    folds = [names[start : start + at_once] for start in range(0, len(names), at_once)]
    left = results.missing(folds, lambda fold: (seed, fold[-1], ARMS[-1]))  # the last row of a fold
    if not left:
        return
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        found = [referred(setting, place, config, derive(seed, "reference"), Path(folder)) for place in setting.places]
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU s for references", flush=True)
        for fold in left:
            began = time.process_time()
            labelled = [without(each, fold, setting.authors) for each in found if each.place.name not in fold]
            targets = [each for each in found if each.place.name in fold]
            for row in Fold(setting, config, seed, labelled, targets).rows():
                results.append(row)
            print(f"seed {seed}: {', '.join(fold)} left out, {time.process_time() - began:.0f} CPU s", flush=True)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> None:
    """Play what is missing, and print the tables.

    Args:
        arguments: None takes the process's own.
        results: folder of the JSON lines.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=("sandbox", "reviews", "dsp"))
    parser.add_argument("--seeds", type=int, default=None, help="default: 5 in the sandbox and on dsp, 1 on reviews")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="reviews: KIND.train.tsv and KIND.test.tsv; dsp: responses.jsonl")
    parser.add_argument("--cache", type=Path, help="reviews and dsp: where the pre-trained decoder is kept")
    parser.add_argument("--seen", action="store_true", help="dsp: a left-out domain's answers stay among those that lose")
    parser.add_argument("--pairs", type=int, default=100, help="reviews: training pairs of a kind")
    options, overrides = parser.parse_known_args(arguments)
    recipe = load_config(RECIPE, overrides)
    if options.what != "sandbox" and (options.folder is None or options.cache is None):
        parser.error(f"{options.what} needs --folder, and --cache for the pre-trained decoder")
    if options.seen and options.what != "dsp":
        parser.error(f"--seen is of dsp, whose domains answer the same queries; got {options.what}")
    single_thread()
    name = f"generalize_{options.what}{'_seen' if options.seen else ''}.jsonl"
    kept = Results(results / name, ("seed", "domain", "arm"))
    for seed in range(
        options.first_seed, options.first_seed + (options.seeds or {"sandbox": 5, "reviews": 1, "dsp": 5}[options.what])
    ):
        config = recipe.model_copy(update={"seed": seed, "world": recipe.world.model_copy(update={"seed": seed})})
        if options.what == "sandbox":
            play(sandbox_setting(config), config, seed, 2, kept)
            continue
        options.cache.mkdir(parents=True, exist_ok=True)
        prompts = config.generalize.num_prompts
        if options.what == "dsp":
            setting = dsp_setting(options.folder / "responses.jsonl", options.cache, prompts, seed, options.seen)
        else:
            setting = reviews_setting(options.folder, options.cache, options.pairs, prompts, seed)
        play(setting, config, seed, 1, kept)
    print(tables(kept.rows()))
    print(json.dumps({"rows": len(kept.rows()), "recipe": recipe.name}))


if __name__ == "__main__":
    main()
