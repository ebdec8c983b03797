"""One real vLLM engine: versions, parity with transformers after every load, long prompts that the prefix cache holds, seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.config import RolloutConfig
from actors.process import ProcessSetup, engine_environment
from actors.rollout import RolloutEngine, prompt_seed
from actors.transfer import EngineClient, Live, Parcels, lay_out
from sandbox.tokenizer import make_tokenizer
from tokens.logprobs import response_logprobs
from tokens.ranks import ALONE
from tokens.records import Prompt, Rollout, SequenceBatch
from tokens.weights import in_chunks

TEMPERATURE = 0.7
VOCABULARY = 60
LONG = 300
"""Tokens; more than two of the engine's blocks of 128, so that the prefix cache holds some."""


def language_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def parcels(model: LlamaForCausalLM) -> Parcels:
    """The weights in chunks that a layer does not fit into."""
    laid_out = lay_out(ALONE.stream(model), 20_000)
    assert len(laid_out.refs) > 5 and laid_out.num_bytes == sum(x.nbytes for x in model.state_dict().values())
    return laid_out


def prompt(name: str, length: int) -> Prompt:
    return Prompt(name, name, (1, *(4 + i % (VOCABULARY - 4) for i in range(length - 1))))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer([f"w{i}" for i in range(VOCABULARY - 4)]).save_pretrained(directory)
    language_model(0).save_pretrained(directory)
    setup = ProcessSetup("rollout-0", directory / "log", 2, "cpu", "float32", 0, 1, False)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    config = RolloutConfig(temperature=TEMPERATURE, max_new_tokens=24, kv_cache_mib=64)
    environment = {"env_vars": engine_environment(setup, False)}
    yield RolloutEngine.options(num_cpus=1, runtime_env=environment).remote(setup, directory, config, 400)
    ray.shutdown()


def largest_gap(rollouts: list[Rollout], model: LlamaForCausalLM) -> float:
    batch = SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    with torch.no_grad():
        ours = response_logprobs(model, batch, TEMPERATURE)
    theirs = torch.tensor([x for r in rollouts for x in r.sampler_logprobs])
    return float((ours[batch.response_mask] - theirs).abs().max())


def test_an_engine_serves_only_the_version_that_was_loaded(engine: Any) -> None:
    with pytest.raises(RayTaskError, match="holds policy version None, version 0 was asked for"):
        ray.get(engine.sample.remote([prompt("a", 3)], 1, 0, 0))
    ray.get(engine.load.remote(parcels(language_model(0)), 4))
    with pytest.raises(RayTaskError, match="version 5 was asked for"):
        ray.get(engine.sample.remote([prompt("a", 3)], 1, 0, 5))
    assert {r.policy_version for r in ray.get(engine.sample.remote([prompt("a", 3)], 3, 0, 4))} == {4}


def test_after_a_load_long_prompts_are_answered_by_the_new_weights(engine: Any) -> None:
    prompts = [prompt("long", LONG), prompt("short", 5)]
    for version, seed in enumerate((1, 2, 3), start=10):
        model = language_model(seed)
        ray.get(engine.load.remote(parcels(model), version))
        for _ in range(2):  # the second time the prompt comes out of the cache
            rollouts = ray.get(engine.sample.remote(prompts, 4, 7, version))
            assert largest_gap(rollouts, model) < 1e-4
        assert largest_gap(rollouts, language_model(seed + 1)) > 1e-2, "the check can tell weights apart"


def test_a_learner_that_drives_the_four_phases_itself(engine: Any) -> None:
    client, (model, other) = EngineClient([engine], 60.0), (language_model(seed) for seed in (5, 6))
    assert client.num_workers() == [1]
    client.init_weight_transfer_engine({})
    loading = engine.load.remote(Live(), 12)
    client.start_weight_update()
    for chunk in in_chunks(ALONE.stream(model), 20_000):
        client.update_weights({"chunk": chunk})
    client.finish_weight_update()
    assert ray.get(loading) == 12
    long = [prompt("long", LONG)]
    assert largest_gap(ray.get(engine.sample.remote(long, 2, 7, 12)), model) < 1e-4

    loading = engine.load.remote(Live(), 13)
    client.start_weight_update()
    with pytest.raises(RayTaskError, match="no module or parameter named"):
        client.update_weights({"chunk": next(in_chunks([("no.such.weight", torch.zeros(2))], 100))})
    with pytest.raises(RayTaskError, match="no module or parameter named"):
        ray.get(loading)
    with pytest.raises(RayTaskError, match="holds policy version None"):
        ray.get(engine.sample.remote(long, 1, 7, 12))
    ray.get(engine.load.remote(parcels(other), 14))
    assert largest_gap(ray.get(engine.sample.remote(long, 2, 7, 14)), other) < 1e-4, "a broken transfer leaves nothing behind"


