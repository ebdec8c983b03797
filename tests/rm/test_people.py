"""Rewards of people on one backbone: whose counts, in which units, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rm.people import HEADS, WHO, People, group_reward, in_own_units
from rm.people_config import PeopleConfig
from tokens.errors import UserError


def people(**changes: Any) -> People:
    heads = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    given: dict[str, Any] = {"names": ("ann", "bob", "cleo"), "heads": heads, "counting": (0, 2), "group": "min"}
    return People(**given | changes)


def test_a_group_is_paid_by_mean_minimum_or_quantile() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, -4.0, 1.0]])
    torch.testing.assert_close(group_reward(scores, "mean", None), torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(group_reward(scores, "min", None), torch.tensor([1.0, -4.0]))
    torch.testing.assert_close(group_reward(scores, "quantile", 0.25), torch.tensor([1.5, -2.0]))
    torch.testing.assert_close(group_reward(scores, "quantile", 0.0), group_reward(scores, "min", None))
    with pytest.raises(ValueError, match="got None"):
        group_reward(scores, "quantile", None)
    with pytest.raises(ValueError, match="m >= 1"):
        group_reward(torch.zeros(3, 0), "mean", None)


def test_everybody_has_a_unit_of_their_own_and_only_those_who_count_are_paid() -> None:
    known, features = people(), torch.tensor([[1.0, 5.0], [2.0, 7.0], [4.0, 1.0]])
    raw = known.scores(features)
    torch.testing.assert_close(raw, features @ known.heads.T)
    z = in_own_units(raw, known.moments(raw))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(z[:, 0], -z[:, 2])  # three times as loud, and opposed: weighs no more
    nobody = [""] * 3
    torch.testing.assert_close(known.reward(z, nobody), z[:, [0, 2]].amin(1))
    torch.testing.assert_close(people(counting=(1,), group="mean").reward(z, nobody), z[:, 1])
    flat = torch.tensor([[1.0, 3.0, 2.0], [2.0, 3.0, 4.0]])
    with pytest.raises(UserError, match="the reward of bob does not vary"):
        people(counting=(1,)).moments(flat)
    units = known.moments(flat)  # bob does not count, and stops nobody
    assert (
        units[1] is None
        and in_own_units(flat, units)[:, 1].isnan().all()
        and not known.reward(in_own_units(flat, units), nobody).isnan().any()
    )


def test_each_prompt_may_be_paid_by_its_own_person() -> None:
    known, z = people(group="own"), torch.arange(9.0).reshape(3, 3)
    torch.testing.assert_close(known.reward(z, ["cleo", "ann", "cleo"]), torch.tensor([2.0, 3.0, 8.0]))
    with pytest.raises(UserError, match="a prompt's domain is 'bob', which names none of the 2 members"):
        known.reward(z, ["cleo", "bob", "ann"])


def test_people_come_back_as_they_were_saved(tmp_path: Path) -> None:
    known = people(group="quantile", quantile=0.25, truth="seed 1", num_raters=2)
    known.save(tmp_path)
    again = People.load(tmp_path)
    assert (again.names, again.counting, again.group, again.quantile) == (known.names, (0, 2), "quantile", 0.25)
    assert torch.equal(again.heads, known.heads) and (again.truth, again.num_raters) == ("seed 1", 2)
    (tmp_path / WHO).write_text(json.dumps({"names": ["ann"]}))
    with pytest.raises(UserError, match=f"{WHO} or {HEADS} beside it is damaged"):
        People.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("ann", "bob", "ann")}, "2 names"),
        ({"counting": ()}, "somebody of 3"),
        ({"counting": (3,)}, r"\[3\]"),
        ({"quantile": 0.5}, "'min' and 0.5"),
    ],
)
def test_people_who_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        people(**changes)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"profile": "me.json", "group": "min"}, "people.profile and people.group are set"),
        ({"members": ["ann"]}, "people.members"),
        ({"quantile": 0.2}, "people.quantile is 0.2"),
        ({"group": "quantile"}, "people.quantile is None"),
        ({"mixture": {"ann": -1.0, "bob": 2.0}}, "0 or more"),
        ({"mixture": {"ann": 0.0}}, "do not sum to 0"),
    ],
)
def test_a_config_that_means_nobody_or_two_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PeopleConfig.model_validate(keys)
    assert not PeopleConfig().chosen and PeopleConfig(mixture={"ann": 1.0}).chosen
