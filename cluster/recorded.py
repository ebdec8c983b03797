"""Rollouts and scores as a draft keeps them: before anything is learned from them, so that they are never made twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from actors.scorer import Scores
from cluster.journal import Journal
from evaluation.records import RolloutRow, read_rows, write_rows
from tokens.durable import write_file
from tokens.records import Prompt, Rollout, Swap


def sample_ids(run: str, place: str, rollouts: Sequence[Rollout]) -> list[str]:
    """An id for each rollout that no other of the run has.

        sha256(run / place / prompt id / occurrence / sample), 16 hexadecimal digits

    Args:
        run: its name.
        place: the round, and the step or what else they are for.
        rollouts: of one batch; the occurrence tells a prompt that comes twice in it apart.
    """
    seen: Counter[tuple[str, int]] = Counter()
    ids: list[str] = []
    for rollout in rollouts:
        key = (rollout.prompt.id, rollout.sample)
        text = "\x00".join([run, place, rollout.prompt.id, str(seen[key]), str(rollout.sample)])
        ids.append(hashlib.sha256(text.encode()).hexdigest()[:16])
        seen[key] += 1
    return ids


def write_rollouts(path: Path, rollouts: Sequence[Rollout], ids: Sequence[str]) -> None:
    """Write rollouts to a Parquet file.

    Args:
        path: of the file.
        rollouts: at least one.
        ids: of each.
    """
    rows = [
        RolloutRow(
            sample_id=sample_id,
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.text,
            domain=rollout.prompt.domain,
            prompt_ids=rollout.prompt.token_ids,
            sample=rollout.sample,
            response=rollout.text,
            token_ids=rollout.response_ids,
            sampler_logprobs=rollout.sampler_logprobs,
            policy_version=rollout.policy_version,
            finished=rollout.finished,
            swap_tokens=tuple(swap.token for swap in rollout.swaps),
            swap_versions=tuple(swap.version for swap in rollout.swaps),
            engine=rollout.engine,
        )
        for rollout, sample_id in zip(rollouts, ids, strict=True)
    ]
    write_rows(path, rows)


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what ``write_rollouts`` wrote: the same rollouts, bit for bit.

    Args:
        path: of the file.
    """
    return [
        Rollout(
            Prompt(row.prompt_id, row.prompt, row.prompt_ids, row.domain),
            row.sample,
            row.token_ids,
            row.response,
            row.sampler_logprobs,
            row.policy_version,
            row.finished,
            tuple(Swap(token, version) for token, version in zip(row.swap_tokens, row.swap_versions, strict=True)),
            row.engine,
        )
        for row in read_rows(path, RolloutRow)
    ]


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as JSON, which keeps every bit of a float.

    Args:
        path: of the file.
        scores: to write.
    """
    write_file(path, json.dumps(dataclasses.asdict(scores)))


def read_scores(path: Path) -> Scores:
    """Read what ``write_scores`` wrote.

    Args:
        path: of the file.
    """
    stored = json.loads(path.read_text())
    rows = {name: tuple(stored[name]) for name in ("ids", "mean", "std", "aggregated")}
    return Scores(**(stored | rows | {"members": tuple(tuple(row) for row in stored["members"])}))


def learned_from(journal: Journal) -> dict[int, list[str]]:
    """Which samples each PPO step of a round was learned from, as its journal has it: every one that counts, exactly once.

    Steps that were done and undone, since the round went back, count as often as they were done again.

    Args:
        journal: of the round.

    Returns:
        Sample ids by step.

    Raises:
        ValueError: if a step was learned from rollouts that were not recorded, or a sample comes twice.
    """
    steps = sorted(int(key.split()[1]) for key in journal.alive if key.split()[0] == "step")
    missing = [step for step in steps if f"rollouts {step}" not in journal.alive]
    if missing:
        raise ValueError(f"{journal.path}: step {missing[0]} was learned from rollouts that are not recorded")
    found: dict[int, list[str]] = {step: list(journal.alive[f"rollouts {step}"].facts["samples"]) for step in steps}
    twice = [sample for sample, times in Counter(sample for ids in found.values() for sample in ids).items() if times > 1]
    if twice:
        raise ValueError(f"{journal.path}: sample {twice[0]} was learned from twice")
    return found
