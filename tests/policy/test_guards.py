"""Numbers that go wrong in the learner: found within the step, with nothing left of the batch where nothing was applied."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from policy.config import KLConfig, PolicyConfig
from policy.guards import check_collapse, check_sampler
from policy.ppo import PPO
from policy.rewards import RunningMoments
from tokens.guards import BadNumber, Budget, GuardsConfig
from tokens.records import Rollout

Learner = Callable[[PolicyConfig], PPO]
Sample = Callable[..., list[Rollout]]
State = tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, dict[str, float]]]


def _learner(learner: Learner, **changes: object) -> PPO:
    settings = {"prompts_per_step": 8, "minibatch_size": 4, "microbatch_size": 2, "lr": 1e-3, "critic_lr": 1e-3, "epochs": 2}
    ppo = learner(PolicyConfig.model_validate(settings | {"kl": KLConfig(controller="adaptive", horizon=100)} | changes))
    ppo.guards = GuardsConfig()
    return ppo


def _scores(rollouts: list[Rollout]) -> torch.Tensor:
    """A number for each response that depends on all of its tokens."""
    return torch.tensor([sum(token * (i + 1) for i, token in enumerate(r.response_ids)) / 100 for r in rollouts])


def _state(ppo: PPO) -> State:
    """All that moves: weights, moments of both optimizers, KL controller, reward moments, counters."""
    tensors, values = ppo.state()
    return [p.detach().clone() for p in (*ppo.policy.parameters(), *ppo.critic.parameters())], tensors, values


def _same(one: State, other: State) -> bool:
    weights = all(torch.equal(x, y) for x, y in zip(one[0], other[0], strict=True))
    moments = one[1].keys() == other[1].keys() and all(torch.equal(x, other[1][name]) for name, x in one[1].items())
    return weights and moments and one[2] == other[2]


def _refused(ppo: PPO, rollouts: list[Rollout], scores: torch.Tensor, bound: float | None = None) -> BadNumber:
    with pytest.raises(BadNumber) as caught:
        ppo.update(rollouts, scores, sampler_bound=bound)
    assert all(p.grad is None for p in (*ppo.policy.parameters(), *ppo.critic.parameters()))
    return caught.value


def _infinite_gradients(ppo: PPO, after: int) -> torch.utils.hooks.RemovableHandle:
    """Make a weight's gradient infinite from its ``after``-th on."""
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.inf if calls > after else gradient

    weight = next(iter(ppo.policy.parameters()))
    handle: torch.utils.hooks.RemovableHandle = weight.register_hook(spoil)  # type: ignore[no-untyped-call]
    return handle


def test_a_batch_that_did_nothing_yet_leaves_nothing_behind_and_the_run_goes_on(learner: Learner, sample: Sample) -> None:
    disturbed, other = _learner(learner), _learner(learner)
    for ppo in (disturbed, other):
        ppo.begin_round(1, torch.tensor([0.1, 0.5, 0.9]))
        first = sample(ppo.policy, seed=0)
        ppo.update(first, _scores(first))
    before, rollouts = _state(disturbed), sample(disturbed.policy, seed=1)
    spoilt = _scores(rollouts)
    spoilt[3] = math.nan
    handle = _infinite_gradients(disturbed, after=0)
    for bad, expected in (
        (
            _refused(disturbed, rollouts, _scores(rollouts)),
            "the policy's gradient norm is (nan|inf) at round 1, update 1, minibatch 0",
        ),
        (_refused(disturbed, rollouts, spoilt), "the score of rollout 3 is nan at round 1, update 1, expected a finite number"),
        (_refused(disturbed, rollouts, _scores(rollouts) - 99), r"fall of the mean score .* at most 4 standard deviations"),
        (_refused(disturbed, rollouts, torch.full((8,), 0.4)), "the standard deviation of the batch's scores is 0"),
        (_refused(disturbed, rollouts, _scores(rollouts), 1e-12), "engine's weights are not the learner's"),
    ):
        with pytest.raises(BadNumber, match=expected):
            raise bad
        assert not bad.undo
        assert _same(_state(disturbed), before)
    handle.remove()
    later = sample(other.policy, seed=2)
    assert disturbed.update(later, _scores(later)) == other.update(later, _scores(later))
    assert _same(_state(disturbed), _state(other))