def test_more_prompt_tokens_than_one_step_of_the_engine_takes(engine: Any) -> None:
    model = language_model(1)
    ray.get(engine.load.remote(parcels(model), 15))
    rollouts = ray.get(engine.sample.remote([prompt(f"p{i}", 150 + 5 * i) for i in range(24)], 4, 3, 15))
    assert len(rollouts) == 96 and largest_gap(rollouts, model) < 1e-4


def test_what_comes_back(engine: Any) -> None:
    ray.get(engine.load.remote(parcels(language_model(1)), 20))
    prompts = [prompt("a", 4), prompt("b", 4)]
    first, again, other = (ray.get(engine.sample.remote(prompts, 8, seed, 20)) for seed in (0, 0, 1))
    assert first == again and [r.response_ids for r in first] != [r.response_ids for r in other]
    assert [(r.prompt.id, r.sample) for r in first] == [(name, i) for name in "ab" for i in range(8)]
    halves = [{r.response_ids for r in first if r.prompt.id == name} for name in "ab"]
    assert halves[0] != halves[1], "equal prompts of different ids draw from streams of their own"
    for rollout in first:
        assert rollout.finished == (rollout.response_ids[-1] == 2) and (rollout.finished or len(rollout.response_ids) == 24)
        assert len(rollout.text.split()) == sum(i > 3 for i in rollout.response_ids), "the text has no special tokens"


def test_a_prompt_that_comes_twice_in_a_call_is_answered_anew(engine: Any) -> None:
    ray.get(engine.load.remote(parcels(language_model(1)), 25))
    twice = ray.get(engine.sample.remote([prompt("a", 4), prompt("a", 4)], 2, 0, 25))
    assert len({r.response_ids for r in twice}) == 4


def test_a_prompt_longer_than_the_context_fails_the_call_instead_of_being_cut(engine: Any) -> None:
    ray.get(engine.load.remote(parcels(language_model(1)), 30))
    with pytest.raises(RayTaskError, match="400"):
        ray.get(engine.sample.remote([prompt("too long", 450)], 1, 0, 30))


