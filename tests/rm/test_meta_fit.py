"""What MetaRM's options do to a whole fit, what a step costs, and what is measured on samples kept back."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rm.batches import Encoded
from rm.config import LoraConfig, MetaConfig, RewardConfig
from rm.lora import add_lora
from rm.records import META_NUMBERS, RewardFit, RewardStep
from rm.shifted import ShiftedSamples
from rm.training import fit_reward_model
from tests.rm.toy import PAD, MakeModel, ascended_on, fit, shifted, toy_pairs, weights
from tokens.ranks import ALONE


def test_what_a_step_costs(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward and one backward pass over k m sequences more than a vanilla step; J at theta' on some of the steps only."""
    rows: list[int] = []
    backward = torch.autograd.backward
    num_backward = 0

    def spy(*args: Any, **kwargs: Any) -> None:
        nonlocal num_backward
        num_backward += 1
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", spy)

    def costs(meta: Sequence[Sequence[Encoded]] | None, **options: Any) -> list[tuple[list[int], int]]:
        """Of each step: sequences of its forward passes, and its backward passes."""
        nonlocal num_backward
        found: list[tuple[list[int], int]] = []
        model = make_model()
        model.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))

        def on_step(step: RewardStep) -> None:
            nonlocal num_backward
            found.append((list(rows), num_backward))
            rows.clear()
            num_backward = 0

        rows.clear()
        num_backward = 0
        meta_config = MetaConfig.model_validate({"eta": 0.1, "prompts_per_step": 4, **options})
        fit_reward_model(model, toy_pairs(8 * 13), meta, RewardConfig(batch_size=8), meta_config, 5, PAD, on_step)
        return found

    meta, pairs, ascent, heldout = shifted(m=9, k=3), 16, 12, 3  # 8 prompts to draw 4 from, and 1 kept back
    assert costs(None) == [([pairs], 1)] * 13
    plain, measured = ([ascent, pairs], 2), ([heldout, ascent, ascent, heldout, pairs], 2)
    first, *steps = costs(meta)
    assert first == ([heldout, *measured[0]], 2)  # the weights that it starts from are measured too
    assert steps == [measured if step in (11, 13) else plain for step in range(2, 14)]
    _, *steps = costs(meta, objective="joint")
    assert steps == [([heldout, ascent, pairs] if step in (11, 13) else [ascent, pairs], 2) for step in range(2, 14)]
    _, *steps = costs(meta, order=2)
    assert steps[0] == ([ascent, pairs, ascent], 2)  # the last is differentiated twice, by torch.autograd.grad


def numbers(result: RewardFit) -> dict[str, float]:
    """The fit's numbers that are there."""
    return {name: value for name, value in result.as_dict().items() if value is not None}


def test_held_out_measurements(make_model: MakeModel) -> None:
    model, meta = make_model("mean"), shifted(m=20)
    start = ShiftedSamples(meta, model, RewardConfig(), 4, 5, PAD, ALONE).measure()
    result, steps = fit(model, toy_pairs(80), meta, eta=0.1, epochs=1)
    end = ShiftedSamples(meta, model, RewardConfig(), 4, 5, PAD, ALONE).measure()
    found = numbers(result)
    assert found.keys() == {"loss", "accuracy", "num_steps", *META_NUMBERS} - {"displacement_deployed"}
    assert (found["J_heldout_start"], found["spread_heldout_start"]) == (start.difference, start.spread)
    assert (found["J_heldout"], found["spread_heldout"]) == (end.difference, end.spread)
    last = steps[-1].as_dict()  # of the last two steps, the tenth alone was measured
    assert "reward/J_heldout" not in steps[-2].as_dict()
    assert found["J_heldout_before"] == last["reward/J_heldout"]
    assert found["J_heldout_after"] == last["reward/J_heldout_ascended"]
    assert found["spread_heldout_before"] == last["reward/spread_heldout"]
    assert found["spread_heldout_after"] == last["reward/spread_heldout_ascended"]
    assert found["J_before"] == last["reward/J"]
    vanilla, _ = fit(make_model("mean"), toy_pairs(8))
    assert all(vanilla.as_dict()[name] is None for name in META_NUMBERS)
    single, _ = fit(make_model("mean"), toy_pairs(8), shifted(m=1), eta=0.1)
    assert single.as_dict()["J_heldout"] is None and single.as_dict()["J_after"] is not None


