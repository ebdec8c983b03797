"""How a process stands, and how often a role may fail."""

from __future__ import annotations

from itertools import product

import pytest

from cluster.health import Budget, FaultsConfig, ForbiddenEdge, Health, State

EDGES = {
    ("healthy", "suspect"), ("healthy", "dead"),
    ("suspect", "healthy"), ("suspect", "dead"),
    ("dead", "restarting"),
    ("restarting", "stale"), ("restarting", "dead"),
    ("stale", "healthy"), ("stale", "suspect"), ("stale", "dead"),
}  # fmt: skip
"""All that there are, for a process that was healthy when it became suspect."""
WAY_TO = {
    State.HEALTHY: (),
    State.SUSPECT: (State.SUSPECT,),
    State.DEAD: (State.DEAD,),
    State.RESTARTING: (State.DEAD, State.RESTARTING),
    State.STALE: (State.DEAD, State.RESTARTING, State.STALE),
}


def process_in(state: State) -> Health:
    health = Health("rollout-0")
    for step in WAY_TO[state]:
        health.move(step)
    return health


@pytest.mark.parametrize(("start", "to"), list(product(State, State)))
def test_a_state_leads_where_it_may_and_nowhere_else(start: State, to: State) -> None:
    health = process_in(start)
    assert health.state is start
    if (start.value, to.value) in EDGES:
        health.move(to)
        assert health.state is to
    else:
        with pytest.raises(ForbiddenEdge, match=f"rollout-0 is {start.value} and cannot become {to.value}; from there: "):
            health.move(to)
        assert health.state is start


def test_what_was_stale_before_it_was_suspect_does_not_serve_after() -> None:
    health = process_in(State.STALE)
    health.move(State.SUSPECT)
    with pytest.raises(ForbiddenEdge, match="cannot become healthy; from there: dead, stale"):
        health.move(State.HEALTHY)
    health.move(State.STALE)
    health.move(State.HEALTHY)


def test_the_way_of_a_process_that_dies_twice() -> None:
    health = Health("scorer-0")
    for step in (State.SUSPECT, State.DEAD, State.RESTARTING, State.DEAD, State.RESTARTING, State.STALE, State.HEALTHY):
        health.move(step)
    assert health.incarnation == 3


def test_only_the_process_that_is_there_is_listened_to() -> None:
    health = Health("learner-0")
    assert health.admits(1) and not health.admits(2)
    health.move(State.SUSPECT)
    assert health.admits(1), "it may still answer"
    health.move(State.DEAD)
    assert not health.admits(1)
    health.move(State.RESTARTING)
    assert health.admits(2) and not health.admits(1), "the one that was taken for dead, and comes back"


def test_each_role_and_each_kind_has_a_budget_of_its_own_and_old_failures_are_forgotten() -> None:
    now = [0.0]
    budget = Budget(FaultsConfig(infrastructure=2, data=1, window_s=100.0), lambda: now[0])
    assert budget.spend("rollout", "infrastructure") and budget.spend("rollout", "infrastructure")
    assert budget.spend("rollout", "data"), "the other kind"
    assert not budget.spend("rollout", "data")
    assert budget.spend("scorer", "infrastructure"), "another role"
    now[0] = 99.0
    assert not budget.spend("rollout", "infrastructure")
    now[0] = 150.0
    assert budget.spend("rollout", "infrastructure"), "the two at 0 s are forgotten, the one at 99 s is not"
    assert not budget.spend("rollout", "infrastructure")
    assert not Budget(FaultsConfig(infrastructure=0), lambda: 0.0).spend("learner", "infrastructure")


def test_an_error_counts_until_its_round_is_committed() -> None:
    now = [0.0]
    budget = Budget(FaultsConfig(infrastructure=1, data=1, window_s=100.0), lambda: now[0])
    assert budget.spend("reward", "data") and budget.spend("reward", "infrastructure")
    now[0] = 5000.0  # the same error, after the hours that the work takes
    assert not budget.spend("reward", "data") and budget.spend("reward", "infrastructure")
    budget.committed()
    assert budget.spend("reward", "data") and not budget.spend("reward", "infrastructure")
