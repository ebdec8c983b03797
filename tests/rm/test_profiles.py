"""A person's profile as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rm.person import fit_person
from rm.profiles import Profile, read_profile
from tokens.errors import UserError

MODEL = "ab" * 32


@pytest.fixture
def profile() -> Profile:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return Profile("ann", fit_person(rows, 0.5), MODEL, 12, 0.5, "mean", 0.75)


def test_what_is_written_is_read_to_the_bit(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "ann.json"
    path.write_text(profile.text())
    back = read_profile(path, MODEL, 3)
    assert torch.equal(back.person.weights, profile.person.weights)
    assert torch.equal(back.person.covariance, profile.person.covariance)
    kept = ("name", "model", "num_answers", "l2", "towards", "accuracy")
    assert [vars(back)[key] for key in kept] == [vars(profile)[key] for key in kept]
    assert set(json.loads(path.read_text())) == {*kept, "format", "d", "weights", "covariance"}  # no answer is in it


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"format": 2}, "a profile of format 2, expected 1"),
        ({"model": "x"}, "is no profile: model"),
        ({"weights": [1.0]}, "d is 3 and it has 1 weights"),
        ({"covariance": [[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0]]}, "must be symmetric and positive definite"),
        ({"weights": [1.0, 2.0, "x"]}, "is no profile: weights.2"),
        ({"answers": []}, "is no profile: answers"),
    ],
)
def test_a_damaged_profile(profile: Profile, tmp_path: Path, changed: dict[str, Any], wanted: str) -> None:
    path = tmp_path / "ann.json"
    path.write_text(json.dumps(json.loads(profile.text()) | changed))
    with pytest.raises(UserError, match=f"{wanted}.*cluster adapt"):
        read_profile(path)


def test_a_profile_of_another_model_or_d(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "ann.json"
    path.write_text(profile.text())
    with pytest.raises(UserError, match="a profile of d = 3 and the model has d = 8: it belongs to another model"):
        read_profile(path, MODEL, 8)
    with pytest.raises(UserError, match=r"a profile of the model abababababab, got the model cdcdcdcdcdcd"):
        read_profile(path, "cd" * 32, 3)
    with pytest.raises(UserError, match="no profile can be read"):
        read_profile(tmp_path / "none.json")
    path.write_text("{")
    with pytest.raises(UserError, match="is no profile: not JSON"):
        read_profile(path)