@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_theta_prime_is_deployed_on_all_of_s_k_that_is_not_kept_back(make_model: MakeModel, direction: str) -> None:
    pairs, meta, eta = toy_pairs(20), shifted(m=12), 0.2
    theta, deployed = make_model("mean"), make_model("mean")
    kept, _ = fit(theta, pairs, meta, eta=eta, direction=direction)
    moved, _ = fit(deployed, pairs, meta, eta=eta, direction=direction, deploy="theta_prime")
    before = weights(theta)
    ShiftedSamples(meta, theta, RewardConfig(), 100, 5, PAD, ALONE).difference(ascended_on(meta)).backward()  # in one part
    gradient = torch.cat([p.grad.reshape(-1) for p in theta.parameters() if p.grad is not None])
    torch.testing.assert_close(weights(deployed), before + (eta if direction == "ascent" else -eta) * gradient, rtol=0, atol=1e-6)
    found = numbers(moved)
    assert found["displacement_deployed"] == pytest.approx(eta * float(gradient.norm()), rel=1e-4)
    assert "displacement_deployed" not in numbers(kept)
    assert (found["J_heldout"] > numbers(kept)["J_heldout"]) == (direction == "ascent")


def test_a_joint_fit_without_weight_is_vanilla_and_with_weight_spreads(make_model: MakeModel) -> None:
    pairs, meta = toy_pairs(40), shifted(m=20)
    models = [make_model("mean") for _ in range(3)]
    fit(models[0], pairs)
    zero, _ = fit(models[1], pairs, meta, objective="joint", joint_coef=0.0)
    joint, steps = fit(models[2], pairs, meta, objective="joint", joint_coef=5.0)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert numbers(joint)["J_heldout"] > numbers(zero)["J_heldout"]
    assert joint.as_dict()["J_after"] is None and joint.as_dict()["J_before"] is not None
    assert "reward/J_ascended" not in steps[0].as_dict() and "reward/J_heldout" in steps[0].as_dict()


def test_every_option_makes_another_model_and_repeats(make_model: MakeModel) -> None:
    pairs, meta = toy_pairs(20), shifted()
    found = []
    for options in (
        {},
        {"order": 2},
        {"direction": "descent"},
        {"direction": "random"},
        {"objective": "joint"},
        {"deploy": "theta_prime"},
    ):
        models = [make_model("mean") for _ in range(2)]
        for model in models:
            fit(model, pairs, meta, eta=0.5, epochs=1, **options)
        assert torch.equal(weights(models[0]), weights(models[1])), options
        found.append(weights(models[0]))
    for i, one in enumerate(found):
        assert all(float((one - other).norm()) > 1e-3 for other in found[i + 1 :])


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, message in [
        ({"objective": "joint", "order": 2}, "knows no theta'"),
        ({"objective": "joint", "direction": "random"}, "knows no theta'"),
        ({"order": 2, "direction": "random"}, "set order to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            MetaConfig.model_validate(options)


def test_metarm_moves_the_adapters_and_the_head_alone(make_model: MakeModel) -> None:
    models = [make_model("mean") for _ in range(2)]
    for model in models:
        add_lora(model, LoraConfig(rank=4))
    frozen = {name: p.detach().clone() for name, p in models[0].named_parameters() if not p.requires_grad}
    assert frozen
    _, steps = fit(models[0], toy_pairs(20), shifted(), eta=0.5)
    fit(models[1], toy_pairs(20))
    assert all(torch.equal(p, frozen[name]) for name, p in models[0].named_parameters() if name in frozen)
    trained = [torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]) for model in models]
    assert float((trained[0] - trained[1]).norm()) > 1e-3
    step = steps[0].meta
    assert step is not None and step.difference_ascended is not None
    assert step.difference_ascended > step.difference
    start = make_model("mean")
    add_lora(start, LoraConfig(rank=4))
    norm = torch.cat([p.detach().reshape(-1) for p in start.parameters() if p.requires_grad]).norm()
    assert step.relative_displacement == pytest.approx(step.displacement / float(norm), rel=1e-5)
