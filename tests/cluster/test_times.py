"""Times of the phases, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.memory import Cache, engine_cache
from cluster.model_sizes import ModelSize, model_size, reward_size
from cluster.plan import GIB
from cluster.times import Clock, Lengths, Phase, Speeds, Times, bounded, token_flops
from tests.cluster.command import ROOT

SPEEDS = Speeds("a test's GPU", tflops=1000, bandwidth_tbs=4, link_gbs=50, nvlink_gbs=500, mfu=0.5, scoring_mfu=0.25)
SIZE = ModelSize(1_000_000, 2, 100, 1000, 200, 10, 5, 10, num_embeddings=2)


def clock(*words: str, recipe: str = "hh_7b", **changes: Any) -> Clock:
    config: RunConfig = load_config(ROOT / "configs" / f"{recipe}.yaml", words)
    size = model_size(config)
    cache: Cache = engine_cache(config, size, 141 * GIB)
    usual = Clock(config, size, reward_size(config, size), SPEEDS, Lengths(512, 512), 10_000, cache, frozenset())
    return replace(usual, **changes)


def by_name(times: Times) -> dict[str, Phase]:
    return {phase.name: phase for phase in (*times.step, *times.round)}


def test_flops_of_a_token() -> None:
    products = 1_000_000 - 100_000  # the embedding is looked up
    assert token_flops(SIZE, 50) == 2 * products + 2 * 2 * 100 * 50
    assert token_flops(SIZE.without_head(), 50) == 2 * (products - 100_000) + 2 * 2 * 100 * 50


def test_the_longest_of_the_parts_counts() -> None:
    assert bounded("x", 1.0, memory=2.0, link=3.0) == Phase("x", 3.0, "link")
    assert bounded("x", 2.0, memory=1.0) == Phase("x", 2.0, "compute")


def test_a_step_of_7b() -> None:
    phases = by_name(clock().times())
    policy, critic = (
        2 * 6_607_343_616 + 268_435_456,
        2 * 6_476_271_616 + 268_435_456,
    )  # per token; attention over 512 on the average
    tokens, scoring, training = 128 * 1024, 250e12, 500e12
    assert phases["score"].seconds == pytest.approx(4 * tokens * critic / scoring)
    assert phases["policy: experience"].seconds == pytest.approx(tokens * (2 * policy + critic) / 4 / scoring)
    assert phases["policy: update"].seconds == pytest.approx(4 * tokens * (policy + critic) / 4 / training), (
        "6 N T and 2 once more"
    )
    assert {phases[name].bound for name in ("score", "policy: experience", "policy: update")} == {"compute"}
    prompts = 32 * 512 * (2 * 6_607_343_616 + 134_217_728)
    assert phases["sample: prompts"].seconds == pytest.approx(prompts / scoring), "once for its four samples"
    read = 2 * 6_607_343_616 + 128 * 768 * 524_288
    assert phases["sample: responses"] == Phase("sample: responses", pytest.approx(512 * read / 4e12), "memory")
    assert phases["sync"] == Phase("sync", pytest.approx(2 * 6_738_415_616 / 50e9), "link")


def test_decoding_many_sequences_is_bound_by_compute_and_a_full_cache_by_turns() -> None:
    crowd = clock("--policy.prompts_per_step", "4096", "--data.max_prompt_tokens", "8", "--rollout.max_new_tokens", "8")
    crowd = replace(crowd, lengths=Lengths(8, 8))
    (_, responses) = crowd.sample(4096, 4)
    assert responses.bound == "compute"
    usual = clock()
    small = replace(usual, cache=replace(usual.cache, bytes=64 * 1024 * 524_288))
    (_, at_once), (_, in_turns) = usual.sample(32, 4), small.sample(32, 4)
    weights = 2 * 6_607_343_616
    assert in_turns.seconds - at_once.seconds == pytest.approx(512 * weights / 4e12), "64 of 128 fit: the weights are read twice"


def test_metarm_costs_one_plus_m() -> None:
    with_meta, without = (clock(*words).train_reward().seconds for words in ((), ("--meta.enabled", "false")))
    assert with_meta / without == pytest.approx(1 + 80 / 32)
    critic = 2 * 6_476_271_616 + 268_435_456
    assert without == pytest.approx(625 * 32 * 1024 * 4 * critic / 2 / 500e12)
    members = clock("--scorer.refresh", "each_round").train_reward().seconds
    assert members == pytest.approx(4 * with_meta)
    assert clock("--resources.reward.recompute_activations", "false").train_reward().seconds == pytest.approx(with_meta * 3 / 4)
    one = ("--resources.reward.num_ranks", "1", "--resources.reward.recompute_activations", "false")
    assert clock("--meta.order", "2", *one).train_reward().seconds == pytest.approx(2 * clock(*one).train_reward().seconds)


def test_scorers_share_the_rollouts_out() -> None:
    alone, four = clock().score("score", 258), clock("--resources.scorer.num_ranks", "4").score("score", 258)
    assert four.seconds / alone.seconds == pytest.approx(65 / 258), "the fullest of them has 65"


def test_ranks_on_several_nodes_wait_for_the_link() -> None:
    here = clock(recipe="hh_70b").update(256)
    across = clock(recipe="hh_70b", across=frozenset({"learner"})).update(256)
    assert here.bound == "compute" and across.bound == "link"
    models = 70_553_706_496 + 7_504_924_672
    per_pass = (2 + 2 + 4) * models * 31 / 32  # gathered twice in bfloat16, gradients once in float32
    assert across.seconds == pytest.approx(4 * per_pass / 50e9), "two minibatches of two passes"


def test_adapters_need_no_gradient_of_the_frozen_weights() -> None:
    words = ("--resources.learner.recompute_activations", "false")
    whole, adapted = clock(*words).update(128), clock(*words, "--policy.lora.rank", "8").update(128)
    assert adapted.seconds == pytest.approx(whole.seconds * 4 / 6)


def test_microbatches_by_tokens() -> None:
    across = {"recipe": "hh_70b", "across": frozenset({"learner"})}
    by_size, by_tokens = clock(**across).update(256), clock("--policy.microbatch_tokens", "4100", **across).update(256)
    assert by_tokens.seconds == pytest.approx(by_size.seconds / 2), "four sequences of 1024 tokens at once in place of two"


def test_a_round() -> None:
    usual = clock()
    times = usual.times()
    sampling = sum(phase.seconds for phase in times.step[:2])
    assert times.sampling == sampling and times.synchronous == sum(phase.seconds for phase in times.step)
    assert times.overlapped == max(sampling, times.synchronous - sampling) < times.synchronous
    assert times.per_round == pytest.approx(2000 * times.synchronous + sum(phase.seconds for phase in times.round))
    lagging = clock("--policy.max_lag", "1").times()
    assert lagging.per_round == pytest.approx(2000 * times.overlapped + sum(phase.seconds for phase in times.round))
    assert "critic warm-up" not in by_name(clock("--policy.critic_warmup_steps", "0").times())
    short = replace(usual, lengths=Lengths(512, 100)).times()
    assert short.synchronous < times.synchronous


def test_float32_does_without_tensor_cores() -> None:
    slow = clock("--resources.scorer.dtype", "float32").score("score", 128).seconds
    assert slow / clock().score("score", 128).seconds == pytest.approx(989 / 67)
