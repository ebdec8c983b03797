"""Label selectors: the same syntax as Ray's, and the same nodes."""

from __future__ import annotations

import pytest

from actors.labels import in_words, satisfies, wrong_with

SPOT = {"pool": "rollout", "ray.io/market-type": "spot"}


CASES: list[tuple[dict[str, str], bool]] = [
    ({}, True),
    ({"pool": "rollout"}, True),
    ({"pool": "trainer"}, False),
    ({"pool": "!trainer"}, True),
    ({"pool": "!rollout"}, False),
    ({"pool": "in(trainer, rollout)"}, True),
    ({"pool": "!in(trainer,scorer)"}, True),
    ({"pool": "!in(trainer, rollout)"}, False),
    ({"zone": "a"}, False),
    ({"zone": "!a"}, True),
    ({"pool": "rollout", "ray.io/market-type": "on-demand"}, False),
]


@pytest.mark.parametrize(("selector", "yes"), CASES)
def test_which_nodes_a_selector_asks_for(selector: dict[str, str], yes: bool) -> None:
    assert wrong_with(selector) is None
    assert satisfies(SPOT, selector) is yes


WRONG = [
    {"": "a"},
    {"-pool": "a"},
    {"po ol": "a"},
    {"p" * 64: "a"},
    {f"{'p.' * 127}p/pool": "a"},
    {"pool": "-a"},
    {"pool": "a" * 64},
    {"pool": "in()"},
    {"pool": "!!a"},
    {"pool": "in(a, -b)"},
    {"pool": "a b"},
]


@pytest.mark.parametrize("selector", [*WRONG, SPOT, {"a.b/c": "in(x, y)"}, {"pool": "!a"}], ids=str)
def test_ray_refuses_the_same(selector: dict[str, str]) -> None:
    from ray._private.label_utils import validate_label_selector

    assert (wrong_with(selector) is None) == (validate_label_selector(selector) is None)


def test_in_words() -> None:
    assert in_words({"pool": "trainer", "zone": "!b"}) == "pool=trainer,zone=!b"
