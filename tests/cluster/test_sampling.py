"""Sampling ahead: what is asked for when, what is refused, what a failure is called, and how much time it saves."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from benchmarks.overlap import compare
from cluster.config import RunConfig
from cluster.console import Console
from cluster.failures import BadNumbers, RoleFailed
from cluster.judging import check_likelihoods, parity_bound
from cluster.run import warnings
from cluster.sampling import ages, draw, refuse_old, sampling
from cluster.seeds import derive
from cluster.waiting import Pending, Waiter
from evaluation.timeline import DRIVER, Span
from tokens.records import Prompt, Rollout, Swap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")  # Ray's own

PROMPTS = [Prompt(f"p{i}", "", (1,)) for i in range(6)]
Asked = tuple[tuple[str, ...], int, int]


def config(**sections: object) -> RunConfig:
    sizes = dict.fromkeys(("prompts_per_step", "minibatch_size", "microbatch_size"), 4) | {"steps_per_round": 5}
    policy = sizes | sections.pop("policy", {})  # type: ignore[operator]
    return RunConfig.model_validate({"name": "x", "policy": policy, **sections})


def rollout(version: int, *swaps: Swap) -> Rollout:
    return Rollout(PROMPTS[0], 0, (5, 6, 2), "", (-1.0, -2.0, -3.0), version, True, swaps)


class Pool:
    """Notes what it is asked for; an engine would take the version that it holds when it begins."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> Pending[list[Rollout]]:
        self.log.append((tuple(prompt.id for prompt in prompts), seed, version))
        return Pending((), (), (), lambda answers: [rollout(version)])


