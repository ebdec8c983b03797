"""A person's profile: one small JSON file, which can be deleted.

It holds a name, d numbers and how sure they are, and of which model; the answers that they were fitted to are not in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError

from rm.person import Person
from tokens.errors import UserError
from tokens.section import Section

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Profile:
    """A person, as far as a feature model knows them.

    Args:
        name: theirs, or whatever they want to be called.
        person: weights and covariance.
        model: fingerprint of the feature model, see ``rm.features.fingerprint``.
        num_answers: that the weights were fitted to.
        l2: of the fit.
        towards: what the weights are drawn to where the answers say nothing.
        accuracy: share of answers that weights fitted to the others predict; None where there were too few to say.
    """

    name: str
    person: Person
    model: str
    num_answers: int
    l2: float
    towards: Literal["mean", "zero"]
    accuracy: float | None = None

    @property
    def d(self) -> int:
        """Reward features."""
        return self.person.d

    def text(self) -> str:
        """The file's content."""
        content = _File(
            format=FORMAT,
            name=self.name,
            model=self.model,
            d=self.d,
            num_answers=self.num_answers,
            l2=self.l2,
            towards=self.towards,
            accuracy=self.accuracy,
            weights=self.person.weights.tolist(),
            covariance=self.person.covariance.tolist(),
        )
        return json.dumps(content.model_dump(), indent=1) + "\n"


class _File(Section):
    """The profile as JSON."""

    format: int
    name: str
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    d: int = Field(ge=1)
    num_answers: int = Field(ge=0)
    l2: float = Field(gt=0)
    towards: Literal["mean", "zero"]
    accuracy: float | None = Field(ge=0, le=1)
    weights: list[float]
    covariance: list[list[float]]


def read_profile(path: Path, model: str | None = None, d: int | None = None) -> Profile:
    """Read and check a profile.

    Args:
        path: of the file.
        model: fingerprint of the feature model that it will be used with; None = of any.
        d: that model's; None = any.

    Returns:
        The profile.

    Raises:
        UserError: if it is none, or belongs to another model or has another d.
    """
    remedy = "Write it again with `python -m cluster adapt`"
    try:
        content = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"no profile can be read at {path} ({error.strerror}): name a file that `adapt` wrote") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is no profile: {place}: {first['msg']}. {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is no profile: not JSON ({error}). {remedy}") from error
    if content.format != FORMAT:
        raise UserError(f"{path} is a profile of format {content.format}, expected {FORMAT}. {remedy}")
    if d is not None and content.d != d:
        raise UserError(
            f"{path} is a profile of d = {content.d} and the model has d = {d}: it belongs to another model. {remedy}"
        )
    if model is not None and content.model != model:
        raise UserError(
            f"{path} is a profile of the model {content.model[:12]}, got the model {model[:12]}: weights mean nothing on other "
            f"features. {remedy} and this model"
        )
    lengths = {len(content.weights), len(content.covariance), *map(len, content.covariance)}
    if lengths != {content.d}:
        raise UserError(f"{path} is no whole profile: d is {content.d} and it has {len(content.weights)} weights. {remedy}")
    try:
        person = Person(*(torch.tensor(rows, dtype=torch.float64) for rows in (content.weights, content.covariance)))
    except ValueError as error:
        raise UserError(f"{path} is no profile: {error}. {remedy}") from error
    return Profile(content.name, person, content.model, content.num_answers, content.l2, content.towards, content.accuracy)
