"""Bytes of a process, part by part, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import Share
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.memory import CHUNK, activations, cache_token_bytes, engine_cache, layer_bytes, learner_parts, logits, reward_parts
from cluster.model_sizes import ModelSize, model_size
from cluster.plan import GIB, bundles
from tests.cluster.command import ROOT, TINY

HH_7B = ROOT / "configs" / "hh_7b.yaml"
SIZE = ModelSize(1_000_000, 2, 100, 1000, 200, 10, 5, 10, num_embeddings=2)
"""A million parameters: 200,100 of them outside its two layers."""
SHARE = Share(num_gpus=1, dtype="bfloat16")


def seven(**changes: Any) -> RunConfig:
    return load_config(HH_7B, [word for key, value in changes.items() for word in (f"--{key.replace('__', '.')}", str(value))])


def of(parts: Any) -> dict[str, int]:
    return {part.name: part.bytes for part in parts}


def test_a_rank_of_the_learner() -> None:
    config = seven(
        resources__learner__recompute_activations="false"
    )  # four ranks, bfloat16, four sequences of 1024 tokens at once
    parts = of(learner_parts(config, SIZE, SIZE.without_head()))
    critic = 1_000_000 - 100_000
    assert (parts["policy weights"], parts["policy gradients"], parts["policy optimizer"]) == (1_000_000, 1_000_000, 2_000_000)
    assert (parts["critic weights"], parts["critic gradients"], parts["critic optimizer"]) == (critic, critic, 2 * critic)
    assert parts["reference"] == 500_000
    layer = (1_000_000 - 200_100) // 2
    assert parts["gathered"] == 2 * (200_100 + 2 * layer) + (2 + 4) * layer
    assert parts["activations"] == 3 * 4096 * 2 * (13 * 100 + 4 * 200), "two layers, and the gradients of one"
    assert parts["logits"] == (2 * 2 + 2 * 4) * 4096 * 1000, "two in bfloat16, two float32 chunks"
    (first, *_) = [b for b in bundles(config, SIZE) if b.role == "learner"]
    assert first.memory == sum(parts.values()) and of(first.parts) == parts
    assert of(learner_parts(seven(policy__reference="previous"), SIZE, SIZE))["reference, SFT"] == 1_000_000


def test_one_process_on_a_gpu_holds_autocasts_copies_and_what_the_step_needs() -> None:
    config = seven(
        resources__learner__num_ranks=1, policy__microbatch_size=1, data__max_prompt_tokens=2, rollout__max_new_tokens=2
    )
    parts = of(learner_parts(config, SIZE, SIZE.without_head()))
    layer = (1_000_000 - 200_100) // 2
    assert parts["bfloat16 copies"] == 2 * (200_100 + layer)
    kept = parts["bfloat16 copies"] + parts["activations"] + parts["logits"]
    assert parts["optimizer's step"] == 4 * 1_000_000 - kept > 0
    on_cpu = of(learner_parts(load_config(TINY), SIZE, SIZE.without_head()))
    assert not {"bfloat16 copies", "gathered", "optimizer's step"} & set(on_cpu)


def test_a_rank_of_the_reward_trainer() -> None:
    parts = of(reward_parts(seven(), SIZE, metarm=True))  # two ranks; S_k's 80 sequences of 1024 tokens are more than the 32 of D
    assert parts["reward model weights"] == 2_000_000 and parts["reward model optimizer"] == 4_000_000
    assert parts["MetaRM's copies"] == 4_000_000
    layer = 2 * (13 * 100 + 4 * 200)
    assert parts["activations"] == 40 * 1024 * 2 * 100 * 2 + 2 * 8 * 1024 * layer
    assert "MetaRM's copies" not in of(reward_parts(seven(), SIZE, metarm=False))
    divided = of(reward_parts(seven(reward__backward_size=4), SIZE, metarm=True))  # of each rank, k samples undivided
    at_once = max(4, seven().meta.samples_per_prompt)
    assert divided["activations"] == at_once * 1024 * 2 * 100 * 2 + 2 * min(8, at_once) * 1024 * layer
    adapters = of(reward_parts(seven(reward__lora__rank=8), SIZE, metarm=False))
    assert adapters["backbone"] == 2_000_000 and adapters["adapter weights"] == 8 * 2 * (4 * 200 + 3 * 300) * 4 // 2


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (Share(), 4 * (11 * 100 + 4 * 200)),
        (SHARE, 2 * (18 * 100 + 4 * 200)),
        (SHARE.model_copy(update={"num_ranks": 2}), 2 * (13 * 100 + 4 * 200)),
    ],
    ids=["float32", "autocast", "gathered"],
)
def test_a_token_in_a_layer(share: Share, expected: int) -> None:
    assert layer_bytes(SIZE, share) == expected


def test_recomputing_keeps_one_value_per_token_and_layer() -> None:
    share = seven().resources.reward  # two ranks, bfloat16, recompute
    kept, layer = (
        6 * 16 * 2 * 100 * 2,
        2 * 2 * 16 * layer_bytes(SIZE, share),
    )  # 12 sequences of 16 tokens over two ranks; two at once
    assert activations(SIZE, share, 12, 16, 2).bytes == kept + layer


def test_a_cache_of_the_llamas() -> None:
    llama2 = model_size(seven())
    assert cache_token_bytes(llama2, "bfloat16", 1) == 2 * 32 * 32 * 128 * 2 == 524_288
    llama3 = model_size(load_config(ROOT / "configs" / "hh_70b.yaml"))
    assert cache_token_bytes(llama3, "bfloat16", 8) == 2 * 80 * 8 * 128 * 2 == 327_680
    assert cache_token_bytes(llama3, "bfloat16", 16) == 2 * 327_680, "eight heads on sixteen GPUs: each is there twice"


def test_an_engines_cache_is_what_is_left() -> None:
    config = seven()
    working = 2 * 16384 * (2 * 4096 + 3 * 11008) + 12 * 1024 * 32000
    cache = engine_cache(config, model_size(config), 80 * GIB)
    assert cache.bytes == int(80 * GIB * 0.9) - 2 * 6_738_415_616 - working
    assert cache.tokens == cache.bytes // 524_288 and cache.sequences == cache.tokens // 1024
    assert cache.samples == 128 and cache.sequence_tokens == 1024
    two = seven(rollout__num_engines=3)
    assert engine_cache(two, model_size(two), 80 * GIB).samples == 11 * 4, "the engine that has most to do"
    assert engine_cache(config, model_size(config), 8 * GIB).sequences == 0
    tiny = load_config(TINY)
    assert engine_cache(tiny, model_size(tiny), 80 * GIB).bytes == tiny.rollout.kv_cache_mib << 20


def test_more_of_anything_needs_more_and_more_ranks_need_less() -> None:
    def learner(**changes: Any) -> int:
        return sum(of(learner_parts(seven(**changes), SIZE, SIZE)).values())

    usual = learner()
    assert learner(policy__microbatch_size=8) > usual < learner(rollout__max_new_tokens=1024)
    assert learner(resources__learner__num_ranks=8) < usual < learner(resources__learner__num_ranks=2)
    assert learner(resources__learner__recompute_activations="false") > usual
    assert learner(policy__entropy_coef=0.1) - usual == 2 * 4096 * 1000
    from tokens.softmax import CHUNK as OTHERS

    assert CHUNK == OTHERS
    assert logits(SIZE, SHARE, 1e6, False).bytes == 4 * 10**9 + 8 * CHUNK
