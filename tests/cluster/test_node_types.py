"""What a cluster is short of, and what it can never hold: arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.growth import Growth
from cluster.node_types import LiveNode, NodeType, impossible, marked, of_cluster_file, shortages
from cluster.plan import Bundle

TRAINER = {"pool": "trainer"}
TYPES = (
    NodeType("rollout", {"CPU": 8, "GPU": 1, "rollout": 1}, {"pool": "rollout"}, 2),
    NodeType("trainer", {"CPU": 16, "GPU": 4, "trainer": 1}, TRAINER, 1),
)


def bundles(role: str, number: int, cpus: float, gpus: float, **labels: str) -> list[Bundle]:
    return [Bundle(role, f"{role}-{i}", cpus, gpus, 0, "a test", labels=labels) for i in range(number)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (bundles("rollout", 2, 8, 1, pool="rollout"), None),
        (bundles("rollout", 6, 2, 1), None),
        (bundles("learner", 4, 4, 1, pool="trainer"), None),
        (
            bundles("rollout", 3, 8, 1, pool="rollout"),
            "rollout-0 to 2 need 8 CPU, 1 GPU on pool=rollout each, and there may be room for 2 of them at most (2 x rollout",
        ),
        (
            bundles("rollout", 1, 8, 2, pool="rollout"),
            "rollout-0 needs 8 CPU, 2 GPU on pool=rollout, and no node type can hold that (2 x rollout: 8 CPU, 1 GPU)",
        ),
        (bundles("rollout", 1, 4, 8), "no node type can hold that (2 x rollout: 8 CPU, 1 GPU; 1 x trainer: 16 CPU, 4 GPU)"),
        (bundles("scorer", 1, 1, 0, pool="scorer"), "scorer-0 needs 1 CPU on pool=scorer, and no node type has these labels"),
        (bundles("rollout", 2, 3, 3), "rollout-0 to 1 need 3 CPU, 3 GPU each, and there may be room for 1 of them at most"),
        (
            [*bundles("reward", 2, 4, 1, **TRAINER), *bundles("learner", 3, 4, 1, **TRAINER)],
            "reward-0 to 1, learner-0 to 2 need 20 CPU on pool=trainer together, and there may be 16 at most",
        ),
        ([*bundles("scorer", 2, 8, 1), *bundles("learner", 4, 5, 1)], "scorer-0 to 1, learner-0 to 3 need 36 CPU together"),
    ],
)
def test_what_no_growth_makes_room_for(asked: list[Bundle], said: str | None) -> None:
    found = impossible(asked, TYPES)
    assert (not found) if said is None else said in found[0], found


def test_labels_that_are_not_known_stand_in_no_ones_way() -> None:
    unlabelled = [replace(kind, labels=None) for kind in TYPES]
    assert impossible(bundles("learner", 4, 4, 1, pool="elsewhere"), unlabelled) == ()


def test_the_head_and_the_cap_of_the_whole_are_counted() -> None:
    kind = {"node_config": {}, "resources": {"CPU": 4}}
    file = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {"head": kind, "a": kind, "b": kind | {"max_workers": 5}},
    }
    assert of_cluster_file(file) == (NodeType("a", {"CPU": 4.0}, {}, 3), NodeType("b", {"CPU": 4.0}, {}, 3))


NODES = [
    LiveNode({}, {"CPU": 0, "memory": 1}, {"memory": 1}),
    LiveNode(TRAINER, {"CPU": 16, "GPU": 4}, {"CPU": 9, "GPU": 4}),
    LiveNode({"pool": "rollout"}, {"CPU": 8, "GPU": 1}, {"CPU": 8}),
]


def test_what_is_short_now_is_said_bundle_by_bundle() -> None:
    asked = [*bundles("learner", 4, 4, 1, **TRAINER), *bundles("scorer", 1, 1, 0, pool="scorer")]
    assert shortages(asked, NODES) == (
        "learner-2 to 3 need 4 CPU, 1 GPU on pool=trainer; the largest free node of that kind has 1 CPU, 2 GPU left of 16 CPU, "
        "4 GPU",
        "scorer-0 needs 1 CPU on pool=scorer; no node has these labels",
    )
    assert shortages(asked[:2], NODES) == () and shortages(asked[:1], []) == (
        "learner-0 needs 4 CPU, 1 GPU on pool=trainer; there is no node",
    )
    (busy,) = shortages(bundles("rollout", 1, 4, 1, pool="rollout"), NODES)
    assert busy.endswith("the largest free node of that kind has 8 CPU, 0 GPU left of 8 CPU, 1 GPU")


def test_an_autoscaler_without_labels_is_asked_for_what_only_the_right_types_have() -> None:
    (learner,) = bundles("learner", 1, 4, 1, **TRAINER)
    assert marked(learner, TYPES) == {"CPU": 4, "GPU": 1, "trainer": 0.001}
    assert marked(replace(learner, labels={}), TYPES) == learner.resources
    assert (
        Growth(TYPES, False, reads_labels=True).asked(learner) == Growth(None, False, False).asked(learner) == learner.resources
    )
    first = Growth(TYPES, by_hand=False, reads_labels=False)
    assert first.asked(learner) == marked(learner, TYPES) and first.unseen([learner]) is None
    plain = tuple(replace(kind, resources={"CPU": 16, "GPU": 4}) for kind in TYPES)
    said = Growth(plain, by_hand=False, reads_labels=False).unseen([learner])
    assert said is not None and "may add nodes of type rollout where learner-0 asks for pool=trainer" in said
    assert Growth(plain, by_hand=False, reads_labels=True).unseen([learner]) is None
