"""What the reward side of a recipe may say. Defaults are the papers' (MetaRM, section 4.1; Secrets of RLHF II, appendix B)."""

from typing import Literal

from pydantic import Field

from tokens.section import Section

Pooling = Literal["last", "mean"]
Aggregate = Literal["primary", "mean", "worst", "mean_minus_std"]


class RewardConfig(Section):
    """How each round's reward model r_k is trained on the preference pairs D."""

    start: Literal["sft", "previous"] = "sft"
    """Weights that r_k starts from: the SFT model every round (default), or r_{k-1}."""
    pooling: Pooling = "last"
    """Hidden state the score is read from: the last token's (Hugging Face's own), or the mean over the response's tokens."""
    epochs: int = Field(1, ge=1)
    """Passes over D."""
    lr: float = Field(5e-6, gt=0)
    """Learning rate (alpha) of AdamW."""
    batch_size: int = Field(16, ge=1)
    """Preference pairs per optimizer step (n)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay rate of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay rate of the second moment."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's denominator term."""
    microbatch_size: int = Field(32, ge=1)
    """Sequences per forward pass, those of like length together. Changes speed, not the result."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""


class MetaConfig(Section):
    """MetaRM: one gradient ascent on the difference loss of the shifted samples before each preference step (Algorithm 1)."""

    enabled: bool = True
    """False trains a vanilla reward model every round."""
    eta: float = Field(5e-6, ge=0)
    """Ascent step size. The papers' value is for 7B models; choose it so that J measurably rises at theta'."""
    samples_per_prompt: int = Field(5, ge=2)
    """Responses per prompt in S_k (k). One response has no difference to any other."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts of S_k per ascent (m)."""
    num_prompts: int = Field(256, ge=1)
    """Prompts sampled for S_k at the start of a round."""
    prompts: str | None = None
    """A prompt data set of its own (path, hub name, or sandbox:DOMAINS); null = the prompts of D."""


class ScorerConfig(Section):
    """The ensemble that scores rollouts: member 0 is r_k, the others are vanilla models of other seeds."""

    num_members: int = Field(4, ge=1)
    """Members in all (M)."""
    aggregate: Aggregate = "mean_minus_std"
    """How PPO's score is made of the members' normalised scores."""
    std_coef: float = Field(1.0, ge=0)
    """c of mean - c * std (population std)."""
    refresh: Literal["never", "each_round"] = "never"
    """Fit members 1..M-1 once on D, or again every round with MetaRM."""
    min_members: int | None = Field(None, ge=1)
    """Fewest members with finite scores that a score may rest on; null = all of them."""
    batch_size: int = Field(64, ge=1)
    """Sequences per forward pass."""
