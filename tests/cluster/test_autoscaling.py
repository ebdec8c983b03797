"""From no node to what the quickstart needs, a whole run, and back: our cluster file on Ray's autoscalers v1 and v2."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.growing import IDLE_S, Growing, growing

POOLS = {"rollout": "rollout", "reward": "trainer", "scorer": "scorer", "learner": "trainer"}
ON_POOLS = [word for role, pool in POOLS.items() for word in (f"--resources.{role}.labels.pool", pool)]
SMALL = {
    "rounds": {"num_rounds": 1},
    "world": {"num_texts": 2000, "num_pairs": 128, "num_prompts": 128, "num_eval_prompts": 32, "num_validation_pairs": 32},
    "meta": {"num_prompts": 32},
    "scorer": {"num_members": 2},
    "policy": {"steps_per_round": 1, "prompts_per_step": 16, "minibatch_size": 16, "critic_warmup_steps": 0},
    "evaluation": {"num_prompts": 24},
}
SHORT = [word for section, keys in SMALL.items() for key, value in keys.items() for word in (f"--{section}.{key}", str(value))]
QUICKSTART = ["run", "configs/quickstart.yaml", "--name", "grown", *SHORT]
LONGEST_S = 200


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    with growing(tmp_path_factory.mktemp("growing"), request.param) as cluster:
        yield cluster


def test_the_quickstart_makes_the_cluster_grow_and_lets_it_shrink(cluster: Growing, tmp_path: Path) -> None:
    assert cluster.workers() == (), "an empty cluster, but for its head"
    run = cluster.start(tmp_path, *QUICKSTART, *ON_POOLS)
    deadline = time.monotonic() + LONGEST_S
    while run.poll() is None:
        cluster.workers()
        assert time.monotonic() < deadline, (run.terminate(), run.communicate()[0], cluster.seen)
        time.sleep(0.3)
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert set(cluster.seen[-1]) == {"rollout", "scorer", "trainer"}, cluster.seen
    assert max(len(seen) for seen in cluster.seen) == 3, f"one node for each pool, and none that nobody asked for: {cluster.seen}"
    ledger = json.loads((tmp_path / "runs" / "grown" / "ledger.json").read_text())
    assert len(ledger["rounds"]) == 1
    ended = time.monotonic()
    while cluster.workers():
        assert time.monotonic() < ended + IDLE_S + 30, cluster.seen
        time.sleep(0.3)


def test_what_no_node_type_can_hold_is_refused_at_once(cluster: Growing, tmp_path: Path) -> None:
    asked = ["--rollout.num_engines", "9", *(f"--resources.{role}.num_cpus=1" for role in POOLS)]
    run = cluster.start(tmp_path, *QUICKSTART, *ON_POOLS, *asked)
    printed, _ = run.communicate(timeout=90)
    assert run.returncode == 2, printed
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (
        "this cluster can never hold the run: rollout-0 to 8 need 1 CPU on pool=rollout each, and there may be room for 8"
        in error
    )
    assert cluster.workers() == ()
