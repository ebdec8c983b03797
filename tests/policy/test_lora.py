"""Adapters on policy and critic: the reference is the policy without them, merged models are the same, runs continue exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from actors.learner_models import AdaptedModels
from policy.config import PolicyConfig
from policy.critic import Critic
from policy.lora import load_adapters
from policy.ppo import PPO
from tokens.config import AdapterConfig
from tokens.errors import UserError
from tokens.logprobs import response_logprobs
from tokens.lora import DEFAULT, merged_stream
from tokens.ranks import ALONE
from tokens.records import Rollout, SequenceBatch

LORA = AdapterConfig(rank=2, alpha=8)
CONFIG = PolicyConfig(
    prompts_per_step=4, samples_per_prompt=3, minibatch_size=6, microbatch_size=3, lr=1e-2, critic_lr=1e-2,
    packing=True, lora=LORA,
)  # fmt: skip
BATCH = SequenceBatch.from_ids([[2, 3], [4, 5, 6]], [[7, 8, 1], [9]], 0)


def models(folder: Path) -> AdaptedModels:
    return AdaptedModels(CONFIG, folder / "sft", torch.float32, ALONE, lambda model: model, lora=LORA, seed=7)


def learner(from_: AdaptedModels, policy: Any, critic: Critic) -> PPO:
    return PPO(policy, critic, from_.sft(policy), CONFIG, temperature=0.8, pad_id=0, seed=3)


@pytest.fixture
def folder(language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic], tmp_path: Path) -> Path:
    language_model(0).save_pretrained(tmp_path / "sft")
    critic(1).save_pretrained(tmp_path / "reward")
    return tmp_path


@pytest.fixture
def batches(language_model: Callable[[int], LlamaForCausalLM], sample: Callable[..., list[Rollout]]) -> list[Any]:
    drawn = [sample(language_model(0), seed, num_prompts=12) for seed in range(2)]
    return [(rollouts, torch.tensor([float(sum(r.response_ids) % 5) for r in rollouts])) for rollouts in drawn]


def test_a_run_with_adapters(folder: Path, batches: list[Any], language_model: Callable[[int], LlamaForCausalLM]) -> None:
    made = models(folder)
    policy = made.policy(folder / "sft")
    ppo = learner(made, policy, made.critic(folder / "reward"))
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert all(".lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert {name for name, p in ppo.critic.model.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        "score.weight"
    }
    first = ppo.update(*batches[0])
    assert first.kl == 0  # fresh adapters change nothing

    sft = language_model(0)
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(ppo.reference, BATCH), response_logprobs(sft, BATCH), rtol=0, atol=1e-5)
        moved = response_logprobs(policy, BATCH)
    assert float((moved - response_logprobs(sft, BATCH)).detach().abs().max()) > 0.01
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)

    made.save(policy, ppo.critic, folder / "round")
    tensors, values = ppo.state()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(folder / "round" / "policy")
    assert {type(plain).__name__} == {"LlamaForCausalLM"} and not any(".lora_" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(response_logprobs(plain, BATCH), moved, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        Critic.from_pretrained(folder / "round" / "critic", torch.float32)(BATCH), ppo.critic(BATCH), rtol=0, atol=1e-4
    )
    whole = dict(made.stream(policy))
    assert set(whole) == set(plain.state_dict())
    streamed = dict(merged_stream(policy, DEFAULT, reversed(list(policy.state_dict().items()))))
    for name, x in plain.state_dict().items():
        assert torch.equal(whole[name], x) and torch.equal(streamed[name], x)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())  # merging left them alone
    assert str(folder) not in "".join(p.read_text() for p in (folder / "round").rglob("*.json"))

    again = models(folder)
    resumed = learner(again, again.policy(folder / "round"), again.saved_critic(folder / "round", folder / "reward"))
    resumed.load_state(tensors, values)
    assert ppo.update(*batches[1]) == resumed.update(*batches[1])
    for left, right in ((ppo.policy, resumed.policy), (ppo.critic, resumed.critic)):
        for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_adapters_of_other_weights_are_refused(
    folder: Path, batches: list[Any], language_model: Callable[[int], LlamaForCausalLM]
) -> None:
    made = models(folder)
    policy = made.policy(folder / "sft")
    made.save(policy, made.critic(folder / "reward"), folder / "round")
    with pytest.raises(UserError, match="no adapters at"):
        load_adapters(policy, folder / "sft")
    language_model(9).save_pretrained(folder / "sft")
    with pytest.raises(UserError, match="trained on other weights"):
        models(folder).policy(folder / "round")


def test_a_reference_that_moves_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"policy\.lora\.rank is 2 and policy\.reference previous"):
        PolicyConfig(lora=LORA, reference="previous")
