"""How two workers share the tests (``pytest -n 2``): file by file, in an order that suits a machine with two cores.

A run on a real Ray leaves a core idle for much of its time: processes start, wait for each other, and end. What depends on time
comes first, beside tests that start no Ray; then the long files, so that both workers end at about the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

SENSITIVE = ("tests/cluster/test_autoscaling.py",)
"""Whose nodes must start within a time: beside them nothing that starts Ray."""

SHARED_RUNS = tuple(
    f"tests/cluster/test_{name}.py"
    for name in ("best", "elastic", "eta", "faults", "guarding", "real_data", "row_of_run", "run", "secrets", "storage")
)
"""That look at the runs of ``tests/cluster/conftest.py``: by one worker, or both would make these runs."""

RUN_OF_RANKS = ("tests/cluster/test_survival.py", "tests/cluster/test_ranks.py")
"""That look at ``ranks_run`` of the same file: by one worker as well."""

ON_RAY = tuple(
    f"tests/{name}.py"
    for name in (
        "cluster/test_job", "cluster/test_survival", "cluster/test_strength", "cluster/test_reward", "cluster/test_ranks",
        "cluster/test_dashboard", "cluster/test_baselines", "cluster/test_rank_failures", "cluster/test_recovery",
        "actors/test_pool", "cluster/test_study", "actors/test_rollout", "cluster/test_features", "cluster/test_people",
        "cluster/test_generalize", "cluster/test_ask", "cluster/test_fresh",
    )
)  # fmt: skip
"""The other files that take half a minute or more on a real Ray, the longest first. One that is missing here comes sooner."""


def turn(path: str) -> int:
    """When a file's turn comes: the lower, the sooner."""
    if path in SENSITIVE:
        return 0
    if path in SHARED_RUNS:
        return 2
    return 3 + ON_RAY.index(path) if path in ON_RAY else 1


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker a whole file at a time, and all of SHARED_RUNS, or of RUN_OF_RANKS, to one."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False  # the order is that of `in_turn`
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        if path in RUN_OF_RANKS:
            return "run of ranks"
        return "shared runs" if path in SHARED_RUNS else path


def in_turn(items: list[pytest.Item], root: Path) -> None:
    """Sort tests by the turns of their files, and see that who asks for a shared run is one of SHARED_RUNS."""
    for item in items:
        path = item.path.relative_to(root).as_posix()
        if path not in SHARED_RUNS and {"tiny_run", "pool_run"} & set(item.fixturenames):
            raise pytest.UsageError(f"{path} looks at a shared run: name it in SHARED_RUNS of tests/side_by_side.py")
        if path not in RUN_OF_RANKS and "ranks_run" in item.fixturenames:
            raise pytest.UsageError(f"{path} looks at the run of ranks: name it in RUN_OF_RANKS of tests/side_by_side.py")
    items.sort(key=lambda item: turn(item.path.relative_to(root).as_posix()))
