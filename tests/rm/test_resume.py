"""A fit that goes on from a save comes to the same bits, and each piece of its state is needed for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rm.config import LoraConfig, MetaConfig, RewardConfig
from rm.lora import add_lora
from rm.model import RewardModel
from rm.records import RewardFit, RewardStep
from rm.resume import Saves
from rm.training import Watch, fit_reward_model
from tests.rm.toy import PAD, MakeModel, shifted, toy_pairs
from tokens.guards import GuardsConfig
from tokens.saved_state import SavedState, latest_state, save_state


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Told = tuple[dict[str, Tensor], list[RewardStep], RewardFit]
METARM = {"eta": 0.1, "prompts_per_step": 4}
REWARD = {"lr": 3e-3, "batch_size": 8, "epochs": 2, "dropout": 0.1}
SWAV = {"dropout": 0.0, "contrastive": {"method": "swav", "num_prototypes": 4}}


def played(
    model: RewardModel,
    saves: Saves | None,
    meta: dict[str, Any] | None = None,
    reward: dict[str, Any] | None = None,
    watched: list[int] | None = None,
) -> Told:
    """A fit on 40 pairs in 10 steps; measured every 2, the best is the third measurement."""
    steps: list[RewardStep] = []
    seen = [] if watched is None else watched

    def measure(step: int) -> float:
        seen.append(step)
        return {2: 0.5, 4: 0.6, 6: 0.9}.get(step, 0.1)

    fit = fit_reward_model(
        model,
        toy_pairs(40),
        shifted(),
        RewardConfig.model_validate(REWARD | (reward or {})),
        MetaConfig.model_validate(METARM | (meta or {})),
        5,
        PAD,
        steps.append,
        watch=Watch(2, measure, 4),
        guards=GuardsConfig(),
        saves=saves,
    )
    return {name: p.detach().clone() for name, p in model.state_dict().items()}, steps, fit


def same(one: Told, other: Told) -> bool:
    return one[1:] == other[1:] and all(one[0][name].equal(other[0][name]) for name in one[0])


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "metarm": ({}, {}),
    "random direction": ({"direction": "random", "deploy": "theta_prime"}, {}),
    "vanilla": ({"enabled": False}, {}),
    "swav": ({}, SWAV),
}
Undisturbed = Callable[[str], tuple[Told, dict[int, SavedState]]]


@pytest.fixture(scope="module")
def undisturbed(language_model: Path) -> Undisturbed:
    """A fit of a kind that nobody ends, and its state after each step."""

    @cache
    def play(kind: str) -> tuple[Told, dict[int, SavedState]]:
        states: dict[int, SavedState] = {}
        return played(
            RewardModel.from_language_model(language_model, pooling="last", seed=0, dtype=torch.float32),
            Saves(1, states.__setitem__),
            *KINDS[kind],
        ), states

    return play


def resumed(make_model: MakeModel, kind: str, state: SavedState, watched: list[int] | None = None) -> Told:
    return played(make_model(), Saves(50, lambda done, state: None, state), *KINDS[kind], watched)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 8])
def test_a_fit_goes_on_from_a_save_to_the_same_bits(
    kind: str, at: int, undisturbed: Undisturbed, make_model: MakeModel, tmp_path: Path
) -> None:
    whole, states = undisturbed(kind)
    assert list(states) == list(range(1, 10))
    save_state(tmp_path, at, states[at])
    state, measured = latest_state(tmp_path), []
    assert state is not None and same(whole, resumed(make_model, kind, state, measured))
    assert measured == [step for step in (2, 4, 6, 8, 10) if step > at], "what was measured is not measured again"


def test_saving_changes_nothing(undisturbed: Undisturbed, make_model: MakeModel) -> None:
    assert same(undisturbed("metarm")[0], played(make_model(), None))


def test_adapters_go_on_as_well(make_model: MakeModel, tmp_path: Path) -> None:
    def adapted() -> RewardModel:
        model = make_model()
        add_lora(model, LoraConfig(rank=2), seed=3)
        return model

    whole = played(adapted(), Saves(4, lambda done, state: save_state(tmp_path, done, state)), reward={"dropout": 0.0})
    state = latest_state(tmp_path)
    assert state is not None and state.values["done"] == 8
    assert not any("base_layer" in name or "embed" in name for name in state.tensors), "frozen weights are not saved"
    assert same(whole, played(adapted(), Saves(50, lambda done, state: None, state), reward={"dropout": 0.0}))


def without(prefix: str) -> Callable[[SavedState, SavedState], SavedState]:
    """The state with some tensors as they were at an earlier save, or none."""

    def spoil(state: SavedState, earlier: SavedState) -> SavedState:
        touched = {name: earlier.tensors[name] for name in state.tensors if name.startswith(prefix)}
        assert touched, prefix
        return SavedState({**state.tensors, **touched}, state.values)

    return spoil


def value(name: str, other: Any) -> Callable[[SavedState, SavedState], SavedState]:
    def spoil(state: SavedState, earlier: SavedState) -> SavedState:
        assert state.values[name] != other
        return SavedState(state.tensors, {**state.values, name: other})

    return spoil


PIECES: dict[str, tuple[str, Callable[[SavedState, SavedState], SavedState]]] = {
    "weights": ("metarm", without("weights/")),
    "first moments": ("metarm", without("exp_avg/")),
    "second moments": ("metarm", without("exp_avg_sq/")),
    "step counts": ("metarm", without("step/")),
    "dropout masks": ("metarm", without("generator/masks")),
    "random directions": ("random direction", without("generator/directions")),
    "prototypes": ("swav", without("weights/objective/")),
    "prototypes' moments": ("swav", without("exp_avg/objective/")),
    "data cursor": ("metarm", value("done", 6)),
    "steps": ("metarm", value("steps", [])),
    "best weights": ("metarm", without("best/")),
    "best value": ("metarm", value("best_value", 0.05)),
    "best step": ("metarm", value("best_step", 2)),
    "patience": ("metarm", value("since_best", 3)),
}


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_of_the_state_is_needed(piece: str, undisturbed: Undisturbed, make_model: MakeModel) -> None:
    kind, spoil = PIECES[piece]
    whole, states = undisturbed(kind)
    assert not same(whole, resumed(make_model, kind, spoil(states[7], states[4])))


def test_steps_that_were_left_out_are_counted_on(undisturbed: Undisturbed, make_model: MakeModel) -> None:
    state = undisturbed("metarm")[1][5]
    assert state.values["budget"] == [0, 0]
    _, steps, _ = resumed(make_model, "metarm", SavedState(state.tensors, {**state.values, "budget": [1, 2]}))
    assert [step.skipped for step in steps] == [0] * 5 + [2] * 5


def test_saving_every_0_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="every >= 1"):
        Saves(0, lambda done, state: None)
