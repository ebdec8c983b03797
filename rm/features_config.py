"""What `features` may be told: reward features, and how the raters' weights on them are learnt and a person's fitted."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.section import Section

Towards = Literal["mean", "zero"]


class FeaturesConfig(Section):
    """Reward features phi(x, y) in R^d, and each rater's weights on them (Capturing Individual Human Preferences with Reward
    Features); ``reward`` says how the backbone is trained."""

    d: int = Field(32, ge=1)
    """Reward features."""
    shared: bool = False
    """One reward for all raters, which adapts to nobody: the baseline; needs ``d`` 1."""
    init: Literal["random", "svd"] = "random"
    """Raters' weights and the projection to begin with: random, or of the singular value decomposition of the matrix of pairs
    and raters."""
    average: Literal["examples", "raters"] = "examples"
    """Every label counts alike, or every rater, however few labels they gave."""
    lr: float = Field(0.01, gt=0)
    """Peak learning rate of the projection and of the raters' weights; the backbone's is ``reward.lr``."""
    weight_decay: float = Field(0.01, ge=0)
    """Of projection and raters' weights, decoupled."""
    l2: float = Field(1.0, gt=0)
    """How strongly a person's weights are drawn to ``towards``: features are scaled so that the raters' own spread means 1."""
    towards: Towards = "mean"
    """Weights that a person is drawn to where the answers say nothing: the mean rater's, or zero."""

    @model_validator(mode="after")
    def _shared_is_one(self) -> "FeaturesConfig":
        if self.shared and self.d != 1:
            raise ValueError(f"shared is true and d is {self.d}: one reward for all raters has one feature. Set d to 1")
        return self