class Wait(Waiter):
    """Notes whose turn it is."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __call__(self, phase: str, pending: Pending[Any], bar: object = None) -> Any:
        self.log.append((phase, pending.step))
        return pending.combine([])

    def watch(self, phase: str, pending: Pending[Any]) -> None:
        self.log.append(("watch", pending.step))

    def forget(self, pending: Pending[Any]) -> None:
        self.log.append(("forget", pending.step))


def play(max_lag: int) -> list[Any]:
    log: list[Any] = []
    pool: Any = Pool(log)
    sample = sampling(config(policy={"max_lag": max_lag}), PROMPTS, pool, Wait(log))
    for index in range(2):
        for step in range(5):
            sample(index, step, 5 * index + step)
            log.append("learn")
    return log


def asked(log: list[Any]) -> list[Asked]:
    return [entry for entry in log if isinstance(entry[0], tuple)]


def test_on_policy_a_batch_is_asked_for_when_it_is_needed() -> None:
    log = play(0)
    assert [version for *_, version in asked(log)] == list(range(10))
    assert [entry for entry in log if not isinstance(entry[0], tuple)] == [
        entry for _ in range(2) for step in range(5) for entry in (("sample", step), "learn")
    ]


@pytest.mark.parametrize(("max_lag", "versions"), [(1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2]), (9, [0, 0, 0, 0, 0])])
def test_ahead_the_batches_are_the_same_and_none_goes_over_the_end_of_a_round(max_lag: int, versions: list[int]) -> None:
    log, on_policy = play(max_lag), play(0)
    assert [entry[:2] for entry in asked(log)] == [entry[:2] for entry in asked(on_policy)], "prompts and seeds"
    assert [version for *_, version in asked(log)] == versions + [5 + version for version in versions]
    first = log[: log.index("learn")]
    assert [entry for entry in first if entry[0] == "watch"] == [("watch", step) for step in range(min(max_lag + 1, 5))]
    half = len(log) // 2
    assert log[half - 1] == "learn" and sum(entry == "learn" for entry in log[:half]) == 5
    assert len(asked(log[:half])) == 5, "nothing of the second round is asked for in the first"


@pytest.mark.parametrize("max_lag", [1, 2])
def test_a_step_that_is_left_out_takes_its_batch_with_it(max_lag: int) -> None:
    log: list[Any] = []
    pool: Any = Pool(log)
    sample = sampling(config(policy={"max_lag": max_lag}), PROMPTS, pool, Wait(log))
    for index, steps in ((0, (0, 1, 3)), (1, (0, 2, 3, 4))):
        for step in steps:
            sample(index, step, 5 * index + step)
    noted = [entry for entry in log if not isinstance(entry[0], tuple)]
    assert [step for phase, step in noted if phase == "sample"] == [0, 1, 3, 0, 2, 3, 4]
    assert [step for phase, step in noted if phase == "forget"] == [2, 4, 1], "those of the steps that were left out"
    sample.forget()
    assert len(asked(log)) == 10, "nothing is asked for twice"


def test_prompts_come_again_only_after_all_have_come() -> None:
    drawn = [p.id for step in range(3) for p in draw(0, PROMPTS, 4 * step, 4, "policy", 0)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [p.id for p in PROMPTS] and drawn[:6] != drawn[6:]


def test_the_order_of_a_lap_is_a_shuffle_of_all_whether_or_not_it_was_made_before() -> None:
    many = [Prompt(str(i), "", (1,)) for i in range(100)]
    for _ in range(2):
        order = random.Random(derive(5, "meta", "prompts", 2, 0)).sample(many, len(many))
        assert draw(5, many, 30, 40, "meta", 2) == order[30:70]
        pieces = [prompt for start in range(0, 100, 7) for prompt in draw(5, many, start, min(7, 100 - start), "meta", 2)]
        assert pieces == order
    assert draw(5, many[:50], 0, 50, "meta", 2) == random.Random(derive(5, "meta", "prompts", 2, 0)).sample(many[:50], 50)


def test_what_is_too_old_is_refused() -> None:
    refuse_old([rollout(3), rollout(4, Swap(1, 5))], 0, 2, 4, max_lag=1)
    for version, max_lag in ((2, 1), (3, 0), (5, 1)):
        with pytest.raises(RoleFailed, match=rf"step 2: .* p0 is of policy version {version}, the learner holds version 4, and"):
            refuse_old([rollout(4), rollout(version)], 0, 2, 4, max_lag)


def test_ages_by_hand() -> None:
    assert ages([rollout(4)], 4) == {"policy/tokens": 3.0, "policy/lag": 0.0, "policy/swapped": 0.0}
    mixed = ages([rollout(3), rollout(3, Swap(1, 4))], 4)
    assert mixed == {"policy/tokens": 6.0, "policy/lag": pytest.approx(4 / 6), "policy/swapped": 0.5}


def test_only_fresh_rollouts_prove_a_sync() -> None:
    assert parity_bound(config(), [rollout(3)], 4) is None
    assert parity_bound(config(), [rollout(3, Swap(1, 4))], 4) is None
    assert parity_bound(config(), [rollout(4), rollout(3, Swap(1, 4))], 4) == 1e-4, "the first one is held to it"
    assert parity_bound(config(rollout={"repetition_penalty": 1.1}), [rollout(4)], 4) is None
    assert parity_bound(config(), [rollout(4)], 4) == 1e-4


def test_an_evaluation_names_the_engines_that_disagree_and_numbers_that_are_not_finite() -> None:
    both = [replace(rollout(4), engine=f"rollout-{i}") for i in range(2)]
    sums = [sum(r.sampler_logprobs) for r in both]
    check_likelihoods(1e-4, both, sums, [-1.0, -2.0])
    off = [sums[0], sums[1] + 0.03]
    check_likelihoods(None, both, off, [-1.0, -2.0])
    for policy in (off, [sums[0], math.nan]):
        with pytest.raises(BadNumbers) as found:
            check_likelihoods(1e-4, both, policy, [-1.0, -2.0])
        assert found.value.bad.undo == math.isnan(policy[1])
    with pytest.raises(
        BadNumbers, match=r"log-prob of rollout-1 and the learner's is 0.01 at the evaluation, .*weights are not"
    ) as found:
        check_likelihoods(1e-4, both, off, [-1.0, -2.0])
    assert found.value.bad.engines == ("rollout-1",) and found.value.who == "rollout-1"
    with pytest.raises(BadNumbers, match=r"under the SFT model is -?inf"):
        check_likelihoods(None, both, sums, [-1.0, -math.inf])


def test_settings_that_change_the_distribution_are_named() -> None:
    assert warnings(config()) == []
    (said,) = warnings(config(rollout={"top_k": 50, "repetition_penalty": 1.1}))
    assert said.startswith("rollout.top_k 50, rollout.repetition_penalty 1.1:") and "policy/importance_mean" in said
    (said,) = warnings(config(policy={"max_lag": 2}))
    assert "policy.max_lag is 2" in said and "policy/lag" in said


@pytest.fixture(scope="module")
def machine() -> Iterator[None]:
    """A cluster of this process alone."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_work_that_is_watched(machine: None, tmp_path: Path) -> None:
    spans: list[Span] = []
    wait = Waiter(Console(), tmp_path, 60.0, spans.append)

    @ray.remote(num_cpus=0)
    def work(seconds: float, answer: int | Exception) -> int:
        time.sleep(seconds)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pending(name: str, seconds: float, answer: int | Exception, step: int | None = None) -> Pending[list[int]]:
        return Pending((work.remote(seconds, answer),), (name,), ("",), list, step=step)

    for each in [pending(name, 0.2, 0) for name in "abc"]:  # the processes are there before anything is timed
        assert wait("start", each) == [0]
    wait.begin("round 3", 3)
    wait.step = 7
    early, late = pending("rollout-0", 0.1, 1, 8), pending("rollout-1", 1.5, 2, 8)
    for each in (early, late):
        wait.watch("sample", each)
    assert wait("policy", pending("learner-0", 0.8, 3)) == [3]
    assert (wait("sample", early), wait("sample", late)) == ([1], [2])
    of = {(span.who, span.what): span for span in spans if span.round == 3}
    assert of["rollout-0", "sample"].end < of["learner-0", "policy"].end < of["rollout-1", "sample"].end
    assert {(span.who, span.step) for span in of.values() if span.who != DRIVER} == {
        ("rollout-0", 8), ("rollout-1", 8), ("learner-0", 7),
    }  # fmt: skip
    assert sum(span.who == DRIVER for span in spans if span.round == 3) == 3

    wait.watch("sample", pending("rollout-0", 0.1, RuntimeError("out of memory"), 8))
    words = (
        r"rollout-0 \(role rollout, rank 0\) on node [0-9.]+ failed in round 3, step 8, phase sample: RuntimeError: out of memory"
    )
    with pytest.raises(RoleFailed, match=words):
        wait("policy", pending("learner-0", 5.0, 3))


def test_max_lag_1_is_faster_by_what_the_timeline_predicts(machine: None, tmp_path: Path) -> None:
    row, (_, ahead) = compare(0.35, 0.35, tmp_path)
    assert row["predicted"] == 2.0 and abs(row["difference"]) < 0.15, row
    versions = [span.step for span in ahead if span.what == "sample" and span.who == "rollout-0"]
    assert versions == list(range(8))
