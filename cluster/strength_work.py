"""The first stage of a strength run: its members trained as tasks, side by side; the second is in ``cluster.strength_scores``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.config import Share
from actors.members import Board, MemberJob, MemberReport, train_member
from actors.process import ProcessSetup, environment
from cluster.config import RunConfig
from cluster.console import Console
from cluster.growth import room_for_tasks
from cluster.seeds import derive
from cluster.strength_directory import StrengthDirectory
from cluster.waiting import Pending, Waiter
from rm.member_settings import TRUNK, member_directories, member_settings
from tokens.durable import commit_directory, write_file
from tokens.errors import UserError
from tokens.pair_store import PairStore

REPORT = "member.json"


def setup_of(share: Share, name: str, logs: Path) -> ProcessSetup:
    """What a process of a share is told.

    Args:
        share: of the machine.
        name: of the process.
        logs: directory of log files.
    """
    device = "cuda" if share.num_gpus else "cpu"
    return ProcessSetup(name, logs / f"{name}.log", share.threads, device, share.dtype, 0, 1, share.recompute_activations)


def share_of_a_fit(share: Share) -> Share:
    """The share of a fit that runs beside others: on CPUs, one for each of its threads, or what there is.

    ``num_cpus`` of a share is for roles that take turns. Fits are busy all the time: asking for less than they use, too many of
    them would start at once, and all would crawl. Asking for more than the largest machine has, or than anybody else leaves free,
    they would wait for ever.

    Args:
        share: of the config.
    """
    if share.num_gpus:
        return share
    largest = max((node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]), default=0.0)
    there = ray.available_resources()
    free = there["CPU"] if "CPU" in there else 0.0
    return share.model_copy(update={"num_cpus": max(share.num_cpus, min(float(share.threads), largest, free))})


def refuse_what_cannot_fit(config: RunConfig) -> None:
    """Stop where this machine can never hold what one stage asks for at once: a task would wait for ever.

    Raises:
        UserError: naming the share.
    """
    there = ray.cluster_resources()
    shares, workers = config.resources, config.strength.num_workers
    for name, share, count in (("reward", shares.reward, 1), ("scorer", shares.scorer, workers), ("learner", shares.learner, 1)):
        for key, asked in (("CPU", share.num_cpus * count), ("GPU", share.num_gpus * count)):
            held = there[key] if key in there else 0.0
            if asked > held + 1e-9:
                what = f"resources.{name}.num_{key.lower()}s" + (" times strength.num_workers" if count > 1 else "")
                raise UserError(
                    f"this machine has {held:g} {key}, {what} asks for {asked:g}: lower it, or connect to a larger cluster"
                )


def member_jobs(config: RunConfig, directory: StrengthDirectory, base: Path) -> list[MemberJob]:
    """Every fit of a strength run, fold by fold.

    Args:
        config: of the run.
        directory: of the run.
        base: model that the members start from.
    """
    strength = config.strength
    reward = member_settings(config.reward, strength)
    jobs = []
    for fold in range(strength.folds):
        left_out = fold if strength.folds > 1 else None
        own = [derive(config.seed, "strength", fold, member) for member in range(strength.num_members)]
        shared = derive(config.seed, "strength", fold, TRUNK)
        for index, place in enumerate(member_directories(strength.members, directory.members(fold), strength.num_members)):
            name = f"member-{place.name}" if left_out is None else f"fold-{fold}-member-{place.name}"
            seeds = (shared, *own) if strength.members == "heads" else (own[index],)
            jobs.append(MemberJob(name, strength.members, base, reward, left_out, seeds, place))
    return jobs


def commit_member(report: MemberReport, partial: Path, final: Path) -> None:
    """Write a member's report beside its files and give it its place; runs in the process that trained it."""
    write_file(partial / REPORT, json.dumps(asdict(report), indent=1))
    commit_directory(partial, final)


def train(
    config: RunConfig, console: Console, directory: StrengthDirectory, base: Path, pairs: PairStore, folds: np.ndarray
) -> list[MemberReport]:
    """Train the members that are not there yet, as many at once as the cluster has room for.

    Args:
        config: of the run.
        console: to show progress on.
        directory: of the run.
        base: model that the members start from.
        pairs: N training pairs; the processes of a machine share one copy of them.
        folds: [N] the fold of each.

    Returns:
        The reports of all members, those of earlier calls too.

    Raises:
        UserError: what a fit raised as such, or no room within ``resources.wait_limit_s``.
        RoleFailed: if a fit failed, or its process died too often.
    """
    jobs = member_jobs(config, directory, base)
    missing = [job for job in jobs if not job.directory.is_dir()]
    if len(missing) < len(jobs):
        console.say(f"  {len(jobs) - len(missing)} of {len(jobs)} fits are there already")
    if missing:
        share = share_of_a_fit(config.resources.reward)
        held = ray.put(pairs)
        seen = {job.name: int((folds != job.fold).sum()) if job.fold is not None else len(pairs) for job in missing}
        board_class: Any = Board
        board = board_class.remote({name: count * config.reward.epochs for name, count in seen.items()})
        refs = []
        for job in missing:
            setup = setup_of(share, job.name, directory.logs)
            task = train_member.options(
                name=job.name,
                num_cpus=share.num_cpus,
                num_gpus=share.num_gpus,
                label_selector=share.labels or None,
                runtime_env={"env_vars": environment(setup, config.data.allow_hub)},
            )
            refs.append(task.remote(setup, job, held, folds if job.fold is not None else None, commit_member, board))

        def say(report: MemberReport) -> None:
            console.say(
                f"  {report.name}: {report.num_pairs:,} pairs in {report.seconds:.1f} s, loss {report.loss:.3f}, "
                f"accuracy {report.accuracy:.3f}, peak {report.peak_bytes / 2**30:.2f} GiB"
            )

        wait = Waiter(console, directory.logs, config.resources.deadline_s)
        wait.begin(f"strength {config.name}")
        with console.bar(f"train {len(missing)} of {len(jobs)} fits", "pairs") as bar:
            room = room_for_tasks(console.say, "a fit", share, config.resources.wait_limit_s)
            wait("train", Pending(tuple(refs), tuple(seen), ("",) * len(refs), list, (board,), say, room), bar)
        ray.kill(board)
    return [MemberReport(**json.loads((job.directory / REPORT).read_text())) for job in jobs]
