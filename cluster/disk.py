"""Is there room on the disk for what a run will certainly write? Asked before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.config import RunConfig
from cluster.model_sizes import ModelSize, reward_size
from cluster.rounds_config import PPO
from tokens.errors import UserError

FLOAT = 4
"""Bytes of a saved weight: trained weights are float32."""
MODEL_ALONE, WITH_MOMENTS = 1, 3
"""Numbers that are saved for each weight: itself, and AdamW's two moments where it is trained."""
GIB = 2**30


def weights_to_write(config: RunConfig, size: ModelSize, committed: int, begun: bool) -> int:
    """Bytes of the models that the rest of a run saves; optimizer moments, samples and logs come on top.

        (M - 1) and the held-out reward models at the start, then in each round policy, critic and reward model, float32

    Args:
        config: of the run.
        size: of the policy.
        committed: rounds that are there.
        begun: whether ``start/`` is there.
    """
    reward = reward_size(config, size).parameters
    start = 0 if begun else (max(1, config.scorer.num_members - 1) + config.evaluation.num_held_out) * reward
    left = config.rounds.num_rounds - committed
    each = size.parameters + 2 * reward if config.rounds.baseline == "none" else 0
    return FLOAT * (start + left * each)


def states_to_write(config: RunConfig, size: ModelSize) -> int:
    """Bytes of what a round under way keeps beside its models, at the most at one time; it goes when the round is committed.

        of PPO: (K + 1) checkpoints, while a new one is written, of policy and critic with two moments for each trained weight
        of a fit: 2 states of the reward model, the last and the next, likewise

    Adapters are few weights and left out: what is trained then is not counted.

    Args:
        config: of the run.
        size: of the policy.
    """
    rounds, reward = config.rounds, reward_size(config, size).parameters
    learner = size.parameters + reward
    checkpoint = learner * (MODEL_ALONE if config.policy.lora.rank else WITH_MOMENTS)
    plays_ppo = rounds.baseline in PPO
    kept = rounds.keep_checkpoints + 1 if plays_ppo and rounds.checkpoint_every is not None else 0
    fits = 2 * WITH_MOMENTS * reward if rounds.save_fit_every is not None and not config.reward.lora.rank else 0
    return FLOAT * max(kept * checkpoint, fits)


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
    states = states_to_write(config, size)
    needed, free = weights_to_write(config, size, committed, begun) + states, shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"no space left for the run: its {config.rounds.num_rounds - committed} rounds will save models of at least "
            f"{needed / GIB:.3g} GiB ({states / GIB:.3g} for states within a round), {free / GIB:.3g} GiB are free in {root}. "
            "Free some, set storage (or RONDO_STORAGE) to a larger disk, or lower rounds.num_rounds or rounds.keep_checkpoints"
        )
