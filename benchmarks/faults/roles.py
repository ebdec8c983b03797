"""Deaths of roles in a living job: idle, in the middle of their work, and while they write."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.faults.bench import Bench, shm
from benchmarks.faults.inject import kill_frozen
from benchmarks.faults.strikes import Strike, after, finish, strike_all, writing

CELLS = ("F1", "F2", "F3", "F4", "F7", "F8", "F9", "F10", "F13", "F14", "F25")
STRIKES: Sequence[Strike] = (
    Strike("F9", "reward-0", after("sample_meta", 0.1), kill_frozen),
    Strike("F13", "reward-0", writing(".reward.*.partial/*"), kill_frozen, still=".reward.*.partial"),
    Strike("F8", "scorer-0", after("reward"), kill_frozen),
    Strike("F7", "rollout-1", after("sync", 0.02), kill_frozen, hold="learner-0"),
    Strike("F25", "rollout-0", after("policy"), kill_frozen, hold="learner-0"),
    Strike("F10", "learner-0", after("score"), kill_frozen),
    Strike("F14", "learner-0", writing(".after_*_steps.*.partial/*"), kill_frozen, still=".after_*_steps.*.partial"),
    Strike("F2", "scorer-0", after("sync", 0.02)),
    Strike("F1", "rollout-1", after("score"), hold="learner-0"),
    Strike("F4", "learner-0", after("sync", 0.02)),
    Strike("F3", "reward-0", after("score")),
)
"""In the order of the run."""


def roles(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Play the deaths of roles, one after another, in one run.

    Args:
        bench: where.
        wanted: cells to play.
    """
    baseline, before, name = bench.baseline(), shm(), bench.fresh("roles")
    with bench.run(name) as run:
        struck, wrong = strike_all(run, [each for each in STRIKES if each.cell in wanted])
        finish(bench, run, baseline, before, struck, wrong)
