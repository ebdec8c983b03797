"""Stages of customisation as Ray tasks: general fine-tuning of one reward model, then domains side by side."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from actors.board import Teller
from actors.process import ProcessSetup
from actors.ranks import Rank, own_rank
from rm.config import LoraConfig, RewardConfig
from rm.domain_config import GeneralStageConfig
from tokens.durable import draft_directory
from tokens.errors import UserError
from tokens.guards import BadNumber, GuardsConfig
from tokens.queries import Query

if TYPE_CHECKING:
    from rm.domain_fit import StageStep
    from rm.imitation import LanguageHead
    from rm.model import RewardModel
    from rm.penalties import QuadraticPenalty

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often the process of one stage may die before the command gives up; each time it goes on from its last checkpoint."""
MODEL, ADAPTER, REPORT = "model", "adapter", "stage.json"


@dataclass(frozen=True)
class StageJob:
    """One stage of one model.

    Args:
        name: for logs, messages and progress.
        base: directory to start from, with its tokenizer: the base model, or what the general stage left behind.
        origin: that of a general stage's model within the customisation; "" = the base model.
        directory: where the result belongs; it appears whole or not at all.
        stage: how to fit.
        reward: AdamW's settings, pooling, microbatches.
        lora: adapters of the stage; rank 0 trains all weights.
        seed: of a fresh head, of adapters, and of the order of the queries.
        every: queries between two measurements.
        num_general: queries from the front of the general pool that are trained on.
        domain: whose queries are trained on; None = none.
        imitation: weight of the imitation loss.
        imitated: tokens that it predicts.
        keep_head: whether the language head is stored with the model, for an imitation loss of the next stage; a base whose head
            no imitation loss can use has none to store.
        penalty: what holds the weights near to where they start.
        penalty_coef: its lambda.
        num_fisher: general queries that ewc estimates the Fisher information on.
        guards: how many steps whose numbers went wrong may be left out.
    """

    name: str
    base: Path
    origin: str
    directory: Path
    stage: GeneralStageConfig
    reward: RewardConfig
    lora: LoraConfig
    seed: int
    every: int
    num_general: int
    domain: str | None
    imitation: float
    imitated: Literal["sequence", "response"]
    keep_head: bool
    penalty: Literal["none", "l2", "ewc"]
    penalty_coef: float
    num_fisher: int
    guards: GuardsConfig

    def settings(self) -> dict[str, Any]:
        """All that decides what the stage learns and how it is measured, fit for JSON: the data and the base model are the same
        throughout a customisation."""
        left_out = ("name", "base", "directory", "keep_head", "guards")
        found = {key: value for key, value in vars(self).items() if key not in left_out}
        sections = {"stage": self.stage, "reward": self.reward.model_copy(update={"base": None}), "lora": self.lora}
        return found | {name: section.model_dump(mode="json") for name, section in sections.items()}


@dataclass(frozen=True)
class StageLook:
    """One measurement of one set.

    Args:
        samples: queries seen.
        set: that was measured on.
        accuracy: share of its comparisons ranked as scored.
        loss: nats per comparison.
    """

    samples: int
    set: str
    accuracy: float
    loss: float


@dataclass(frozen=True)
class StageReport:
    """What a stage came to.

    Args:
        name: of the job.
        origin: the general stage's model that it started from, within the customisation, to which an adapter belongs; "" = the
            base model.
        settings: of the job; see there.
        num_queries: trained on.
        looks: every measurement, in order.
        seconds: of its last process, from loading the model to the last step.
        cpu_seconds: that its threads computed meanwhile.
        resumed_at: queries of the checkpoint that its last process went on from; 0 = from the beginning.
    """

    name: str
    origin: str
    settings: dict[str, Any]
    num_queries: int
    looks: tuple[StageLook, ...]
    seconds: float
    cpu_seconds: float
    resumed_at: int

    @classmethod
    def read(cls, directory: Path) -> StageReport:
        """As a stage left it."""
        found = json.loads((directory / REPORT).read_text())
        return cls(**{**found, "looks": tuple(_looks(found["looks"]))})


def _looks(rows: Sequence[Mapping[str, Any]]) -> list[StageLook]:
    return [StageLook(**row) for row in rows]


@ray.remote(max_retries=MAX_DEATHS)
def fit_job(
    setup: ProcessSetup,
    job: StageJob,
    pool: Sequence[Query],
    domains: Mapping[str, Sequence[Query]],
    tests: Mapping[str, Sequence[Query]],
    commit: Callable[[Path, Path], None],
    board: Any,
) -> StageReport:
    """Fit one stage and store it; see ``run_stage``.

    Args:
        setup: of the process; equal for all stages.
        job: what to fit.
        pool: general training queries.
        domains: training queries by domain.
        tests: held-out queries by set.
        commit: gives a written directory its place: (partial, final).
        board: told how far the stage is.
    """
    tell = Teller(board, job.name)
    try:
        report = run_stage(own_rank(setup), job, pool, domains, tests, commit, tell, board.beat.remote)
    except BadNumber as bad:
        raise BadNumber(bad.what, bad.value, bad.limit, f"{bad.where}: {job.name}", note=bad.note) from bad
    tell.end()
    return report


