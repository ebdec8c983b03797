"""Training the members of a preference-strength ensemble: one Ray task for each fit, side by side as far as there is room."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.board import Teller
from actors.process import ProcessSetup
from actors.ranks import Rank
from rm.config import MemberKind, MetaConfig, RewardConfig
from tokens.durable import draft_directory
from tokens.pair_store import PairStore

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often the process of one task may die before the run gives up."""


@dataclass(frozen=True)
class MemberJob:
    """One fit.

    Args:
        name: for logs and messages.
        kind: of the members.
        base: model directory to start from, with its tokenizer.
        reward: settings, as ``rm.member_settings.member_settings`` gives them.
        fold: the pairs of this fold are left out of the fit; None = it sees all pairs.
        seeds: of the head and of the order of the pairs; for "heads" the trunk's, then one for each head.
        directory: where the member belongs; it appears whole or not at all.
    """

    name: str
    kind: MemberKind
    base: Path
    reward: RewardConfig
    fold: int | None
    seeds: tuple[int, ...]
    directory: Path


@dataclass(frozen=True)
class MemberReport:
    """What a fit came to, and what it cost.

    Args:
        name: of the job.
        num_pairs: that it saw.
        loss: mean over the last quarter of the steps, nats per pair.
        accuracy: of the pairs of those steps, before each step's update.
        seconds: from the base's weights to the last head, the process's start not counted.
        cpu_seconds: that its threads computed meanwhile; what `seconds` would be on an idle machine with one core.
        peak_bytes: most memory that the process held; on a GPU the most that was allocated there.
        start_bytes: what it held before there was a model: Python, its libraries, the pairs; 0 on a GPU.
        weight_bytes: of the files that hold the member.
    """

    name: str
    num_pairs: int
    loss: float
    accuracy: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    start_bytes: int
    weight_bytes: int


@ray.remote(max_calls=1, max_retries=MAX_DEATHS)  # a process for each fit: its peak of memory is its own
def train_member(
    setup: ProcessSetup,
    job: MemberJob,
    pairs: PairStore,
    folds: np.ndarray | None,
    commit: Callable[[MemberReport, Path, Path], None],
    board: Any,
) -> MemberReport:
    """Fit one member and store it.

    Args:
        setup: of the process.
        job: what to fit.
        pairs: all N training pairs, in memory that the processes of a machine share.
        folds: [N] the fold of each; None where the fit sees all.
        commit: writes the report beside the finished files and moves their directory to its place.
        board: told how far the fit is.

    Returns:
        The report.
    """
    tell = Teller(board, job.name)
    rank = Rank(setup)
    import torch
    from transformers import AutoTokenizer

    from rm.members import head_members, save_heads, save_member, start_member
    from rm.records import RewardStep
    from rm.training import fit_reward_model

    cuda = setup.device == "cuda"
    seen = pairs if folds is None else pairs.take(np.flatnonzero(folds != job.fold))
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    start = 0 if cuda else _most_memory()
    began, cpu_began = time.perf_counter(), time.process_time()

    def on_step(step: RewardStep) -> None:
        last = step.step == step.num_steps
        if tell.due(last):
            tell(min(step.step * job.reward.batch_size, len(seen) * job.reward.epochs), last)
            log.info("%s: step %d of %d, loss %.4f", job.name, step.step, step.num_steps, step.loss)

    model = rank.place(start_member(job.base, job.reward, job.seeds[0], tokenizer.pad_token_id))
    with rank.compute():
        fit = fit_reward_model(
            model, seen, None, job.reward, MetaConfig(enabled=False), job.seeds[0], tokenizer.pad_token_id, on_step
        )
        heads = None
        if job.kind == "heads":
            batch_size = job.reward.microbatch_size
            heads = head_members(model, seen, job.seeds[1:], batch_size, tokenizer.pad_token_id, tell.beat)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    partial = draft_directory(job.directory)
    save_member(job.kind, model, partial)
    if heads is not None:
        save_heads(heads, partial)
    weights = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    tokenizer.save_pretrained(partial)
    peak = int(torch.cuda.max_memory_allocated()) if cuda else _most_memory()
    report = MemberReport(job.name, len(seen), fit.loss, fit.accuracy, seconds, cpu_seconds, peak, start, weights)
    commit(report, partial, job.directory)
    tell.end()
    log.info("%s: %s", job.name, asdict(report))
    return report


def _most_memory() -> int:
    """The most that this process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
