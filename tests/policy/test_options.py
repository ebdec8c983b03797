"""What PPO can be told beyond its defaults: each option does what it says, and nothing when it is off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from policy.config import KLConfig, PolicyConfig
from policy.critic import Critic
from policy.objective import ptx_batch
from policy.ppo import PPO
from policy.rewards import token_rewards
from tokens.logprobs import response_logprobs, response_logprobs_and_entropy, token_entropy
from tokens.records import Rollout, SequenceBatch

Learner = Callable[..., PPO]
Sample = Callable[..., list[Rollout]]
TEXTS = [((2, 3), (4, 5, 6, 1)), ((7,), (8, 1)), ((9, 10, 11), (12, 13, 1)), ((2,), (14, 15, 16, 17, 1))]


@pytest.fixture
def make(language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic]) -> Learner:
    """A learner with the given settings, one minibatch of 8 and plain gradient steps, so that results compare closely."""

    def build(reference: int = 0, plain: bool = True, **changes: Any) -> PPO:
        settings = {"prompts_per_step": 8, "minibatch_size": 8, "microbatch_size": 8, "lr": 1e-3, "critic_lr": 1e-3}
        config = PolicyConfig.model_validate(settings | changes)
        ppo = PPO(language_model(0), critic(1), language_model(reference), config, 0.8, pad_id=0, seed=3, ptx=TEXTS)
        for optimizer in (ppo.policy_optimizer, ppo.critic_optimizer) if plain else ():
            optimizer._adamw = torch.optim.SGD(optimizer._parameters.values(), lr=0.05)  # type: ignore[assignment]
        return ppo

    return build


def scores_of(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.tensor([float(sum(r.response_ids) % 7) for r in rollouts])


def weights(ppo: PPO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*ppo.policy.parameters(), *ppo.critic.parameters())]


def far(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(one, two, strict=True))


EVERYTHING = {
    "kl": {"coef": 0.3, "place": "loss", "estimator": "k2"}, "entropy_coef": 0.02, "ptx_coef": 0.5, "ptx_batch_size": 4,
    "dual_clip": 3.0, "value_loss": "huber", "value_clip": None, "epochs": 2, "length_penalty": 0.1, "length_free": 2,
}  # fmt: skip


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_with_every_option_on_microbatches_change_nothing(make: Learner, sample: Sample, microbatch: int) -> None:
    results = []
    for size in (8, microbatch):
        ppo = make(reference=5, microbatch_size=size, **EVERYTHING)
        rollouts = sample(ppo.policy, seed=1)
        results.append((ppo.update(rollouts, scores_of(rollouts)).as_dict(), weights(ppo)))
    (whole, these), (parts, those) = results
    assert far(these, those) < 1e-6
    assert parts == pytest.approx(whole, abs=1e-5, rel=1e-4)
    assert {"policy/exact_entropy", "policy/ptx_loss"} <= set(whole)


@pytest.mark.parametrize("option", ["kl", "entropy_coef", "ptx_coef", "dual_clip", "value_loss", "value_clip", "length_penalty"])
def test_each_option_changes_the_update(make: Learner, sample: Sample, option: str) -> None:
    changed = dict(EVERYTHING)
    del changed["epochs"], changed["length_free"]
    given = {option: changed[option]} | ({"dual_clip": 1.01} if option == "dual_clip" else {})
    outcomes = []
    without: dict[str, Any] = {"kl": {"coef": 0.0}} if option == "kl" else {}
    for settings in (without, given):
        ppo = make(reference=5, epochs=6, reward_clip=None, reward_normalisation="none", max_grad_norm=50.0, **settings)
        rollouts = sample(ppo.policy, seed=1)
        ppo.update(rollouts, scores_of(rollouts))
        outcomes.append(weights(ppo))
    assert far(*outcomes) > 1e-5


def test_estimators_in_the_reward_by_hand() -> None:
    mask = torch.tensor([[False, True, True]])
    logprobs, ref = torch.tensor([[9.0, -1.0, -2.0]]), torch.tensor([[0.0, -2.0, -1.5]])
    score = torch.tensor([10.0])
    for estimator, penalties in {
        "k1": (1.0, -0.5),
        "k2": (0.5, 0.125),
        "k3": (0.36787944, 0.14872127),  # e^-1 - 1 + 1, e^.5 - 1 - .5
    }.items():
        rewards = token_rewards(score, logprobs, ref, mask, 0.1, estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.1 * penalties[0], 10 - 0.1 * penalties[1]]]))


def test_the_update_ends_where_the_policy_has_moved_too_far(make: Learner, sample: Sample) -> None:
    settings = {"minibatch_size": 4, "microbatch_size": 4, "epochs": 4, "lr": 3e-3}
    free = make(plain=False, **settings)
    rollouts = sample(free.policy, seed=1)
    whole = free.update(rollouts, scores_of(rollouts)).as_dict()
    assert whole["policy/steps_taken"] == 1.0
    stopped = make(plain=False, max_update_kl=whole["policy/approx_kl"] / 3, **settings)
    seen: list[int] = []
    row = stopped.update(rollouts, scores_of(rollouts), lambda done, total: seen.append(done)).as_dict()
    assert 0 < row["policy/steps_taken"] < 1 and len(seen) == row["policy/steps_taken"] * 8
    assert all(p.grad is None for p in stopped.policy.parameters())
    steps = stopped.policy_optimizer.state()["model.norm.weight/step"]
    assert steps.item() == len(seen)  # the step that was refused left no trace
    unbound = make(plain=False, max_update_kl=100.0, **settings)
    assert unbound.update(rollouts, scores_of(rollouts)).as_dict() == whole
    assert far(weights(unbound), weights(free)) == 0.0


def test_cut_responses_can_be_left_out(make: Learner, sample: Sample) -> None:
    settings = {"reward_normalisation": "none", "reward_clip": 5.0}
    learners = [make(truncated="mask", **settings), make(**settings), make(**settings)]
    rollouts = [replace(r, finished=i % 3 != 1) for i, r in enumerate(sample(learners[0].policy, seed=1))]
    kept = [r for r in rollouts if r.finished]
    assert 0 < len(kept) < len(rollouts)
    rows = [ppo.update(r, scores_of(r)).as_dict() for ppo, r in zip(learners, (rollouts, kept, rollouts), strict=True)]
    masked, alone, all_of_them = (weights(ppo) for ppo in learners)
    assert far(masked, alone) < 1e-6 < 1e-5 < far(masked, all_of_them)
    assert rows[0]["policy/loss"] == pytest.approx(rows[1]["policy/loss"], abs=1e-6)
    assert rows[0]["policy/finished"] == len(kept) / len(rollouts)
    with pytest.raises(ValueError, match="all 8 responses were cut by the token limit"):
        learners[0].update([replace(r, finished=False) for r in rollouts], scores_of(rollouts))


def test_a_minibatch_of_cut_responses_alone_takes_no_step(make: Learner, sample: Sample) -> None:
    ppo = make(truncated="mask", minibatch_size=2, microbatch_size=2, plain=False)
    rollouts = [replace(r, finished=i < 2) for i, r in enumerate(sample(ppo.policy, seed=1))]
    row = ppo.update(rollouts, scores_of(rollouts)).as_dict()
    assert row["policy/steps_taken"] in (0.25, 0.5)  # the two that are left fall into one minibatch or two
    assert len(ppo.warm_up_critic(rollouts, scores_of(rollouts), steps=3)) == 3


def test_ptx_is_the_cross_entropy_of_the_responses(make: Learner, sample: Sample) -> None:
    ppo = make(ptx_coef=0.5, ptx_batch_size=4)
    rollouts = sample(ppo.policy, seed=1)
    expected, number = 0.0, 0
    with torch.no_grad():
        for prompt, response in TEXTS:
            logits = ppo.policy(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            expected += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
            number += len(response)
    row = ppo.update(rollouts, scores_of(rollouts)).as_dict()
    assert row["policy/ptx_loss"] == pytest.approx(expected / number, abs=1e-5)
    for _ in range(30):
        row = ppo.update(rollouts, scores_of(rollouts)).as_dict()
    assert row["policy/ptx_loss"] < expected / number - 0.3
    order = torch.tensor([2, 0, 3, 1])
    first = [ptx_batch(TEXTS, number, 3, order, 0).input_ids[:, 0].tolist() for number in (0, 1)]
    assert first == [[9, 2, 2], [7, 9, 2]]  # 2 0 3 | 1 2 0: pass after pass


def test_entropy_is_the_whole_distributions(make: Learner, sample: Sample) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(token_entropy(logits, 0.7), expected)
    with pytest.raises(ValueError, match="positive"):
        token_entropy(logits, 0.0)
    ppo = make(entropy_coef=0.01)
    rollouts = sample(ppo.policy, seed=1)
    batch = SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    wider = SequenceBatch(
        *(torch.nn.functional.pad(x, (0, 3)) for x in (batch.input_ids, batch.attention_mask, batch.response_mask))
    )
    with torch.no_grad():
        logprobs, entropy = response_logprobs_and_entropy(ppo.policy, batch, 0.8)
        torch.testing.assert_close(logprobs, response_logprobs(ppo.policy, batch, 0.8))
        torch.testing.assert_close(response_logprobs_and_entropy(ppo.policy, wider, 0.8)[1][:, :-3], entropy)
    row = ppo.update(rollouts, scores_of(rollouts)).as_dict()
    assert row["policy/exact_entropy"] == pytest.approx((entropy.sum() / batch.response_mask.sum()).item(), rel=1e-5)
    bold, shy = (make(plain=False, lr=3e-3, entropy_coef=c) for c in (0.3, 0.0))
    for ppo in (bold, shy):
        for _ in range(6):
            ppo.update(rollouts, scores_of(rollouts))
    with torch.no_grad():
        entropies = [response_logprobs_and_entropy(ppo.policy, batch, 0.8)[1].sum().item() for ppo in (bold, shy)]
    assert entropies[0] > entropies[1]


def test_the_gap_between_sampler_and_learner_is_said(make: Learner, sample: Sample) -> None:
    ppo = make()
    rollouts = sample(ppo.policy, seed=1)
    honest = ppo.update(rollouts, scores_of(rollouts)).as_dict()
    assert honest["policy/sampler_gap"] < 1e-5 and honest["policy/sampler_kl"] < 1e-9
    assert honest["policy/importance_mean"] == pytest.approx(1.0, abs=1e-5) and honest["policy/importance_capped"] == 0.0
    ppo = make()
    bent = [
        replace(r, sampler_logprobs=tuple(x - (2.0 if i == 0 else 0.0) for i, x in enumerate(r.sampler_logprobs)))
        for r in rollouts
    ]
    row = ppo.update(bent, scores_of(rollouts)).as_dict()
    tokens = sum(len(r.response_ids) for r in rollouts)
    assert row["policy/sampler_gap"] == pytest.approx(2.0, abs=1e-4)
    assert row["policy/importance_capped"] == pytest.approx(len(rollouts) / tokens)
    assert row["policy/importance_mean"] == pytest.approx((tokens + len(rollouts)) / tokens, abs=1e-4)  # e^2 capped at 2
    assert row["policy/sampler_kl"] == pytest.approx(len(rollouts) * (2.718281828**2 - 3) / tokens, rel=1e-3)


def test_a_critic_from_a_language_model_expects_nothing(
    make: Learner,
    sample: Sample,
    language_model: Callable[[int], LlamaForCausalLM],
    critic: Callable[[int], Critic],
    tmp_path: Path,
) -> None:
    language_model(4).save_pretrained(tmp_path / "sft")
    fresh = Critic.from_language_model(tmp_path / "sft", torch.float32)
    rollouts = sample(language_model(4), seed=1)
    batch = SequenceBatch.from_ids([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    assert not fresh(batch).any()
    ppo = make()
    ppo.begin_round(1, torch.tensor([0.0, 1.0]), critic=fresh)
    losses = ppo.warm_up_critic(rollouts, scores_of(rollouts), steps=8)
    assert losses[-1] < losses[0]
    assert fresh(batch).any()
    fresh.save_pretrained(tmp_path / "critic")
    torch.testing.assert_close(Critic.from_pretrained(tmp_path / "critic", torch.float32)(batch), fresh(batch))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl": {"place": "loss"}}, "zero on average"),
        ({"kl": {"coef": 0.0, "controller": "adaptive"}}, "would stay 0"),
        ({"truncated": "lowest", "reward_clip": None}, "reward_clip is null"),
        ({"truncated": "mask", "missing_eos_penalty": 1.0}, "would do nothing"),
        ({"length_free": 5}, "length_penalty 0"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"importance_cap": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PolicyConfig.model_validate(settings)


def test_ptx_needs_texts(language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic]) -> None:
    config = PolicyConfig(ptx_coef=0.1, kl=KLConfig(coef=0.0))
    with pytest.raises(ValueError, match="no texts"):
        PPO(language_model(0), critic(1), language_model(0), config, 0.8, 0, 0)