def run_stage(
    rank: Rank,
    job: StageJob,
    pool: Sequence[Query],
    domains: Mapping[str, Sequence[Query]],
    tests: Mapping[str, Sequence[Query]],
    commit: Callable[[Path, Path], None],
    tell: Callable[[int, bool], None],
    beat: Callable[[], None],
) -> StageReport:
    """Fit one stage in this process, going on from its last checkpoint where there is one.

    Args:
        rank: this process.
        job: what to fit.
        pool: general training queries.
        domains: training queries by domain.
        tests: held-out queries by set.
        commit: gives a written directory its place: (partial, final).
        tell: how many queries have been seen, and whether those are all.
        beat: called as work goes on that is not counted in queries.

    Returns:
        The report, which lies beside the model too.
    """
    import torch
    from transformers import AutoTokenizer

    from rm.domain_fit import Imitation, Saving, fit_stage
    from rm.lora import add_lora, save_adapter
    from rm.model import RewardModel
    from rm.ranked import measure_sets

    began, cpu_began = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    pad_id = tokenizer.pad_token_id
    model = RewardModel.from_any(job.base, pooling=job.reward.pooling, seed=job.seed, dtype=torch.float32, pad_id=pad_id)
    head = _head(job, model)
    if job.lora.rank:
        add_lora(model, job.lora, seed=job.seed)
        if head is not None:
            head.requires_grad_(False)
    rank.place(model)
    imitation = None
    if head is not None and job.imitation:
        imitation = Imitation(head.to(rank.setup.device), job.imitation, job.imitated)
    queries = [*pool[: job.num_general], *(() if job.domain is None else domains[job.domain])]
    looks: list[StageLook] = []
    checkpoints = job.directory.with_name(f".{job.directory.name}.checkpoints")
    settings = job.settings()
    fit = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    saving = Saving(checkpoints, fit, lambda: [asdict(look) for look in looks], lambda kept: looks.extend(_looks(kept)))
    total = job.stage.epochs * len(queries)

    def look(samples: int) -> None:
        found = measure_sets(model, tests, job.reward.microbatch_size, pad_id)
        looks.extend(StageLook(samples, name, numbers.accuracy, numbers.loss) for name, numbers in found.items())
        beat()

    def on_step(step: StageStep) -> None:
        tell(step.samples, step.samples == total)
        log.info("%s: %d of %d queries, loss %.4f, accuracy %.3f", job.name, step.samples, total, step.loss, step.accuracy)

    with rank.compute():
        penalty = _penalty(job, model, pool, pad_id, beat)
        with_what = (imitation, penalty, saving, job.guards)
        resumed = fit_stage(model, queries, job.stage, job.reward, job.seed, pad_id, job.every, look, on_step, *with_what)
    partial = draft_directory(job.directory)
    if job.lora.rank:
        save_adapter(model, partial / ADAPTER)
    else:
        model.save_pretrained(partial / MODEL)
        tokenizer.save_pretrained(partial / MODEL)
        if head is not None and job.keep_head:
            head.save(partial / MODEL)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    report = StageReport(job.name, job.origin, settings, len(queries), tuple(looks), seconds, cpu_seconds, resumed)
    (partial / REPORT).write_text(json.dumps(asdict(report), indent=1))
    commit(partial, job.directory)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def _head(job: StageJob, model: RewardModel) -> LanguageHead | None:
    """The language head that the stage imitates with, or hands on."""
    from rm.imitation import LanguageHead

    if job.imitation:
        return LanguageHead.load(job.base, model)
    if not job.keep_head:
        return None
    try:
        return LanguageHead.load(job.base, model)
    except UserError as error:  # nothing here imitates; a strategy that does is told so
        log.warning("%s: no language head is stored with the model: %s", job.name, error)
        return None


def _penalty(
    job: StageJob, model: RewardModel, pool: Sequence[Query], pad_id: int, beat: Callable[[], None]
) -> QuadraticPenalty | None:
    from rm.penalties import QuadraticPenalty, fisher_diagonal

    if job.penalty == "none":
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    stiffness = None
    if job.penalty == "ewc":
        stiffness = fisher_diagonal(model, pool[: job.num_fisher], parameters, pad_id, job.reward.microbatch_size, beat)
    return QuadraticPenalty.at(parameters, stiffness, job.penalty_coef)
