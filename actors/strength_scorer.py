"""Scoring preference pairs with all members of an ensemble: one process of Ray Data's actor pool.

Letters: n rows of a part, U distinct pairs of it, M members.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.process import ProcessSetup, Role
from rm.config import MemberKind, Pooling
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from rm.batches import Encoded

log = logging.getLogger(__name__)


MAX_DEATHS = 3
"""How often one part may kill the process that scores it, before the run gives up."""


@dataclass(frozen=True)
class ScoringJob:
    """What a scoring process is told.

    Args:
        setup: of the process; its log file's name is completed by the process's number, since the pool starts what it needs.
        texts: Parquet file of the pairs, a row group a part.
        number: column of it that says which of the part's U distinct pairs a row is.
        templated: True if a chat template rendered the prompts.
        kind: of the members.
        base: model directory that the members started from, with their tokenizer.
        members: directory of the members.
        num_members: M.
        pooling: that the members were trained with.
        batch_size: sequences per forward pass.
        attempts: directory that says what is being tried, so that what kills its process again and again is noticed.
        num_workers: processes of the pool.
    """

    setup: ProcessSetup
    texts: Path
    number: str
    templated: bool
    kind: MemberKind
    base: Path
    members: Path
    num_members: int
    pooling: Pooling
    batch_size: int
    attempts: Path
    num_workers: int


class StrengthScorer:
    """Loads the members once, then scores part after part. What is wrong with the input it answers instead of scores: an error
    of this process would reach the driver as Ray's own, without its kind.

    Args:
        job: what to score, with what.
    """

    def __init__(self, job: ScoringJob) -> None:
        path = job.setup.log_path
        role = Role(replace(job.setup, log_path=path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")))
        from pyarrow import parquet

        from preferences.models import read_tokenizer
        from rm.members import load_members

        self.job, self.role = job, role
        self.refusal = ""
        try:
            self.tokenizer = read_tokenizer(job.base)
            with attempt(job.attempts / "load", job.num_workers):
                self.members = load_members(
                    job.kind, job.base, job.members, job.num_members, job.pooling, role.dtype(), job.setup.device
                )
        except UserError as error:
            self.refusal = str(error)
        self.file = parquet.ParquetFile(job.texts)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Score one part.

        Args:
            batch: column ``part``, one row.

        Returns:
            One row: the part, the scores of its n rows for either side ([n, M] float64, flattened), how many distinct sequences
            were scored for them, the seconds that it took, the seconds that its threads computed meanwhile, and the column
            ``refusal``: empty, or what the user must be told, and there are no scores then.
        """
        part = int(batch["part"][0])
        if not self.refusal:
            try:
                with attempt(self.job.attempts / f"part-{part:05d}", 1):
                    return self._score(part)
            except UserError as error:
                self.refusal = str(error)
        return answer(part, np.empty(0), np.empty(0), refusal=self.refusal)

    def _score(self, part: int) -> pa.Table:
        began, cpu_began = time.perf_counter(), time.process_time()
        names = ["prompt", "chosen", "rejected", self.job.number]
        rows = self.file.read_row_group(part, columns=names).to_pydict()
        numbers = np.asarray(rows[self.job.number])
        firsts = np.unique(numbers, return_index=True)[1]  # [U]
        sequences = [self._encode(rows["prompt"][i], rows[side][i]) for side in ("chosen", "rejected") for i in firsts]
        distinct = {sequence: place for place, sequence in enumerate(dict.fromkeys(sequences))}
        with self.role.compute():
            found = self.members.scores(list(distinct), self.job.batch_size, self.tokenizer.pad_token_id)
        scores = found.double().numpy()[[distinct[sequence] for sequence in sequences]]  # [2 U, M]
        chosen, rejected = scores[: len(firsts)][numbers], scores[len(firsts) :][numbers]
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        log.info("part %d: %d pairs, %d distinct sequences, %.2f s", part, len(numbers), len(distinct), seconds)
        return answer(part, chosen, rejected, len(distinct), seconds, cpu_seconds)

    def _encode(self, prompt: str, response: str) -> Encoded:
        from preferences.encode import encode_prompt, encode_response

        return encode_prompt(self.tokenizer, prompt, self.job.templated), encode_response(self.tokenizer, response)


def answer(
    part: int,
    chosen: np.ndarray,
    rejected: np.ndarray,
    num_sequences: int = 0,
    seconds: float = 0.0,
    cpu_seconds: float = 0.0,
    refusal: str = "",
) -> pa.Table:
    """One row, as ``StrengthScorer`` answers."""
    import pyarrow as pa

    lists = pa.list_(pa.float64())
    return pa.table(
        {
            "part": [part],
            "chosen": pa.array([chosen.ravel()], lists),
            "rejected": pa.array([rejected.ravel()], lists),
            "num_sequences": [num_sequences],
            "seconds": [seconds],
            "cpu_seconds": [cpu_seconds],
            "refusal": [refusal],
        }
    )


@contextlib.contextmanager
def attempt(path: Path, at_once: int) -> Iterator[None]:
    """Count how often something was begun and not ended: a process that is killed can say nothing, and the pool tries for ever.

    Args:
        path: file that holds a byte for each beginning; removed at the end.
        at_once: how many processes may be at it at a time.

    Raises:
        RuntimeError: if it was begun more often than ``MAX_DEATHS`` allows.
    """
    with path.open("ab") as file:
        file.write(b".")
        begun = file.tell()
    if begun > (MAX_DEATHS + 1) * at_once:
        raise RuntimeError(f"{path.name} killed its process {begun - 1} times: too little memory? Lower strength.batch_size")
    yield
    path.unlink(missing_ok=True)
