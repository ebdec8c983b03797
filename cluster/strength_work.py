"""The two stages of a strength run that Ray does: members trained as tasks, pairs scored by a pool of processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.config import Share
from actors.members import Board, MemberJob, MemberReport, train_member
from actors.process import ProcessSetup, environment
from actors.strength_scorer import ScoringJob, StrengthScorer
from cluster.config import RunConfig
from cluster.console import Console
from cluster.run_directory import commit_directory, write_file
from cluster.seeds import derive
from cluster.strength_directory import StrengthDirectory
from cluster.strength_parts import NUMBER, Part
from cluster.waiting import Pending, RoleFailed, Waiter
from rm.members import TRUNK, member_directories, member_settings
from tokens.errors import UserError
from tokens.records import Pair

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

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
    config: RunConfig, console: Console, directory: StrengthDirectory, base: Path, pairs: Sequence[Pair], folds: np.ndarray
) -> list[MemberReport]:
    """Train the members that are not there yet, as many at once as the cluster has room for.

    Args:
        config: of the run.
        console: to show progress on.
        directory: of the run.
        base: model that the members start from.
        pairs: N training pairs.
        folds: [N] the fold of each.

    Returns:
        The reports of all members, those of earlier calls too.

    Raises:
        RoleFailed: if a fit failed, or its process died too often.
    """
    jobs = member_jobs(config, directory, base)
    missing = [job for job in jobs if not job.directory.is_dir()]
    if len(missing) < len(jobs):
        console.say(f"  {len(jobs) - len(missing)} of {len(jobs)} fits are there already")
    if missing:
        share = config.resources.reward
        held = ray.put(tuple(pairs))
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
            wait("train", Pending(tuple(refs), tuple(seen), ("?",) * len(refs), list, (board,), say), bar)
        ray.kill(board)
    return [MemberReport(**json.loads((job.directory / REPORT).read_text())) for job in jobs]


@dataclass(frozen=True)
class Scored:
    """What one call scored.

    Args:
        num_pairs: rows.
        num_distinct: pairs of different text among them.
        num_sequences: different prompts with responses; what the members computed.
        worker_seconds: that the processes were at it, together.
        cpu_seconds: that their threads computed meanwhile.
        seconds: from the start of the pool to the last part.
    """

    num_pairs: int
    num_distinct: int
    num_sequences: int
    worker_seconds: float
    cpu_seconds: float
    seconds: float


def score(
    config: RunConfig, console: Console, directory: StrengthDirectory, base: Path, parts: Sequence[Part], pairs: PreferenceSet
) -> Scored:
    """Score the parts that are not written yet and write each as it comes.

    Args:
        config: of the run.
        console: to show progress on.
        directory: of the run.
        base: model that the members started from, with their tokenizer.
        parts: all of them.
        pairs: the training pairs: their name and fingerprint go into every file, their format decides how prompts are encoded.

    Returns:
        What was done.

    Raises:
        UserError: if a member scores a pair with NaN or infinity; names both.
        RoleFailed: if a scoring process failed.
    """
    from pyarrow import parquet

    from preferences.strength import write_strengths, written_parts

    there = written_parts(directory.strengths)
    missing = {part.index: part for part in parts if part.index not in there}
    if len(missing) < len(parts):
        console.say(f"  {len(parts) - len(missing)} of {len(parts)} parts are there already")
    done = Scored(0, 0, 0, 0.0, 0.0, 0.0)
    if not missing:
        return done
    texts = parquet.ParquetFile(directory.texts)
    total, began = sum(len(part.rows) for part in missing.values()), time.perf_counter()
    with console.bar("score pairs", "pairs") as bar:
        for fold in sorted({part.fold for part in missing.values()}):
            own = [part.index for part in missing.values() if part.fold == fold]
            job = _scoring_job(config, directory, base, fold, pairs.templated, min(config.strength.num_workers, len(own)))
            for row in stream(config, job, own):
                part = missing[int(row["part"])]
                shape = (len(part.rows), config.strength.num_members)
                chosen, rejected = (np.asarray(row[side], np.float64).reshape(shape) for side in ("chosen", "rejected"))
                table = texts.read_row_group(part.index).drop_columns([NUMBER])
                identity = {"split": part.split, "source": pairs.source, "fingerprint": pairs.fingerprint}
                write_strengths(directory.strengths, part.index, table, chosen, rejected, **identity)
                done = Scored(
                    done.num_pairs + len(part.rows),
                    done.num_distinct + part.num_distinct,
                    done.num_sequences + int(row["num_sequences"]),
                    done.worker_seconds + float(row["seconds"]),
                    done.cpu_seconds + float(row["cpu_seconds"]),
                    time.perf_counter() - began,
                )
                bar.update(done.num_pairs, total, "pairs")
    return done


def _scoring_job(
    config: RunConfig, directory: StrengthDirectory, base: Path, fold: int, templated: bool, num_workers: int
) -> ScoringJob:
    strength = config.strength
    directory.attempts.mkdir(exist_ok=True)
    return ScoringJob(
        setup=setup_of(config.resources.scorer, "scorer", directory.logs),
        texts=directory.texts,
        number=NUMBER,
        templated=templated,
        kind=strength.members,
        base=base,
        members=directory.members(fold),
        num_members=strength.num_members,
        pooling=config.reward.pooling,
        batch_size=strength.batch_size,
        attempts=directory.attempts,
        num_workers=num_workers,
    )


def stream(config: RunConfig, job: ScoringJob, parts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Scores of parts, as they come: Ray Data hands the parts' numbers to a pool of processes that hold the members.

    A process that dies is started again and its part scored again, until ``actors.strength_scorer.attempt`` has had enough.

    Args:
        config: of the run.
        job: of the processes.
        parts: numbers.

    Returns:
        One row a part, as ``StrengthScorer`` makes it, in any order.

    Raises:
        RoleFailed: if a process raised, or kept dying.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.enable_progress_bars = False
    share = config.resources.scorer
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        StrengthScorer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(size=job.num_workers),
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
        runtime_env={"env_vars": environment(job.setup, config.data.allow_hub)},
    )
    try:
        with errors_to(job.setup.log_path.with_name("ray-data.log")):
            yield from rows.iter_rows()
    except RayError as error:
        raise RoleFailed(f"scoring failed: {type(error).__name__}: {error}. Logs: {job.setup.log_path.parent}") from error


@contextlib.contextmanager
def errors_to(log: Path) -> Iterator[None]:
    """Let a file have what Ray's C++ and Ray Data write to standard error meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
