"""The second stage of a strength run: all pairs scored by a pool of processes, part after part."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.process import environment
from actors.strength_scorer import ScoringJob, StrengthScorer
from cluster.config import RunConfig
from cluster.console import Console
from cluster.failures import RoleFailed
from cluster.growth import room_for_tasks
from cluster.signals import obey_termination
from cluster.strength_directory import StrengthDirectory
from cluster.strength_parts import NUMBER, Part
from cluster.tasks import setup_of
from cluster.waiting import POLL_S
from tokens.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

    from preferences.sets import PreferenceSet

SCORER_LOGS = "scorer-*.log"
LEAVE_S = 30.0
"""Seconds that the thread which asks Ray Data gets to end."""


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
        UserError: if a member scores a pair with NaN or infinity (names both) or tells none of a fold apart; or as ``stream``.
        RoleFailed: if a scoring process failed.
        SystemExit: if SIGTERM has come.
    """
    from pyarrow import parquet

    from preferences.strength import write_strengths, written_parts

    there = written_parts(directory.strengths)
    missing = {part.index: part for part in parts if part.index not in there}
    if len(missing) < len(parts):
        console.say(f"  {len(parts) - len(missing)} of {len(parts)} parts are there already")
    done = Scored(0, 0, 0, 0.0, 0.0, 0.0)
    texts = parquet.ParquetFile(directory.texts)
    total, began = sum(len(part.rows) for part in missing.values()), time.perf_counter()
    with console.bar("score pairs", "pairs") as bar:
        for fold in range(config.strength.folds):
            of_fold = [part.index for part in parts if part.fold == fold]
            own = [index for index in of_fold if index in missing]
            job = _scoring_job(config, directory, base, fold, pairs.templated, min(config.strength.num_workers, len(own)))
            with contextlib.closing(stream(config, console, job, own)) as rows:
                for row in rows:
                    part = missing[int(row["part"])]
                    shape = (len(part.rows), config.strength.num_members)
                    chosen, rejected = (np.asarray(row[side], np.float64).reshape(shape) for side in ("chosen", "rejected"))
                    table = texts.read_row_group(part.index).drop_columns([NUMBER])
                    identity = {"split": part.split, "source": pairs.source, "fingerprint": pairs.fingerprint}
                    directory.hold.check()
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
            if config.strength.folds > 1:
                refuse_constant_fold(directory.strengths, of_fold, fold)
    return done


def refuse_constant_fold(strengths: Path, parts: Sequence[int], fold: int) -> None:
    """Stop where the members of one fold tell no pair from another: beside other folds' scores theirs would look alive.

    Args:
        strengths: directory of part files.
        parts: numbers of all parts that the fold's members scored, of which there may be none.
        fold: its number.

    Raises:
        UserError: naming fold and member.
    """
    from preferences.strength import read_strengths, refuse_constant

    found = [read_strengths(strengths / f"part-{part:05d}.parquet") for part in parts]
    if sum(map(len, found)) < 2:
        return
    whole = replace(
        found[0],
        ids=tuple(id_ for part in found for id_ in part.ids),
        chosen=np.concatenate([part.chosen for part in found]),
        rejected=np.concatenate([part.rejected for part in found]),
        splits=tuple(split for part in found for split in part.splits),
        texts=tuple(text for part in found for text in part.texts),
        source=f"{strengths}, fold {fold}",
    )
    refuse_constant(whole)


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


def stream(config: RunConfig, console: Console, job: ScoringJob, parts: Sequence[int]) -> Generator[dict[str, Any], None, None]:
    """Scores of parts, as they come: Ray Data hands the parts' numbers to a pool of processes that hold the members.

    A process that dies is started again and its part scored again, until ``actors.strength_scorer.attempt`` has had enough.

    Args:
        config: of the run.
        console: to say on what the cluster is short of, until a process has begun.
        job: of the processes.
        parts: numbers; may be none.

    Returns:
        One row a part, as ``StrengthScorer`` makes it, in any order.

    Raises:
        UserError: what a process was told is wrong, or no room within ``resources.wait_limit_s``.
        RoleFailed: if a process raised anything else, or kept dying.
        SystemExit: if SIGTERM has come.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    if not parts:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    share, logs = config.resources.scorer, job.setup.log_path.parent
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        StrengthScorer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(size=job.num_workers),
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
        label_selector=share.labels or None,
        runtime_env={"env_vars": environment(job.setup, config.data.allow_hub)},
    )
    before = set(logs.glob(SCORER_LOGS))
    room, begun = room_for_tasks(console.say, "a scorer", share, config.resources.wait_limit_s), False
    try:
        with (
            errors_to(logs / "ray-data.log"),
            contextlib.closing(_polled(rows.iter_rows, 2 * job.num_workers, _stopper(rows))) as polled,
        ):
            for row in polled:
                obey_termination()
                begun = begun or row is not None or set(logs.glob(SCORER_LOGS)) != before
                room.look(waiting=not begun)
                if row is not None and row["refusal"]:
                    raise UserError(row["refusal"])
                if row is not None:
                    yield row
    except RayError as error:
        raise RoleFailed(f"scoring failed: {type(error).__name__}: {error}. Logs: {logs}") from error


def _stopper(rows: Dataset) -> Callable[[], None]:
    """What ends the execution of a dataset, whether or not anything has come of it yet.

    Ray Data has no public way, and says who executes only once the first block is there: whoever is made is noted here.
    """
    executors: list[Any] = []
    create = rows._create_executor

    def noted() -> Any:
        executors.append(create())
        return executors[-1]

    def stop() -> None:
        for executor in executors:
            executor.shutdown(force=True)
            if executor.is_alive():
                executor.join(LEAVE_S)  # a thread, which asks Ray as well

    rows._create_executor = noted  # type: ignore[method-assign]
    return stop


def _polled(
    rows: Callable[[], Iterable[dict[str, Any]]], room: int, stop: Callable[[], None]
) -> Generator[dict[str, Any] | None, None, None]:
    """The rows as they come, and None whenever half a second has passed without one: who waits can look around.

    Whoever leaves finds the thread at its end: one that still asked Ray after ``ray.shutdown`` would end the whole process.

    Args:
        rows: gives them; called, and waited for, in a thread of its own.
        room: rows that may lie ready.
        stop: ends ``rows`` early, whatever it waits for; called again until it has.
    """
    ready: queue.Queue[tuple[dict[str, Any] | None, BaseException | None]] = queue.Queue(room)
    left = threading.Event()

    def fetch() -> None:
        end: BaseException | None = None
        try:
            for row in rows():
                ready.put((row, None))
                if left.is_set():
                    return
        except BaseException as error:
            end = error
        ready.put((None, end))

    thread = threading.Thread(target=fetch, name="scores", daemon=True)
    thread.start()
    try:
        while True:
            try:
                row, error = ready.get(timeout=POLL_S)
            except queue.Empty:
                yield None
                continue
            if error is not None:
                raise error
            if row is None:
                return
            yield row
    finally:
        left.set()
        deadline = time.monotonic() + LEAVE_S
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # the thread may wait for a place
                while True:
                    ready.get_nowait()
            stop()
            thread.join(timeout=0.1)


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
