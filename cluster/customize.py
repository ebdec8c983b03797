"""`customize`: reward models for domains in three stages, by several strategies side by side.

    base model  --general stage-->  general model  --domain stage-->  a model or an adapter for each domain

General stages come first, one for each way to make them and seed; then all domains of all strategies, as tasks that run side by
side as far as there is room. What is finished is not made again; what was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray

from actors.board import Board
from actors.customize import MODEL, REPORT, StageJob, StageReport, fit_job
from cluster.config import RunConfig
from cluster.console import Console
from cluster.differences import flat, refuse_differences
from cluster.domain_checks import check_settings
from cluster.domain_data import DomainData, QueryData, length_baselines, load_data, num_general
from cluster.domain_directory import CARD, KIND, RESULTS, DomainDirectory, digest, general_key
from cluster.run import connected
from cluster.run_directory import now, space_errors
from cluster.seeds import derive
from cluster.storage import storage_root
from cluster.tasks import Work, finish, setup_of, share_of_a_fit, suited, task_options
from evaluation.domains import DOMAIN_STAGE, GENERAL_STAGE, DomainRow
from evaluation.json_node import lines_of
from rm.config import LoraConfig
from rm.domain_config import StrategyConfig
from tokens.durable import commit_directory, write_file

LOOKS = 10
"""Measurements of a stage where customize.measure_every is null."""


def customize(config: RunConfig, console: Console) -> Path:
    """Fit and measure every stage that the config describes; the same command again continues.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        STORAGE/domains/NAME.

    Raises:
        UserError: if an input is wrong or there is no room; before any process starts where that can be known.
        RoleFailed: if a stage failed; the finished ones are there, the same command continues.
    """
    check_settings(config)
    root = storage_root(config)
    directory = DomainDirectory(config)
    console.say(f"[bold]Rondo[/] domains {', '.join(config.customize.domains)} in {directory.path}")
    data = load_data(config, root, console, directory.settled())
    with space_errors(directory.path), directory.open():
        directory.refuse_other_inputs(data.fingerprint(), data.base, data.sets)
        stages = Stages(config, directory, data)
        general, domains = stages.general(), stages.domains()
        missing = [job for job in (*general, *domains) if not is_done(job)]
        directory.keep_config()
        if missing:
            with connected(config, console) as fixed:
                config = suited(config, console, directory.logs, fixed)
                for title, jobs in (("general models", general), ("domains", domains)):
                    _fit(config, console, directory, data, title, [job for job in jobs if job in missing])
        else:
            console.say("All of it is there; nothing to do.")
        _write(directory, data, stages, console)
    return directory.path


def is_done(job: StageJob) -> bool:
    """Whether a stage was fitted.

    Args:
        job: of it.

    Raises:
        UserError: if it was, by other settings: a strategy that was taken out of the config and put back otherwise.
    """
    if not job.directory.is_dir():
        return False
    there = StageReport.read(job.directory).settings
    hint = "Another strategy needs another name: this one was fitted before"
    refuse_differences(job.directory, flat(there), flat(json.loads(json.dumps(job.settings()))), hint)
    return True


class Stages:
    """Every stage of a customisation.

    Args:
        config: of the command.
        directory: of it.
        data: read.
    """

    def __init__(self, config: RunConfig, directory: DomainDirectory, data: DomainData) -> None:
        self.config, self.directory, self.data = config, directory, data
        self.strategies = config.customize.strategies

    def general(self) -> list[StageJob]:
        """The general stages, each once however many strategies go on from it."""
        jobs: dict[Path, StageJob] = {}
        for seed in range(self.config.customize.seeds):
            for strategy in self.strategies.values():
                if strategy.general and self.directory.general(strategy, seed) not in jobs:
                    job = self._general_job(strategy, seed)
                    jobs[job.directory] = job
        return list(jobs.values())

    def domains(self) -> list[StageJob]:
        """The domain stages of all strategies."""
        return [
            self._domain_job(name, strategy, seed, domain)
            for seed in range(self.config.customize.seeds)
            for name, strategy in self.strategies.items()
            for domain in self.config.customize.domains
        ]

    def rows(self) -> list[DomainRow]:
        """Every measurement of every stage, from the reports beside the models."""
        rows = []
        for seed in range(self.config.customize.seeds):
            for name, strategy in self.strategies.items():
                if strategy.general:
                    report = StageReport.read(self.directory.general(strategy, seed))
                    rows += _rows(report, name, GENERAL_STAGE, "", seed)
                for domain in self.config.customize.domains:
                    report = StageReport.read(self.directory.domain(name, seed, domain))
                    rows += _rows(report, name, DOMAIN_STAGE, domain, seed)
        return rows

    def _general_job(self, strategy: StrategyConfig, seed: int) -> StageJob:
        customize = self.config.customize
        number = num_general(self.config, self.data, strategy)
        return StageJob(
            name=f"general, {general_key(strategy)}, seed {seed}",
            base=self.data.base,
            origin="",
            directory=self.directory.general(strategy, seed),
            stage=customize.general_stage,
            reward=self.config.reward,
            lora=LoraConfig(),
            seed=derive(self.config.seed, "customize", seed),
            every=self._every(number * customize.general_stage.epochs),
            num_general=number,
            domain=None,
            imitation=strategy.general_imitation,
            imitated=customize.imitated,
            keep_head=self.data.predicts,  # a strategy that imitates may be added later
            penalty="none",
            penalty_coef=0.0,
            num_fisher=customize.fisher_queries,
            guards=self.config.guards,
        )

    def _domain_job(self, name: str, strategy: StrategyConfig, seed: int, domain: str) -> StageJob:
        customize, own = self.config.customize, len(self.data.domain(domain).train)
        rehearsed = round(strategy.rehearsal * own)
        general = self.directory.general(strategy, seed) / MODEL
        return StageJob(
            name=f"{domain}, {name}, seed {seed}",
            base=general if strategy.general else self.data.base,
            origin=str(general.relative_to(self.directory.path)) if strategy.general else "",
            directory=self.directory.domain(name, seed, domain),
            stage=customize.domain_stage,
            reward=self.config.reward,
            lora=customize.lora,
            seed=derive(self.config.seed, "customize", seed),
            every=self._every((own + rehearsed) * customize.domain_stage.epochs),
            num_general=rehearsed,
            domain=domain,
            imitation=strategy.domain_imitation,
            imitated=customize.imitated,
            keep_head=False,
            penalty=strategy.penalty,
            penalty_coef=0.0 if strategy.penalty == "none" else strategy.penalty_coef,
            num_fisher=customize.fisher_queries,
            guards=self.config.guards,
        )

    def _every(self, total: int) -> int:
        return self.config.customize.measure_every or max(1, math.ceil(total / LOOKS))


def _fit(
    config: RunConfig, console: Console, directory: DomainDirectory, data: DomainData, title: str, jobs: Sequence[StageJob]
) -> None:
    """Hand stages to Ray, and wait for all of them."""
    if not jobs:
        return
    share = share_of_a_fit(config.resources.reward)
    setup = setup_of(share, "customize", directory.logs)
    sizes = {job.name: job.stage.epochs * (job.num_general + _own_queries(data, job.domain)) for job in jobs}
    board = cast(Any, Board).remote(sizes, "queries")
    pool, tests = ray.put(data.pool), ray.put(data.tests)
    trained = ray.put({each.name: each.train for each in data.domains})
    task = fit_job.options(**task_options(config, share, setup))
    refs = tuple(task.remote(setup, job, pool, trained, tests, commit_directory, board) for job in jobs)

    def say(report: StageReport) -> None:
        last = max(look.samples for look in report.looks)
        found = ", ".join(f"{look.set} {look.accuracy:.3f}" for look in report.looks if look.samples == last)
        again = f", gone on from {report.resumed_at:,}" if report.resumed_at else ""
        console.say(f"  {report.name}: {report.num_queries:,} queries in {report.seconds:.1f} s{again}; {found}")

    what = f"fit {len(jobs)} {title}"
    work = Work("customize", "customize", what, "queries", refs, tuple(sizes), board, share, on_answer=say, log=setup.name)
    finish(config, console, directory.logs, work)


def _own_queries(data: DomainData, domain: str | None) -> int:
    return 0 if domain is None else len(data.domain(domain).train)


def _rows(report: StageReport, strategy: str, stage: str, domain: str, seed: int) -> list[DomainRow]:
    return [DomainRow(strategy, stage, domain, seed, look.samples, look.set, look.accuracy, look.loss) for look in report.looks]


def _write(directory: DomainDirectory, data: DomainData, stages: Stages, console: Console) -> None:
    """Write the results and, last, the card."""
    rows, config = stages.rows(), stages.config
    alone = length_baselines(data)
    directory.hold.check()
    write_file(directory.path / RESULTS, lines_of(rows))
    reports = {job.name: json.loads((job.directory / REPORT).read_text()) for job in (*stages.general(), *stages.domains())}
    card = {
        "kind": KIND,
        "name": config.name,
        "finished_at": now(),
        "results_sha256": digest([vars(row) for row in rows]),
        "base": str(data.base),
        "from_reward_model": data.from_reward_model,
        "general": {each.name: alone[each.name] for each in data.general},
        "domains": {each.name: alone[each.name] for each in data.domains},
        "strategies": {
            name: in_words(strategy, data.from_reward_model) for name, strategy in config.customize.strategies.items()
        },
        "queries": {each.name: _counts(each) for each in data.sets},
        "seconds": {name: round(report["seconds"], 3) for name, report in reports.items()},
        "cpu_seconds": {name: round(report["cpu_seconds"], 3) for name, report in reports.items()},
    }
    directory.hold.check()
    write_file(directory.path / CARD, json.dumps(card, indent=1))
    console.say(f"Results: {directory.path / RESULTS}")


def _counts(data: QueryData) -> dict[str, int]:
    """How many queries there are of a set, and are not used."""
    return {
        "train": len(data.train),
        "held_out": data.held_out,
        "measured": len(data.test),
        "left_out": data.left_out,
        "held_out_elsewhere": data.held_out_elsewhere,
        "trained_before": data.trained_before,
    }


def in_words(strategy: StrategyConfig, from_reward_model: bool = False) -> str:
    """What a strategy does, for a table.

    Args:
        strategy: of the config.
        from_reward_model: whether the base is a general reward model already.
    """
    direct = "from the given reward model" if from_reward_model else "no general stage"
    parts = [f"general x {strategy.enrichment:g}" if strategy.general else direct]
    for stage, coef in (("general", strategy.general_imitation), ("domain", strategy.domain_imitation)):
        if coef:
            parts.append(f"imitation {coef:g} ({stage})")
    if strategy.rehearsal:
        parts.append(f"rehearsal {strategy.rehearsal:g}")
    if strategy.penalty != "none":
        parts.append(f"{strategy.penalty} {strategy.penalty_coef:g}")
    return ", ".join(parts)