def test_a_gradient_found_after_weights_have_moved_says_so(learner: Learner, sample: Sample) -> None:
    ppo = _learner(learner)
    rollouts = sample(ppo.policy, seed=0)
    _infinite_gradients(ppo, after=2)  # the first minibatch is two microbatches
    before = _state(ppo)
    bad = _refused(ppo, rollouts, _scores(rollouts))
    assert bad.undo and "minibatch 1" in bad.where and bad.what == "the policy's gradient norm"
    now = _state(ppo)
    assert not _same(now, before) and now[2] == before[2]  # the driver puts the weights back; nothing else is left of the batch


@pytest.mark.parametrize("lr", [3.0, 1e12])
def test_an_absurd_learning_rate_is_found_in_the_step_that_it_spoils(learner: Learner, sample: Sample, lr: float) -> None:
    ppo = _learner(learner, lr=lr, epochs=1, minibatch_size=8)
    rollouts = sample(ppo.policy, seed=0)
    bad = _refused(ppo, rollouts, _scores(rollouts))
    assert bad.undo and not bad.earlier
    assert "KL of the policy before an update to that after it" in bad.what and not bad.value <= 2.0
    ppo = _learner(learner, lr=lr, epochs=1, minibatch_size=8)
    ppo.guards = GuardsConfig(update_kl=None)  # experiments without a limit can have none
    if lr < 1e3:
        assert ppo.update(rollouts, _scores(rollouts)).update_kl is None


def test_a_healthy_update_measures_how_far_it_moved_and_changes_no_bit(learner: Learner, sample: Sample) -> None:
    guarded, plain = _learner(learner), _learner(learner)
    plain.guards = GuardsConfig(update_kl=None, collapse=None)
    rollouts = sample(guarded.policy, seed=0)
    row, other = guarded.update(rollouts, _scores(rollouts), sampler_bound=1e-4), plain.update(rollouts, _scores(rollouts))
    assert row.update_kl is not None and 0 < row.update_kl < 0.1
    assert _same(_state(guarded), _state(plain))
    assert row.as_dict().keys() - other.as_dict().keys() == {"policy/update_kl"}


@pytest.mark.parametrize("part", ["policy", "reference", "critic"])
def test_a_broken_weight_has_to_be_put_back(learner: Learner, sample: Sample, part: str) -> None:
    ppo = _learner(learner)
    rollouts = sample(ppo.policy, seed=0)
    with torch.no_grad():
        next(p for n, p in getattr(ppo, part).named_parameters() if "layers.0.mlp" in n)[0, 0] = math.nan
    bad = _refused(ppo, rollouts, _scores(rollouts))
    assert bad.undo and f"sum of the {part}'s" in bad.what


def test_a_broken_moment_is_found_by_the_weights_that_it_breaks(learner: Learner, sample: Sample) -> None:
    ppo = _learner(learner, epochs=1, minibatch_size=8)
    rollouts = sample(ppo.policy, seed=0)
    ppo.update(rollouts, _scores(rollouts))
    unused = next(iter(ppo.policy.parameters()))  # an embedding: no token of the next batch need read the broken row
    ppo.policy_optimizer._adamw.state[unused]["exp_avg"][23, 0] = math.nan
    bad = _refused(ppo, rollouts, _scores(rollouts))
    assert bad.undo and bad.what == "the norm of the weights of policy and critic"


