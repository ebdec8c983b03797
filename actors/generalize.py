"""Bilevel meta-learning as Ray tasks: a reference policy for each domain, reward models for all, and their use on a target."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.board import Teller
from actors.process import ProcessSetup
from actors.ranks import Rank, own_rank
from policy.config import SFTConfig
from rm.bilevel_config import GeneralizeConfig
from rm.config import RewardConfig
from tokens.durable import draft_directory
from tokens.guards import BadNumber, GuardsConfig
from tokens.queries import Query, TokenIds

if TYPE_CHECKING:
    from rm.bilevel_fit import OuterStep, ReferredQuery

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often the process of one task may die before the command gives up; it then begins the task again."""
TEMPERATURE = 1.0
"""Of a target's samples: those of its reference policy itself, which the lower level starts from."""
MODEL, REPORT, PICKS, POLICY = "model", "report.json", "best_of_n.jsonl", "policy"
Sequences = Sequence[tuple[TokenIds, TokenIds]]


@dataclass(frozen=True)
class DomainPart:
    """What is known of one domain, as ids.

    Args:
        name: of it.
        texts: that its reference policy is fine-tuned on.
        train: labelled queries; none of a target.
        test: held-out ones; may be none of a target.
        prompts: of a target, that its policy is optimised on.
    """

    name: str
    texts: tuple[tuple[TokenIds, TokenIds], ...]
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    prompts: tuple[TokenIds, ...]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Args:
        kind: reference, reward or target.
        name: for logs, messages and progress.
        directory: where the result belongs; it appears whole or not at all.
        base: directory of the model that is started from, with its tokenizer.
        generalize: what is asked for.
        reward: AdamW's settings, pooling, microbatches.
        seed: of all that is drawn.
        beta: reward factor.
        max_tokens: longest response that is sampled.
        guards: how many steps whose numbers went wrong may be left out.
        of: directories of other tasks' results that it reads: the reference policies by domain, and the reward model.
    """

    kind: str
    name: str
    directory: Path
    base: Path
    generalize: GeneralizeConfig
    reward: RewardConfig
    seed: int
    beta: float
    max_tokens: int
    guards: GuardsConfig
    of: tuple[Path, ...] = ()

    def settings(self) -> dict[str, Any]:
        """All that decides the result, fit for JSON; the data and the base model are the same throughout."""
        shared = ("domains", "targets", "curves", "seeds", "beta")
        generalize = {k: v for k, v in self.generalize.model_dump(mode="json").items() if k not in shared}
        reward = self.reward.model_copy(update={"base": None}).model_dump(mode="json")
        numbers = {"seed": self.seed, "beta": self.beta, "max_tokens": self.max_tokens}
        return {"kind": self.kind, **numbers, "generalize": generalize, "reward": reward}


@ray.remote(max_retries=MAX_DEATHS)
def do_task(
    setup: ProcessSetup, task: Task, parts: Sequence[DomainPart], commit: Callable[[Path, Path], None], board: Any
) -> dict[str, Any]:
    """Do one piece of work and store it; see ``run_task``.

    Args:
        setup: of the process; equal for all tasks.
        task: what to do.
        parts: the domains that it is about.
        commit: gives a written directory its place: (partial, final).
        board: told how far it is.
    """
    tell = Teller(board, task.name)
    report = run_task(own_rank(setup), task, parts, commit, tell)
    tell.end()
    return report


def run_task(
    rank: Rank, task: Task, parts: Sequence[DomainPart], commit: Callable[[Path, Path], None], tell: Callable[[int], None]
) -> dict[str, Any]:
    """Do one piece of work in this process, unless its result is there: Ray may run again what had just been stored.

    Args:
        rank: this process.
        task: what to do.
        parts: the domains that it is about: one of a reference policy or a target, all labelled ones of a reward model.
        commit: gives a written directory its place: (partial, final).
        tell: how many steps are done.

    Returns:
        The report, which lies in the directory too.
    """
    if (stored := _stored(task)) is not None:
        return stored
    began, cpu_began = time.perf_counter(), time.process_time()
    partial = draft_directory(task.directory)
    try:
        with rank.compute():
            does = {"reference": _refer, "reward": _learn, "target": _use}[task.kind]
            found = does(rank, task, parts, partial, tell)
    except BadNumber as bad:
        raise BadNumber(bad.what, bad.value, bad.limit, f"{bad.where}: {task.name}", note=bad.note) from bad
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
    report = {"name": task.name, "settings": task.settings(), **spent, **found}
    (partial / REPORT).write_text(json.dumps(report))
    try:
        commit(partial, task.directory)
    except OSError:
        if (stored := _stored(task)) is None:
            raise
        shutil.rmtree(partial)  # another process of this task was first
        return stored
    log.info("%s: %.1f s", task.name, spent["seconds"])
    return report


def _stored(task: Task) -> dict[str, Any] | None:
    """The report of a result that is there, by these settings."""
    if not (task.directory / REPORT).is_file():
        return None
    report = _report(task.directory)
    return report if report["settings"] == json.loads(json.dumps(task.settings())) else None


def _refer(rank: Rank, task: Task, parts: Sequence[DomainPart], partial: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """Fine-tune a domain's reference policy, and ask it about all responses that are known; a target's also writes some."""
    import torch
    from transformers import AutoTokenizer

    from policy.library import load
    from policy.reference import draw_responses, sequence_logprobs
    from policy.sft import fit_language_model
    from rm.ranked import response_sequences

    (part,), given = parts, task.generalize
    tokenizer: Any = AutoTokenizer.from_pretrained(task.base)
    stage = SFTConfig(model=str(task.base), **given.reference.model_dump())
    examples = [(list(prompt), list(response)) for prompt, response in part.texts]
    fit = fit_language_model(examples, tokenizer, partial / MODEL, stage, task.seed, lambda done, total: tell(done))
    model: Any = load(partial / MODEL, torch.float32).eval().to(rank.setup.device)

    def ask(queries: Sequence[Query]) -> list[list[float]]:
        sequences, size = response_sequences(queries), task.reward.microbatch_size
        values = iter(sequence_logprobs(model, sequences, tokenizer.pad_token_id, size, given.length_normalised))
        return [[next(values) for _ in query.responses] for query in queries]

    drawn: list[Any] = []
    if part.prompts:
        drawn = draw_responses(model, part.prompts, given.samples_per_prompt, task.max_tokens, TEMPERATURE, task.seed)
    return {"fit": fit, "num_texts": len(examples), "train": ask(part.train), "test": ask(part.test), "samples": drawn}


def _learn(rank: Rank, task: Task, parts: Sequence[DomainPart], partial: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """Meta-train one reward model over all labelled domains."""
    import torch
    from transformers import AutoTokenizer

    from rm.bilevel_fit import OuterLoop, fit_general
    from rm.hypergradient import form_of
    from rm.model import RewardModel

    tokenizer: Any = AutoTokenizer.from_pretrained(task.base)
    pad_id, given = int(tokenizer.pad_token_id), task.generalize
    model = RewardModel.from_any(task.base, pooling=task.reward.pooling, seed=task.seed, dtype=torch.float32, pad_id=pad_id)
    rank.place(model)
    domains = {part.name: _referred(part.train, _report(path)["train"]) for part, path in zip(parts, task.of, strict=True)}
    loop = OuterLoop(given.steps, given.domains_per_step, given.queries_per_step, task.beta, form_of(given))
    steps: list[OuterStep] = []

    def on_step(step: OuterStep) -> None:
        steps.append(step)
        tell(step.step)
        log.info("%s: step %d of %d, upper loss %.4f", task.name, step.step, loop.steps, step.upper)

    fit_general(model, domains, loop, task.reward, task.seed, pad_id, on_step, task.guards)
    model.save_pretrained(partial / MODEL)
    tokenizer.save_pretrained(partial / MODEL)
    measured = {
        part.name: _accuracies(model, _referred(part.test, _report(path)["test"]), task.beta, pad_id, task.reward)
        for part, path in zip(parts, task.of, strict=True)
    }
    return {"steps": [asdict(step) for step in steps], "accuracy": measured}


def _use(rank: Rank, task: Task, parts: Sequence[DomainPart], partial: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """Optimise a target's policy by a reward model: its best responses, and where asked for a policy fine-tuned on the tilt."""
    import torch
    from transformers import AutoTokenizer

    from evaluation.best_of_n import pick_best, pick_softly
    from policy.sft import fit_language_model
    from rm.batches import score_sequences
    from rm.model import RewardModel

    (part,), (reference, learnt), given = parts, task.of, task.generalize
    tokenizer: Any = AutoTokenizer.from_pretrained(reference / MODEL)
    model = RewardModel.from_pretrained(learnt / MODEL, torch.float32)
    rank.place(model)
    known, pad_id = _report(reference), int(tokenizer.pad_token_id)
    flat = [(prompt, tuple(ids)) for prompt, own in zip(part.prompts, known["samples"], strict=True) for ids in own]
    scores = score_sequences(model, flat, task.reward.microbatch_size, pad_id).tolist()
    number = given.samples_per_prompt
    best = pick_best(scores, number)
    with (partial / PICKS).open("w", encoding="utf-8") as file:
        for row in best:
            prompt, response = (tokenizer.decode(list(ids), skip_special_tokens=True) for ids in flat[row])
            file.write(json.dumps({"prompt": prompt, "completion": response, "reward": scores[row]}, ensure_ascii=False) + "\n")
    tuned: dict[str, float] | None = None
    if given.policy == "weighted_sft":
        # weights softmax(beta r) over samples of pi_ref: as n grows, samples of pi_ref exp(beta r) / Z
        chosen = [flat[row] for row in pick_softly(scores, number, 1 / task.beta, task.seed)]
        stage = SFTConfig(model=str(reference / MODEL), **given.reference.model_dump())
        examples = [(list(prompt), list(response)) for prompt, response in chosen]
        tuned = fit_language_model(examples, tokenizer, partial / POLICY, stage, task.seed, lambda done, total: tell(done))
    measured = None
    if part.test:
        measured = _accuracies(model, _referred(part.test, known["test"]), task.beta, pad_id, task.reward)
    gain = sum(scores[row] for row in best) / len(best) - sum(scores) / len(scores)
    return {"accuracy": measured, "reward_gain": gain, "num_prompts": len(best), "policy_fit": tuned}


def _report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / REPORT).read_text())
    return found


def _referred(queries: Sequence[Query], values: Sequence[Sequence[float]]) -> tuple[ReferredQuery, ...]:
    from rm.bilevel_fit import ReferredQuery

    return tuple(ReferredQuery(query, tuple(own)) for query, own in zip(queries, values, strict=True))


def _accuracies(model: Any, queries: Sequence[ReferredQuery], beta: float, pad_id: int, reward: RewardConfig) -> dict[str, float]:
    """Of the reward alone, of the reference policy alone, and of the policy that is optimised from the one by the other."""
    import torch

    from rm.batches import score_sequences
    from rm.ranked import response_sequences
    from rm.ranking import comparisons, ranking_accuracy

    plain = [each.query for each in queries]
    scores = score_sequences(model, response_sequences(plain), reward.microbatch_size, pad_id)
    reference = torch.tensor([value for each in queries for value in each.reference])
    compared = comparisons(plain)
    kinds = {"reward": scores, "reference": reference, "policy": reference + beta * scores}
    return {name: float(ranking_accuracy(values, compared)) for name, values in kinds.items()}
