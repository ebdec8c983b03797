"""The learner: it learns, its microbatches and padding change nothing, and it goes on from a checkpoint bit by bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from policy.config import KLConfig, PolicyConfig
from policy.critic import Critic
from policy.experience import explained_variance, rollout_batch, shaped_scores
from policy.ppo import PPO
from policy.rewards import RunningMoments
from policy.statistics import sequence_statistics
from tokens.guards import BadNumber
from tokens.records import Rollout

Learner = Callable[[PolicyConfig], PPO]
Sample = Callable[..., list[Rollout]]

WANTED = 7


def _config(**changes: object) -> PolicyConfig:
    settings: dict[str, object] = {
        "prompts_per_step": 8,
        "minibatch_size": 4,
        "microbatch_size": 2,
        "lr": 1e-3,
        "critic_lr": 1e-3,
        "epochs": 2,
    }
    return PolicyConfig.model_validate(settings | changes)


def _scores(rollouts: list[Rollout]) -> torch.Tensor:
    """Share of the wanted token, a score that PPO can raise."""
    return torch.tensor([r.response_ids.count(WANTED) / len(r.response_ids) for r in rollouts])


def _weights(ppo: PPO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*ppo.policy.parameters(), *ppo.critic.parameters())]


def _train(ppo: PPO, sample: Sample, steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(steps):
        rollouts = sample(ppo.policy, seed=step, num_prompts=32)
        rows.append(ppo.update(rollouts, _scores(rollouts)).as_dict())
    return rows


LONG = {"prompts_per_step": 32, "minibatch_size": 16, "microbatch_size": 16, "lr": 3e-3, "critic_lr": 3e-3, "reward_clip": 3.0}


def test_the_score_rises_and_a_large_coefficient_keeps_the_policy_near(learner: Learner, sample: Sample) -> None:
    free = _train(learner(_config(**LONG, kl=KLConfig(coef=0.0))), sample, 15)
    held = _train(learner(_config(**LONG, kl=KLConfig(coef=2.0))), sample, 15)
    assert _mean(free[-3:], "policy/score") > _mean(free[:3], "policy/score") + 0.2
    assert _mean(free[-3:], "policy/kl") > 3.0
    assert _mean(held[-3:], "policy/kl") < _mean(free[-3:], "policy/kl") / 3


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_first_update_before_anything_moved(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config(minibatch_size=8, epochs=1))
    rollouts = sample(ppo.policy, seed=0)
    progress: list[tuple[int, int]] = []
    row = ppo.update(rollouts, _scores(rollouts), lambda done, total: progress.append((done, total))).as_dict()
    assert progress == [(1, 1)]
    assert set(row) >= {
        f"policy/{name}"
        for name in ("score", "reward", "kl", "loss", "value_loss", "clip_fraction", "entropy", "ratio_max", "kl_coef", "length")
    }
    assert row["policy/kl"] == 0.0
    assert row["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert row["policy/clip_fraction"] == 0.0
    assert row["policy/loss"] == pytest.approx(0.0, abs=1e-5)  # minus the mean of whitened advantages
    assert row["policy/sampler_gap"] < 1e-5  # the sampler held the same weights and the same temperature
    lengths = [len(r.response_ids) for r in rollouts]
    entropy = -sum(sum(r.sampler_logprobs) for r in rollouts) / sum(lengths)
    assert row["policy/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert row["policy/length"] == sum(lengths) / len(lengths)
    assert row["policy/score"] == pytest.approx(_scores(rollouts).mean().item())
    assert row["policy/score_std"] == pytest.approx(_scores(rollouts).std(correction=0).item())


@pytest.mark.parametrize("microbatch", [1, 4, 8])
def test_microbatches_change_nothing(learner: Learner, sample: Sample, microbatch: int) -> None:
    results = []
    for size in (2, microbatch):
        ppo = learner(_config(minibatch_size=8, microbatch_size=size))
        rollouts = sample(ppo.policy, seed=1)
        for optimizer in (ppo.policy_optimizer, ppo.critic_optimizer):  # a plain step: Adam's would blow rounding up where g ~ 0
            optimizer._adamw = torch.optim.SGD(optimizer._parameters.values(), lr=0.05)  # type: ignore[assignment]
        row = ppo.update(rollouts, _scores(rollouts)).as_dict()
        results.append((_weights(ppo), row))
    (weights, row), (others, other_row) = results
    assert len({len(r.response_ids) + len(r.prompt.token_ids) for r in rollouts}) > 1
    for x, y in zip(weights, others, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    for name in row:
        assert other_row[name] == pytest.approx(row[name], abs=1e-5, rel=1e-4), name


def test_evaluate_does_not_depend_on_the_microbatch_and_masks_all(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config())
    batch = rollout_batch(sample(ppo.policy, seed=1), 0)
    one, all_at_once = ppo.evaluate(batch, 1), ppo.evaluate(batch, 8)
    for x, y in (
        (one.logprobs, all_at_once.logprobs),
        (one.ref_logprobs, all_at_once.ref_logprobs),
        (one.values, all_at_once.values),
    ):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        assert x.shape == batch.input_ids.shape and not x[~batch.response_mask].any()


def test_an_update_after_save_and_load_is_bit_identical(
    learner: Learner, sample: Sample, language_model: Callable[[int], LlamaForCausalLM], tmp_path: Path
) -> None:
    config = _config(kl=KLConfig(controller="adaptive", horizon=100))
    ppo = learner(config)
    ppo.begin_round(2, torch.tensor([0.0, 0.3, 0.1]))
    for seed in range(2):
        rollouts = sample(ppo.policy, seed=seed)
        ppo.update(rollouts, _scores(rollouts))
    state = ppo.state()
    save_file(state.tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(state.values))
    ppo.policy.save_pretrained(tmp_path / "policy")
    ppo.critic.save_pretrained(tmp_path / "critic")

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    critic = Critic.from_pretrained(tmp_path / "critic", torch.float32)
    fresh = PPO(policy, critic, language_model(0), config, temperature=0.8, pad_id=0, seed=3)
    without_state = PPO(
        AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32),
        Critic.from_pretrained(tmp_path / "critic", torch.float32),
        language_model(0), config, temperature=0.8, pad_id=0, seed=3,
    )  # fmt: skip
    fresh.load_state(load_file(tmp_path / "state.safetensors"), json.loads((tmp_path / "state.json").read_text()))

    rollouts = sample(ppo.policy, seed=9)
    expected = ppo.update(rollouts, _scores(rollouts))
    assert fresh.update(rollouts, _scores(rollouts)) == expected
    assert all(torch.equal(x, y) for x, y in zip(_weights(ppo), _weights(fresh), strict=True))
    assert fresh.kl.coef == ppo.kl.coef != config.kl.coef
    assert fresh.state().values == ppo.state().values
    assert fresh.state().values["counters"] == {"round": 2, "num_updates": 3}
    assert without_state.update(rollouts, _scores(rollouts)) != expected  # the state is needed


def test_state_of_another_model_is_refused(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config())
    rollouts = sample(ppo.policy, seed=0)
    ppo.update(rollouts, _scores(rollouts))
    tensors, values = ppo.state()
    name = "policy/model.norm.weight/exp_avg"
    with pytest.raises(ValueError, match="unknown parameters"):
        learner(_config()).load_state({"policy/nonsense/step": tensors[name]}, values)
    with pytest.raises(ValueError, match="missing tensors"):
        learner(_config()).load_state({k: x for k, x in tensors.items() if k != name}, values)
    with pytest.raises(ValueError, match="shape"):
        learner(_config()).load_state({**tensors, name: torch.zeros(3)}, values)


def test_warm_up_moves_the_critic_alone_and_lowers_its_loss(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config(minibatch_size=8, microbatch_size=4))
    rollouts = sample(ppo.policy, seed=0)
    ppo.begin_round(0, _scores(rollouts))
    policy = [p.detach().clone() for p in ppo.policy.parameters()]
    moments = ppo.moments.state()
    losses = ppo.warm_up_critic(rollouts, _scores(rollouts), steps=12)
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    assert all(torch.equal(x, y) for x, y in zip(policy, ppo.policy.parameters(), strict=True))
    assert ppo.moments.state() == moments and not ppo.policy_optimizer.state()
    assert ppo.warm_up_critic(rollouts, _scores(rollouts), steps=0) == []


def test_begin_round_replaces_what_it_is_given_and_measures_the_scores_anew(
    learner: Learner, sample: Sample, critic: Callable[[int], Critic], language_model: Callable[[int], LlamaForCausalLM]
) -> None:
    ppo = learner(_config(kl=KLConfig(controller="adaptive", horizon=10)))
    rollouts = sample(ppo.policy, seed=0)
    ppo.update(rollouts, _scores(rollouts))
    coef, policy_moments = ppo.kl.coef, ppo.policy_optimizer.state()
    new_critic, new_reference = critic(8), language_model(8)
    ppo.begin_round(1, torch.tensor([5.0, 7.0]), critic=new_critic, reference=new_reference)
    assert ppo.critic is new_critic and not ppo.critic_optimizer.state()
    assert ppo.reference is new_reference and not any(p.requires_grad for p in new_reference.parameters())
    assert (ppo.moments.count, ppo.moments.mean, ppo.moments.std) == (2, 6.0, 1.0)
    assert ppo.kl.coef == coef
    kept = ppo.policy_optimizer.state()
    assert kept and all(torch.equal(kept[name], x) for name, x in policy_moments.items())
    ppo.begin_round(2, torch.tensor([5.0, 7.0]), policy=language_model(9))
    assert not ppo.policy_optimizer.state()
    with pytest.raises(ValueError, match="finite"):
        ppo.begin_round(3, torch.tensor([float("nan")]))
    assert ppo.round == 2


def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config())
    rollouts = sample(ppo.policy, seed=0)
    ppo.begin_round(4, _scores(rollouts))
    with torch.no_grad():
        ppo.critic.model.get_submodule("score").weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    before = [p.detach().clone() for p in ppo.policy.parameters()]
    with pytest.raises(BadNumber, match=r"critic's values is nan at round 4, update 0, expected a finite number") as bad:
        ppo.update(rollouts, _scores(rollouts))
    assert bad.value.undo  # the weights themselves are broken: to leave the batch out does not help
    assert all(torch.equal(x, y) for x, y in zip(before, ppo.policy.parameters(), strict=True))
    assert all(p.grad is None for p in (*ppo.policy.parameters(), *ppo.critic.parameters()))


def test_a_gradient_that_is_not_finite_stops_both_optimizers(learner: Learner, sample: Sample) -> None:
    ppo = learner(_config())
    rollouts = sample(ppo.policy, seed=0)
    bad = ppo.critic.model.get_submodule("score").weight
    bad.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr, operator]
    before = _weights(ppo)
    with pytest.raises(BadNumber, match=r"the critic's gradient norm is (inf|nan) at round 0, update 0, minibatch 0"):
        ppo.update(rollouts, _scores(rollouts))
    assert all(torch.equal(x, y) for x, y in zip(before, _weights(ppo), strict=True))


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(8, 1)])
def test_scores_that_do_not_fit_are_refused(learner: Learner, sample: Sample, scores: torch.Tensor) -> None:
    ppo = learner(_config())
    with pytest.raises(ValueError, match="one score per rollout"):
        ppo.update(sample(ppo.policy, seed=0), scores)


def test_models_that_rest_in_between_change_nothing(
    language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic], sample: Sample
) -> None:
    rows, weights = [], []
    for rests in (False, True):
        ppo = PPO(language_model(0), critic(1), language_model(5), _config(), 0.8, 0, 3, reference_rests=rests)
        row = _train(ppo, sample, 1)
        if rests:
            ppo.move_training_state("cpu")
        rows.append(row + _train(ppo, sample, 1))
        weights.append(_weights(ppo))
    assert rows[0] == rows[1] and all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_only_what_computes_is_there(
    language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic], sample: Sample
) -> None:
    policy, reference = language_model(0).cuda(), language_model(5)  # type: ignore[arg-type]
    ppo = PPO(policy, critic(1).cuda(), reference, _config(), 0.8, 0, 3, reference_rests=True)
    rollouts = sample(language_model(0), seed=0, num_prompts=8)
    for _ in range(2):
        ppo.update(rollouts, _scores(rollouts).cuda())
        assert {p.device.type for p in ppo.reference.parameters()} == {"cpu"}
        ppo.move_training_state("cpu")
        assert {p.device.type for p in ppo.critic.parameters()} == {"cpu"}
        ppo.move_training_state("cuda")
        assert {p.device.type for p in ppo.critic.parameters()} == {"cuda"}


def test_the_policy_cannot_be_its_own_reference(
    language_model: Callable[[int], LlamaForCausalLM], critic: Callable[[int], Critic]
) -> None:
    model = language_model(0)
    with pytest.raises(ValueError, match="model of its own"):
        PPO(model, critic(0), model, _config(), 1.0, 0, 0)


def test_shaped_scores_by_hand() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([0.0, 2.0]))  # mean 1, std 1
    scores, finished = torch.tensor([1.5, 9.0, 1.5]), torch.tensor([True, False, False])
    lengths = torch.tensor([3, 4, 7])
    for expected, changes in (
        ([0.5, 0.3, 0.0], {"missing_eos_penalty": 0.5}),
        ([0.5, 0.8, 0.2], {"length_penalty": 0.1, "length_free": 4}),
        ([0.5, -0.8, -0.8], {"truncated": "lowest"}),
        ([0.5, -1.3, -1.3], {"truncated": "lowest", "missing_eos_penalty": 0.5}),
        ([1.5, 9.0, 1.5], {"reward_normalisation": "none", "reward_clip": None}),
        ([0.8, 0.8, 0.8], {"reward_normalisation": "scale"}),
        ([0.5, 8.0, 0.5], {"reward_clip": None}),
        ([0.5, 0.8, 0.5], {"truncated": "mask"}),  # as they stand; that they count nowhere is the experience's part
    ):
        shaped = shaped_scores(scores, finished, lengths, moments, _config(**changes))
        torch.testing.assert_close(shaped, torch.tensor(expected), atol=1e-6, rtol=0)


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    returns = torch.tensor([[1.0, 3.0, 99.0]])
    assert explained_variance(torch.tensor([[1.0, 3.0, 0.0]]), returns, mask) == 1.0
    assert explained_variance(torch.tensor([[5.0, 5.0, 0.0]]), returns, mask) == 0.0
    assert explained_variance(torch.tensor([[3.0, 1.0, 0.0]]), returns, mask) == -3.0
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0.0


def test_sequence_statistics_equal_one_sequence_at_a_time(
    sample: Sample, language_model: Callable[[int], LlamaForCausalLM]
) -> None:
    policy, sft = language_model(0), language_model(5)
    rollouts = sample(policy, seed=2)
    statistics = sequence_statistics(policy, sft, rollouts, 0, temperature=0.8, microbatch=3)
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        start = len(rollout.prompt.token_ids)
        logprobs = (sft(input_ids=ids).logits[0, start - 1 : -1] / 0.8).log_softmax(-1)
        expected = sum(logprobs[i, token].item() for i, token in enumerate(rollout.response_ids))
        assert statistics.sft_logprob[row].item() == pytest.approx(expected, rel=1e-4)
        assert statistics.policy_logprob[row].item() == pytest.approx(sum(rollout.sampler_logprobs), rel=1e-4)
    assert statistics.num_tokens.tolist() == [len(r.response_ids) for r in rollouts]
    assert statistics.kl() > 0
    total = statistics.sft_logprob.sum() / statistics.num_tokens.sum()
    assert statistics.perplexity() == pytest.approx(torch.exp(-total).item())
    assert sequence_statistics(policy, policy, rollouts, 0, 0.8, 8).kl() == 0.0
