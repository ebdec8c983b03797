"""From no node to what the quickstart needs, a whole run, and back: our cluster file on Ray's autoscalers v1 and v2."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.growing import IDLE_S, Growing, growing

POOLS = {"rollout": "rollout", "reward": "trainer", "scorer": "scorer", "learner": "trainer"}
ON_POOLS = [word for role, pool in POOLS.items() for word in (f"--resources.{role}.labels.pool", pool)]
SMALL = {
    "rounds": {"num_rounds": 1},
    "world": {"num_texts": 2000, "num_pairs": 128, "num_prompts": 128, "num_eval_prompts": 32, "num_validation_pairs": 32},
    "sft": {"batch_size": 64} | {f"shape.{key}": n for key, n in (("hidden_size", 64), ("num_layers", 2), ("num_heads", 2))},
    "meta": {"num_prompts": 32},
    "scorer": {"num_members": 2},
    "policy": {"steps_per_round": 1, "critic_warmup_steps": 0}
    | dict.fromkeys(("prompts_per_step", "minibatch_size", "microbatch_size"), 16),
    "evaluation": {"num_prompts": 24},
}
SHORT = [word for section, keys in SMALL.items() for key, value in keys.items() for word in (f"--{section}.{key}", str(value))]
QUICKSTART = ["run", "configs/quickstart.yaml", "--name", "grown", *SHORT, *ON_POOLS]
TOO_MUCH = ["--rollout.num_engines", "9", *(f"--resources.{role}.num_cpus=1" for role in POOLS)]
LONGEST_S = 450
SURPLUS = {"v1": 1, "v2": 0}
"""Nodes too many, at most. v1 asks at different moments what waits and what is free: a placement group that is just being placed
waits still while its CPUs are taken already, and a node comes for it that nothing then uses and that goes again."""


@dataclass(frozen=True)
class Driver:
    """What became of one."""

    storage: Path
    code: int | None
    printed: str


@dataclass(frozen=True)
class Played:
    """What became of a cluster: the pools of its nodes before the run, whenever they changed, and when there were most."""

    before: tuple[str, ...]
    seen: list[tuple[str, ...]]
    during: tuple[str, ...]
    run: Driver
    refused: Driver
    shrunk_s: float


def drive(cluster: Growing, storage: Path, *arguments: str) -> Driver:
    """A driver from start to end, and an eye on the nodes meanwhile."""
    storage.mkdir()
    with cluster.driver(storage, *arguments) as run:
        deadline = time.monotonic() + LONGEST_S
        while run.poll() is None and time.monotonic() < deadline:
            cluster.workers()
            time.sleep(0.3)
        return Driver(storage, run.poll(), (storage / "printed").read_text())


def play(cluster: Growing, directory: Path) -> Played:
    """A run that asks for too much, and one that does not.

    The first comes before there are nodes: those of the fake provider say that they are of the head's type.
    """
    refused = drive(cluster, directory / "refused", *QUICKSTART, *TOO_MUCH)
    before = cluster.workers()
    run = drive(cluster, directory / "run", *QUICKSTART)
    ended, during = time.monotonic(), max(cluster.seen, key=len)  # at its end, while it writes its page, they may be gone already
    while cluster.workers() and time.monotonic() < ended + IDLE_S + 60:
        time.sleep(0.3)
    return Played(before, cluster.seen, during, run, refused, time.monotonic() - ended)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """Both versions side by side: most of it is waiting."""
    directories = [tmp_path_factory.mktemp(name) for name in ("v1", "v2")]
    with growing(directories[0], 1) as first, growing(directories[1], 2) as second, ThreadPoolExecutor(2) as pool:
        v1, v2 = pool.map(play, (first, second), directories)
    return {"v1": v1, "v2": v2}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_quickstart_makes_the_cluster_grow_and_lets_it_shrink(played: dict[str, Played], version: str) -> None:
    cluster = played[version]
    assert cluster.before == (), "an empty cluster, but for its head"
    assert cluster.run.code == 0, (cluster.seen, cluster.run.printed)
    ledger = json.loads((cluster.run.storage / "runs" / "grown" / "ledger.json").read_text())
    assert len(ledger["rounds"]) == 1
    assert ("rollout", "scorer", "trainer") in cluster.seen, f"one node for each pool, and no other: {cluster.seen}"
    assert set(cluster.during) == {"rollout", "scorer", "trainer"}, cluster.seen
    assert len(cluster.during) <= 3 + SURPLUS[version], f"none that nobody asked for: {cluster.seen}"
    assert cluster.seen[-1] == () and cluster.shrunk_s < IDLE_S + 30, cluster.seen


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_no_node_type_can_hold_is_refused_at_once(played: dict[str, Played], version: str) -> None:
    refused = played[version].refused
    assert refused.code == 2, refused.printed
    (error,) = [line for line in refused.printed.splitlines() if line.startswith("error: ")]
    assert (
        "this cluster can never hold the run: rollout-0 to 8 need 1 CPU on pool=rollout each, and there may be room for 8"
        in error
    )
