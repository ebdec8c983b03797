"""Which processes share a bundle, and how weights travel there: arithmetic by hand."""

from __future__ import annotations

import pytest

from cluster.cli import main
from cluster.load_config import load_config
from cluster.placement import Seat, colocated, disaggregated, on_this_machine, weight_transfer
from cluster.plan import GIB, PROCESS, Bundle, Node, place
from tests.cluster.command import ROOT, TINY

PROCESSES = tuple(
    Bundle(role, f"{role}-{i}", 2.0, 1.0, memory * GIB, "a test")
    for role, number, memory in (("rollout", 1, 10), ("reward", 2, 30), ("scorer", 1, 20), ("learner", 2, 60))
    for i in range(number)
)
ON_GPUS = [x for role in ("rollout", "reward", "scorer", "learner") for x in (f"--resources.{role}.num_gpus", "1")]
COLOCATED = ["--resources.placement", "colocated"]
ONE_POOL = ["--resources.rollout.labels.pool", "trainer", "--resources.scorer.labels.pool", "trainer"]


def test_what_takes_turns_and_does_not_fit_is_said_in_words() -> None:
    plan = place([Bundle("shared", "shared-0", 4, 1, 200 * GIB, "all of them")], [Node(16, 1, 500 * GIB, 80 * GIB)])
    assert "raise num_ranks of the largest of them" in plan.shortfalls[0]


def test_apart_each_has_a_bundle_of_its_own() -> None:
    placement = disaggregated(PROCESSES)
    assert placement.bundles == PROCESSES
    assert placement.seats["learner-1"] == Seat(5, 1.0) and placement.seats["rollout-0"] == Seat(0, 1.0)


def test_colocated_processes_take_fractions_of_a_bundle_that_holds_a_whole_gpu() -> None:
    placement = colocated(PROCESSES)
    first, second = placement.bundles
    assert (first.num_gpus, first.num_cpus, first.memory) == (1.0, 8.0, 60 * GIB), "as much as the largest needs"
    assert first.host == 3 * PROCESS + (10 + 30 + 20 + 60) * GIB, "all rest when another bundle's role works"
    assert (second.num_gpus, second.num_cpus, second.memory) == (1.0, 4.0, 60 * GIB)
    assert second.host == PROCESS + 90 * GIB
    assert {name: seat.bundle for name, seat in placement.seats.items()} == {p.name: int(p.name[-1]) for p in PROCESSES}
    assert placement.seats["rollout-0"].num_gpus == 0.25 and placement.seats["learner-1"].num_gpus == 0.5
    assert "rollout-0, reward-0, scorer-0, learner-0 in turn, 0.25 GPU each" in first.why and "120.0 GiB rest" in first.why


@pytest.mark.parametrize("number", range(1, 12))
def test_fractions_never_ask_for_more_than_one_gpu(number: int) -> None:
    group = [Bundle(f"role{i}", f"role{i}-0", 1.0, 1.0, GIB, "a test") for i in range(number)]
    fraction = colocated(group).seats["role0-0"].num_gpus
    assert 1 - number * 1e-4 <= round(fraction * 10_000) * number / 10_000 <= 1


def test_without_gpus_the_bundles_are_shared_and_nothing_rests() -> None:
    placement = colocated([Bundle(p.role, p.name, p.num_cpus, 0.0, p.memory, p.why) for p in PROCESSES])
    assert placement.bundles[0].resources == {"CPU": 8.0} and placement.bundles[0].memory == 120 * GIB
    assert placement.bundles[0].host == 3 * PROCESS and placement.seats["learner-0"] == Seat(0, 0.0)


def test_labels_are_dropped_where_there_is_one_node_only() -> None:
    config = load_config(ROOT / "configs" / "hh_7b.yaml")
    assert config.resources.scorer.labels == {"pool": "scorer"}
    bare = on_this_machine(config)
    assert bare.resources.scorer.labels == {} and bare.resources.scorer.num_gpus == 1 and bare.rollout == config.rollout


def test_auto_is_what_fits_the_placement() -> None:
    assert weight_transfer(load_config(TINY)) == weight_transfer(load_config(TINY, COLOCATED)) == "store"
    assert weight_transfer(load_config(TINY, ON_GPUS)) == "nccl"
    assert weight_transfer(load_config(TINY, [*ON_GPUS, *COLOCATED])) == "ipc"
    more = ["--rollout.num_engines", "2"]
    assert weight_transfer(load_config(TINY, [*ON_GPUS, *COLOCATED, *more])) == "store", "the second engine's GPU has no learner"
    assert weight_transfer(load_config(TINY, [*ON_GPUS, "--rollout.sync", "store"])) == "store"


def test_plan_says_why_processes_take_fractions(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(ROOT / "configs" / "hh_7b.yaml"), "--node-cpus", "64", "--node-gpus", "4", "--node-memory-gib", "1000"]
    assert main([*plan, "--gpu-memory-gib", "141", *COLOCATED, *ONE_POOL]) == 0
    out = capsys.readouterr().out
    assert "Everything fits" in out and "shared-3" in out and "shared-3 on pool=trainer. These" in out
    assert main([*plan, "--gpu-memory-gib", "141", *COLOCATED]) == 2
    assert "roles that take turns are on the same nodes" in capsys.readouterr().err
    last = colocated(PROCESSES[1:3]).bundles[1].why
    assert last == "reward-1 in turn, 1 GPU each, so that Ray puts all of them on this one; up to 30.0 GiB rest in host memory"
