"""Bytes that a run will write, by hand."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from cluster import disk
from cluster.disk import check_space, states_to_write, weights_to_write
from cluster.load_config import load_config
from cluster.model_sizes import ModelSize, reward_size
from tests.cluster.command import TINY
from tokens.errors import UserError

SIZE = ModelSize(1_000_000, 2, 100, 1000, 200, 10, 5, 10, num_embeddings=2)
"""A policy of a million weights."""
REWARD = reward_size(load_config(TINY), SIZE).parameters
LEARNER = 1_000_000 + REWARD
"""Policy and critic."""


def test_the_models_of_the_rounds_that_are_left() -> None:
    config = load_config(TINY, ["--rounds.num_rounds", "5", "--scorer.num_members", "3"])
    each = 4 * (1_000_000 + 2 * REWARD)
    assert weights_to_write(config, SIZE, 0, begun=False) == 5 * each + 4 * 2 * REWARD
    assert weights_to_write(config, SIZE, 3, begun=True) == 2 * each


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--rounds.keep_checkpoints", "2"], 4 * 3 * 3 * LEARNER),  # two that are kept and one that is being written
        (["--rounds.keep_checkpoints", "5"], 4 * 6 * 3 * LEARNER),
        (["--policy.lora.rank", "2"], 4 * 3 * LEARNER),  # whole weights, and moments of the adapters alone
        (["--rounds.checkpoint_every", "null"], 4 * 2 * 3 * REWARD),  # the last and the next state of a fit
        (["--rounds.checkpoint_every", "null", "--rounds.save_fit_every", "null"], 0),
        (["--rounds.baseline", "dpo", "--rounds.num_rounds", "1"], 4 * 2 * 3 * REWARD),
    ],
)
def test_the_states_of_a_round_under_way(given: list[str], wanted: int) -> None:
    assert states_to_write(load_config(TINY, given), SIZE) == wanted


def test_a_disk_that_holds_the_models_and_not_the_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY)
    needed = weights_to_write(config, SIZE, 0, begun=False) + states_to_write(config, SIZE)
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda root: usage(needed - 1))
    with pytest.raises(UserError, match=r"no space left for the run: .* for states within a round.*rounds\.keep_checkpoints"):
        check_space(config, tmp_path, SIZE, 0, begun=False)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda root: usage(needed))
    check_space(config, tmp_path, SIZE, 0, begun=False)
