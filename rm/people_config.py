"""Whose reward counts, where rewards are made of features."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.paths import PathText
from tokens.section import Section

Group = Literal["mean", "min", "quantile"]
Paid = Literal[Group, "own"]


class PeopleConfig(Section):
    """Whose reward pays PPO, or picks among samples, with ``scorer.reward_model: features:DIR``: one of ``profile``, ``mixture``
    and ``group``."""

    profile: PathText | None = None
    """A person's profile, as `adapt` writes it: the reward is theirs."""
    mixture: dict[str, float] = Field({})
    """Raters of the feature model by name, with the weight of each: the reward is <phi, sum_h a_h w_h>, weights a_h divided by
    their sum."""
    group: Paid | None = None
    """The reward is what a group says: the mean of its members' rewards, their minimum, or a quantile of them, each member's in
    standard deviations of their own over the SFT policy's samples; or ``own``: that of the member whom the prompt's column
    ``domain`` names, so that one policy serves them all, told in the prompt's text whom it writes for."""
    members: tuple[str, ...] = ()
    """Of the group: raters by name, and profiles by file (ending in .json); none named = every rater."""
    quantile: float | None = Field(None, ge=0, le=1)
    """Of ``group: quantile``: 0 is the minimum, 0.5 the median. Low ones listen to those who like a response least."""

    @model_validator(mode="after")
    def _one_is_chosen(self) -> "PeopleConfig":
        given = {"profile": self.profile, "mixture": self.mixture, "group": self.group}
        chosen = [name for name, value in given.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"people.{' and people.'.join(chosen)} are set: whose reward counts is said by one of them")
        if self.members and self.group is None:
            raise ValueError("people.members names a group's members and people.group is null: set it to mean, min or quantile")
        if (self.quantile is not None) != (self.group == "quantile"):
            raise ValueError(
                f"people.quantile is {self.quantile} and people.group {self.group}: set both for a quantile, or neither"
            )
        if self.mixture and not (min(self.mixture.values()) >= 0 and sum(self.mixture.values()) > 0):
            raise ValueError(f"people.mixture must have weights of 0 or more that do not sum to 0, got {self.mixture}")
        return self

    @property
    def chosen(self) -> bool:
        """Whether anybody's reward is asked for."""
        return self.profile is not None or bool(self.mixture) or self.group is not None
