"""The first stage of a strength run: its members trained as tasks, side by side; the second is in ``cluster.strength_scores``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.board import Board
from actors.members import MemberJob, MemberReport, train_member
from cluster.config import RunConfig
from cluster.console import Console
from cluster.seeds import derive
from cluster.strength_directory import StrengthDirectory
from cluster.tasks import Work, finish, setup_of, share_of_a_fit, task_options
from rm.member_settings import TRUNK, member_directories, member_settings
from tokens.durable import commit_directory, write_file
from tokens.pair_store import PairStore

REPORT = "member.json"


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
            task = train_member.options(name=job.name, **task_options(config, share, setup))
            refs.append(task.remote(setup, job, held, folds if job.fold is not None else None, commit_member, board))

        def say(report: MemberReport) -> None:
            console.say(
                f"  {report.name}: {report.num_pairs:,} pairs in {report.seconds:.1f} s, loss {report.loss:.3f}, "
                f"accuracy {report.accuracy:.3f}, peak {report.peak_bytes / 2**30:.2f} GiB"
            )

        title = f"train {len(missing)} of {len(jobs)} fits"
        work = Work("strength", "train", title, "pairs", tuple(refs), tuple(seen), board, share, on_answer=say)
        finish(config, console, directory.logs, work)
    return [MemberReport(**json.loads((job.directory / REPORT).read_text())) for job in jobs]
