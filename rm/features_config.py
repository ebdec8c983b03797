"""What `features` may be told: reward features, and how the raters' weights on them are learnt and a person's fitted."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from tokens.section import Section

Towards = Literal["mean", "zero"]
By = Literal["information", "thompson", "random"]
"""How the next pair to ask a person about is chosen, see ``rm.asking.choose``."""
WAYS: tuple[By, ...] = get_args(By)


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
    lr: float = Field(0.03, gt=0)
    """Peak learning rate of the projection and of the raters' weights; the backbone's is ``reward.lr``."""
    weight_decay: float = Field(0.01, ge=0)
    """Of projection and raters' weights, decoupled."""
    l2: float = Field(1.0, gt=0)
    """How strongly a person's weights are drawn to ``towards``: features are scaled so that the raters' own spread means 1."""
    towards: Towards = "mean"
    """Weights that a person is drawn to where the answers say nothing: the mean rater's, or zero."""

    held_out_raters: int = Field(0, ge=0)
    """Raters whose labels are not trained on: they stand for new people, on whom adaptation is measured."""
    fewest_labels: int = Field(2, ge=1)
    """A rater with fewer is an error, or with ``data.drop_bad`` left out and listed."""
    labels_per_rater: int = Field(100, ge=2)
    """Sandbox: pairs that each user labels, drawn from ``world.num_pairs``; users err as ``world.annotator_beta`` and
    ``world.flip_rate`` say."""
    tests_per_rater: int = Field(100, ge=1)
    """Sandbox: held-out pairs that each user's rewards are measured on, labelled without error."""

    pool: int = Field(500, ge=0)
    """Training pairs at most that are written beside the model, without who preferred what, for `ask` to show; 0 = none."""

    @model_validator(mode="after")
    def _shared_is_one(self) -> "FeaturesConfig":
        if self.shared and self.d != 1:
            raise ValueError(f"shared is true and d is {self.d}: one reward for all raters has one feature. Set d to 1")
        return self