def mixed_logprobs(rollout: Rollout, old: LlamaForCausalLM, new: LlamaForCausalLM) -> list[float]:
    """Log-probs of a response whose weights changed on the way: the new ones go on over the old ones' keys and values."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    cut = len(rollout.prompt.token_ids) - 1 + rollout.swaps[0].token  # the new weights read from this position on
    with torch.no_grad():
        before = old(ids[:, :cut], use_cache=True)
        after = new(ids[:, cut:], past_key_values=before.past_key_values)
    logits = torch.cat([before.logits, after.logits], dim=1)[:, len(rollout.prompt.token_ids) - 1 : -1] / TEMPERATURE
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor([rollout.response_ids])[..., None])
    return list(chosen.flatten().tolist())


def test_weights_that_come_in_the_middle_drop_nothing(engine: Any) -> None:
    old, new = language_model(1), language_model(2)
    ray.get(engine.load.remote(parcels(old), 40))
    prompts = [prompt("long", LONG), *(prompt(f"p{i}", 5 + i) for i in range(40))]
    answer = engine.sample.remote(prompts, 12, 3, 40)
    weights = parcels(new)
    while ray.get(engine.progress.remote()).done < 12 or ray.get(engine.progress.remote()).total != 492:
        assert not ray.wait([answer], timeout=0)[0], "it was faster than the look at its progress"
    assert ray.get(engine.load.remote(weights, 41)) == 41
    assert not ray.wait([answer], timeout=0)[0], "the load did not wait for the requests"
    rollouts = ray.get(answer)
    assert [(r.prompt.id, r.sample) for r in rollouts] == [(p.id, i) for p in prompts for i in range(12)]
    assert {r.policy_version for r in rollouts} == {40}
    assert {swap.version for r in rollouts for swap in r.swaps} == {41}
    whole = [r for r in rollouts if not r.swaps]
    split = [r for r in rollouts if r.swaps and r.swaps[0].token]
    assert len(whole) > 12 and len(split) > 12
    assert largest_gap(whole, old) < 1e-4
    for rollout in split:
        assert rollout.sampler_logprobs == pytest.approx(mixed_logprobs(rollout, old, new), abs=1e-4)
    later = ray.get(engine.sample.remote(prompts, 2, 3, 41))
    assert {(r.policy_version, r.swaps) for r in later} == {(41, ())}
    assert largest_gap(later, new) < 1e-4, "no key or value of the old weights answers a new request"


def test_a_new_request_sees_no_old_prefix_although_the_cache_still_holds_one(engine: Any) -> None:
    old, new = language_model(1), language_model(2)
    ray.get(engine.load.remote(parcels(old), 50))

    laid_out = parcels(new)

    def next_version_unseen(self: Any) -> None:  # as a load in the middle leaves it: the cache is not emptied
        laid_out.into(self.engine, self.line)
        self.engine.llm_engine.set_weight_version("51")
        self.version = 51

    ray.get(engine.sample.remote([prompt("long", LONG)], 2, 0, 50))
    ray.get(engine.__ray_call__.remote(next_version_unseen))
    assert largest_gap(ray.get(engine.sample.remote([prompt("long", LONG)], 2, 0, 51)), new) < 1e-4


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.6}, {"top_k": 5}, {"repetition_penalty": 1.3}, {"min_p": 0.3}, {"top_k": 30, "top_p": 0.7}], ids=str
)
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(engine: Any, setting: dict[str, Any]) -> None:
    model = language_model(1)
    ray.get(engine.load.remote(parcels(model), 60))

    def use(self: Any, config: RolloutConfig) -> RolloutConfig:
        before, self.config = self.config, config
        return before

    config = RolloutConfig(temperature=TEMPERATURE, max_new_tokens=24, kv_cache_mib=64, **setting)
    usual = ray.get(engine.__ray_call__.remote(use, config))
    rollouts = ray.get(engine.sample.remote([prompt("a", 9)], 6, 0, 60))
    ray.get(engine.__ray_call__.remote(use, usual))
    warpers = [
        RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        TemperatureLogitsWarper(TEMPERATURE),
        *([TopKLogitsWarper(config.top_k)] if config.top_k else []),
        *([TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []),
        *([MinPLogitsWarper(config.min_p)] if config.min_p else []),
    ]
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits
        for index, (token, logprob) in enumerate(zip(rollout.response_ids, rollout.sampler_logprobs, strict=True)):
            so_far = ids[:, : len(rollout.prompt.token_ids) + index]
            scores = logits[:, so_far.shape[1] - 1]
            for warper in warpers:
                scores = warper(so_far, scores)
            assert logprob == pytest.approx(float(scores.log_softmax(-1)[0, token]), abs=1e-4)
    assert largest_gap(rollouts, model) > 1e-2, "the whole distribution is another one"
    assert config.reshaped() == tuple(f"rollout.{key} {value:g}" for key, value in sorted(setting.items(), reverse=True))


def test_streams_of_two_prompts_do_not_touch() -> None:
    seeds = [prompt_seed(0, f"p{i}") for i in range(2000)]
    gaps = [b - a for a, b in itertools.pairwise(sorted(seeds))]
    assert min(gaps) > 1000, "the k samples of a prompt take k seeds in a row"
    assert prompt_seed(1, "p0") != seeds[0]


def test_log_of_the_engine_is_a_file(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    ray.get(engine.identity.remote())
    logs = [path for path in Path(tmp_path_factory.getbasetemp()).rglob("log") if path.is_file()]
    assert any("vllm" in path.read_text() for path in logs)