def test_a_warm_up_leaves_nothing_behind_either(learner: Learner, sample: Sample) -> None:
    ppo = _learner(learner)
    rollouts = sample(ppo.policy, seed=0)
    ppo.begin_round(0, torch.tensor([0.0, 1.0]))
    before = _state(ppo)
    hook = ppo.critic.model.get_submodule("score").weight.register_hook(lambda g: g * math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(BadNumber, match=r"critic's gradient norm is nan at round 0, critic warm-up step 0") as caught:
        ppo.warm_up_critic(rollouts, _scores(rollouts), 2)
    assert not caught.value.undo and _same(_state(ppo), before)
    hook.remove()
    assert len(ppo.warm_up_critic(rollouts, _scores(rollouts), 2)) == 2


def test_engines_are_named_by_the_rollouts_that_disagree(learner: Learner, sample: Sample) -> None:
    ppo = _learner(learner)
    rollouts = []
    for i, r in enumerate(sample(ppo.policy, seed=0)):
        told = tuple(x - 0.01 * (i % 3 == 0) for x in r.sampler_logprobs)
        rollouts.append(replace(r, sampler_logprobs=told, engine=f"rollout-{i % 3}"))
    bad = _refused(ppo, rollouts, _scores(rollouts), 1e-3)
    assert bad.engines == ("rollout-0",) and not bad.undo and "rollout-0 and the learner's" in bad.what
    assert bad.value == pytest.approx(0.01, rel=1e-2)
    assert rollouts[0] == replace(rollouts[0], engine="rollout-9")  # who sampled makes it no other rollout


def test_collapse_by_hand(sample: Sample, learner: Learner) -> None:
    rollouts = sample(_learner(learner).policy, seed=0)
    moments = RunningMoments()
    moments.update(torch.tensor([0.0, 2.0]))  # mean 1, std 1
    spread = torch.linspace(-0.5, 0.5, 8)
    for scores, limit in ((spread - 2.9, 4.0), (spread + 50, 4.0), (torch.zeros(8), None), (spread - 99, None)):
        check_collapse(rollouts, scores, moments, limit, "here")
    check_collapse(rollouts, torch.zeros(8), RunningMoments(), 4.0, "here")  # nothing to compare with
    with pytest.raises(
        BadNumber, match=r"fall of the mean score below the scores before is 4\.1 at here, expected at most 4"
    ) as bad:
        check_collapse(rollouts, spread - 3.1, moments, 4.0, "here")
    assert bad.value.earlier
    same = [replace(rollouts[0], prompt=rollout.prompt) for rollout in rollouts]
    with pytest.raises(BadNumber, match="number of different responses among 8 is 1 "):
        check_collapse(same, spread, moments, 4.0, "here")
    check_collapse([rollouts[0]] * 8, torch.zeros(8), moments, 4.0, "here")  # one prompt, whose answer the policy is sure of


def test_a_policy_that_restarts_is_not_measured_by_what_the_one_before_it_sampled(sample: Sample, learner: Learner) -> None:
    ppo = _learner(learner)
    rollouts = sample(ppo.policy, seed=0)
    scores = torch.linspace(-0.5, 0.5, len(rollouts))
    ppo.begin_round(1, scores + 40)  # S_k of a policy that had gained much
    assert "fall of the mean score" in _refused(ppo, rollouts, scores).what
    ppo.begin_round(1, scores + 40, policy=copy.deepcopy(ppo.policy))
    ppo.update(rollouts, scores)
    before = _state(ppo)
    assert "fall of the mean score" in _refused(ppo, rollouts, scores - 40).what, "its own samples are what it is measured by"
    assert _same(before, _state(ppo))


def test_only_rollouts_of_the_newest_weights_tell_of_a_lost_sync(sample: Sample, learner: Learner) -> None:
    rollouts = [
        replace(r, policy_version=4 + (i > 0), engine=f"rollout-{i}")
        for i, r in enumerate(sample(_learner(learner).policy, seed=0))
    ]
    gaps = torch.zeros(len(rollouts))
    gaps[0] = 1.0
    check_sampler(rollouts, gaps, 0.1, "here")
    gaps[1] = 1.0
    with pytest.raises(BadNumber) as caught:
        check_sampler(rollouts, gaps, 0.1, "here")
    assert caught.value.engines == ("rollout-1",)


def test_a_budget_by_hand() -> None:
    budget = Budget.of(GuardsConfig(in_a_row=2, in_a_round=3))
    budget.bad()
    assert not budget.spent()
    budget.good()
    budget.bad()
    assert not budget.spent()
    budget.bad()
    assert budget.spent() == "2 in a row (guards.in_a_row)"
    budget = Budget(9, 2, row=0, count=2)
    assert budget.spent() == "2 since it began (guards.in_a_round)"


def test_the_error_survives_pickling() -> None:
    bad = BadNumber("a loss", math.nan, "small", "step 3", True, True, ("rollout-1",), "why")
    again = pickle.loads(pickle.dumps(bad))  # noqa: S301 (Ray sends errors this way)
    assert str(again) == str(bad) == "a loss is nan at step 3, expected small; why"
    assert (again.undo, again.earlier, again.engines) == (True, True, ("rollout-1",))
    known = bad.found("elsewhere", note="other")
    assert (known.where, known.note, known.undo) == ("step 3", "why", True)
