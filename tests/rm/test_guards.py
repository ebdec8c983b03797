"""Steps of a reward model's fit whose numbers go wrong: left out, counted, and too many of them end the fit."""

import logging
import math

import pytest
import torch
from torch import Tensor

from rm.config import ContrastiveConfig, MetaConfig, RewardConfig
from rm.model import RewardModel
from rm.records import RewardFit, RewardStep
from rm.resume import Saves
from rm.training import fit_reward_model
from tests.rm.toy import PAD, MakeModel, shifted, toy_pairs
from tokens.guards import BadNumber, GuardsConfig


def guarded(
    model: RewardModel, num_steps: int, meta: bool = False, reward: RewardConfig | None = None, **guards: int
) -> tuple[RewardFit, list[RewardStep]]:
    steps: list[RewardStep] = []
    settings = RewardConfig(lr=3e-3, batch_size=4) if reward is None else reward
    fit = fit_reward_model(
        model, toy_pairs(4 * num_steps), shifted() if meta else None, settings, MetaConfig(eta=0.1, prompts_per_step=4), 5, PAD,
        steps.append, guards=GuardsConfig.model_validate(guards),
    )  # fmt: skip
    return fit, steps


def weights(model: RewardModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spoil_gradients(model: RewardModel, backwards: set[int], value: float) -> list[Tensor]:
    """Make the head's gradient bad in some of the fit's backward passes; the weights at each of these."""
    head = next(p for name, p in model.named_parameters() if name.endswith("score.weight"))
    seen: list[int] = []
    at: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(len(seen))
        if seen[-1] in backwards:
            at.append(weights(model))
            return gradient * value
        return gradient

    head.register_hook(hook)  # type: ignore[no-untyped-call]
    return at


@pytest.mark.parametrize("contrastive", [False, True])
def test_a_bad_gradient_is_left_out_and_changes_no_bit(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, contrastive: bool
) -> None:
    both = ContrastiveConfig(method="swav" if contrastive else "none", num_prototypes=4 if contrastive else None)
    settings = RewardConfig(lr=3e-3, batch_size=4, contrastive=both)
    model = make_model()
    at = spoil_gradients(model, {2}, math.inf)
    after: list[Tensor] = []
    with caplog.at_level(logging.WARNING):
        fit = fit_reward_model(
            model, toy_pairs(20), None, settings, MetaConfig(), 5, PAD, lambda step: after.append(weights(model)),
            guards=GuardsConfig(),
        )  # fmt: skip
    assert fit.num_steps == len(after) == 4
    assert torch.equal(at[0], after[1])  # what the second step left is what the third found, and what it left behind
    moved = [not torch.equal(a, b) for a, b in zip(after, after[1:], strict=False)]
    assert moved == [True, True, True]
    assert "left out: the gradient norm of the preference loss is" in caplog.text
    assert "step 3 of 5 of a reward model's fit, first pair" in caplog.text


def test_the_steps_say_how_many_were_left_out(make_model: MakeModel) -> None:
    model = make_model()
    spoil_gradients(model, {1, 3}, math.nan)
    _, steps = guarded(model, 6)
    assert [(step.step, step.skipped) for step in steps] == [(1, 0), (3, 1), (5, 2), (6, 2)]
    assert steps[-1].as_dict()["reward/skipped"] == 2.0


@pytest.mark.parametrize(("backward", "name"), [(2, "the difference loss J"), (3, "the preference loss L at theta'")])
def test_under_metarm_the_ascent_and_the_descent_are_left_out_alike(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, backward: int, name: str
) -> None:
    model = make_model()
    (bad,) = [spoil_gradients(model, {backward}, math.nan)]  # each step has two backward passes
    fit, steps = guarded(model, 4, meta=True)
    assert [step.step for step in steps] == [1, 3, 4] and fit.num_steps == 3 and len(bad) == 1
    assert f"left out: the gradient norm of {name} is nan at step 2 of 4" in caplog.text
    assert math.isfinite(float(weights(model).norm()))


@pytest.mark.parametrize(
    ("guards", "bad", "where"),
    [
        ({"in_a_row": 2}, {0, 2, 4, 5}, "step 6 of 8 .*; 2 in a row"),
        ({"in_a_round": 3}, {0, 2, 5}, "step 6 .*; 3 since it began"),
    ],
)
def test_too_many_end_the_fit(make_model: MakeModel, guards: dict[str, int], bad: set[int], where: str) -> None:
    model = make_model()
    at = spoil_gradients(model, bad, math.inf)
    with pytest.raises(BadNumber, match=where) as caught:
        guarded(model, 8, **guards)
    assert not caught.value.undo and torch.equal(weights(model), at[-1])


def test_weights_that_break_in_the_midst_of_a_fit_end_it_at_once(make_model: MakeModel) -> None:
    model = make_model()

    def spoil(step: RewardStep) -> None:
        if step.step == 2:
            next(model.parameters()).data[5, 0] = math.nan

    with pytest.raises(BadNumber, match=r"at step 3 of 5 .*the weights themselves are not finite") as caught:
        fit_reward_model(
            model, toy_pairs(20), None, RewardConfig(batch_size=4), MetaConfig(), 5, PAD, spoil, guards=GuardsConfig()
        )
    assert caught.value.undo


def test_a_weight_that_no_pair_reads_is_found_at_the_end(make_model: MakeModel) -> None:
    model = make_model()
    next(model.parameters()).data[3, 0] = math.nan  # the embedding of a token that does not occur
    with pytest.raises(BadNumber, match="norm of the weights is nan at step 2 of 2 of a reward model's fit"):
        guarded(model, 2)


def test_a_fit_without_a_single_step_is_an_error(make_model: MakeModel) -> None:
    model = make_model()
    spoil_gradients(model, {0, 1}, math.nan)
    with pytest.raises(BadNumber, match="number of steps with a finite gradient is 0"):
        guarded(model, 2)


def test_broken_weights_are_not_saved_to_be_gone_on_from(make_model: MakeModel) -> None:
    model, saved = make_model(), list[int]()

    def spoil(step: RewardStep) -> None:
        if step.step == 2:
            next(model.parameters()).data[3, 0] = math.nan  # of a token that does not occur

    with pytest.raises(BadNumber, match="norm of the weights is nan at step 2 of 5"):
        fit_reward_model(
            model, toy_pairs(20), None, RewardConfig(batch_size=4), MetaConfig(), 5, PAD, spoil,
            guards=GuardsConfig(), saves=Saves(1, lambda done, state: saved.append(done)),
        )  # fmt: skip
    assert saved == [1]
