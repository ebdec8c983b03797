"""Is there room on the disk for what a run will certainly write? Asked before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.config import RunConfig
from cluster.model_sizes import ModelSize, reward_size
from tokens.errors import UserError

FLOAT = 4
"""Bytes of a saved weight: trained weights are float32."""
GIB = 2**30


def weights_to_write(config: RunConfig, size: ModelSize, committed: int, begun: bool) -> int:
    """Bytes of the models that the rest of a run saves; optimizer moments, samples and logs come on top.

        (M - 1) reward models at the start, then in each round policy, critic and reward model, float32

    Args:
        config: of the run.
        size: of the policy.
        committed: rounds that are there.
        begun: whether ``start/`` is there.
    """
    reward = reward_size(config, size).parameters
    start = 0 if begun else max(1, config.scorer.num_members - 1) * reward
    left = config.rounds.num_rounds - committed
    each = size.parameters + 2 * reward if config.rounds.baseline == "none" else 0
    return FLOAT * (start + left * each)


def check_space(config: RunConfig, root: Path, size: ModelSize, committed: int, begun: bool) -> None:
    """Refuse a run whose models cannot fit on the disk.

    Args:
        config: of the run.
        root: the storage root.
        size: of the policy.
        committed: rounds that are there.
        begun: whether ``start/`` is there.

    Raises:
        UserError: with what is needed and what is free.
    """
    needed, free = weights_to_write(config, size, committed, begun), shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"no space left for the run: its {config.rounds.num_rounds - committed} rounds will save models of at least "
            f"{needed / GIB:.3g} GiB, {free / GIB:.3g} GiB are free in {root}. Free some, set storage (or RONDO_STORAGE) to "
            "a larger disk, or lower rounds.num_rounds"
        )
