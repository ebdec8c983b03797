"""What the reward side of a recipe may say. Defaults are the papers' (MetaRM, section 4.1; Secrets of RLHF II, appendix B)."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.config import AdapterConfig
from tokens.paths import PathText
from tokens.section import Section
from tokens.shape import ModelShape

Pooling = Literal["last", "before_last", "eos", "mean", "max"]
Aggregate = Literal["primary", "mean", "worst", "mean_minus_std"]
Order = Literal[1, 2]
Direction = Literal["ascent", "descent", "random"]
MemberKind = Literal["full", "lora", "heads"]
HELDOUT_SHARE = 0.1
"""Of S_k's prompts, no ascent of MetaRM sees this share (at least one prompt, where there are two): J is measured there."""
ORIGINAL = "original"
"""The set of all held-out pairs with the labels that they were given: early stopping goes by it."""


class LoraConfig(AdapterConfig):
    """Low-rank adapters on the backbone instead of training all of it (peft); the head is trained whole."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""


class ContrastiveConfig(Section):
    """A contrastive loss beside the preference loss, over two dropout views (Secrets of RLHF II, section 3.1)."""

    method: Literal["none", "simcse", "swav"] = "none"
    on: Literal["pairs", "differences"] = "pairs"
    """What is contrasted: the features of chosen and of rejected, or the difference of the two."""
    beta: float | None = Field(None, gt=0)
    """Weight beside the preference loss; null = the paper's: 1 for simcse, 0.1 for swav on pairs, 0.5 on differences."""
    temperature: float | None = Field(None, gt=0)
    """tau; null = 0.05 for simcse, 0.1 for swav (those methods' own; the paper gives none)."""
    dropout: float = Field(0.05, gt=0, lt=1)
    """Dropout that makes the two views differ."""
    num_prototypes: int | None = Field(None, ge=2)
    """K of swav; null = the paper's: 50 on pairs, 20 on differences."""
    epsilon: float = Field(0.05, gt=0)
    """Entropy regularisation of Sinkhorn."""
    sinkhorn_iterations: int = Field(3, ge=1)


class RewardConfig(Section):
    """How each round's reward model r_k is trained on the preference pairs D."""

    start: Literal["sft", "previous"] = "sft"
    """Weights that r_k starts from: the SFT model every round (default), or r_{k-1}."""
    base: PathText | None = None
    """A model directory to start from instead of the SFT model: a language model, an encoder, or a reward model (TRL's too).
    `reward` and `strength` take any; `run` needs one with the policy's tokenizer."""
    shape: ModelShape | None = None
    """What `plan` counts while the directory ``base`` is not there; null = the policy's shape."""
    pooling: Pooling = "last"
    """Hidden state the score is read from: the last token's (Hugging Face's own), that of the token before it, the first EOS's
    of the response, or the mean or the elementwise maximum over the response's tokens."""
    lora: LoraConfig = LoraConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the backbone while it is trained."""
    packing: bool = False
    """Put sequences one after another into rows without padding, each seeing only itself."""
    evaluate_every: int | None = Field(None, ge=1)
    """Measure on the validation pairs every so many steps; null = about ten times over the fit in `reward` and `study`, never in
    the midst of a fit in `run`."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many measurements without a better validation accuracy, and keep the best weights; null = never. `run` needs
    ``evaluate_every`` with it."""
    stop_on: Literal["original", "relabelled", "agreement"] = "original"
    """Validation set whose accuracy ``patience`` goes by: the labels as given, a second labeller's, or the pairs where both
    agree."""
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
    backward_size: int | None = Field(None, ge=2)
    """Sequences of a step whose activations are held at one time: gradients of such parts are added up, like lengths together, a
    pair or a prompt's k samples undivided. null = all of a step. Changes memory and speed, and under dropout, whose masks every
    part draws anew, the result."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""

    @model_validator(mode="after")
    def _one_backward_pass(self) -> "RewardConfig":
        if self.backward_size is not None and self.contrastive.method != "none":
            raise ValueError(
                f"backward_size is {self.backward_size}, and contrastive.method {self.contrastive.method} compares all rows of a "
                "step with each other: leave backward_size null, or lower batch_size"
            )
        return self

    @model_validator(mode="after")
    def _shape_is_of_the_base(self) -> "RewardConfig":
        if self.shape is not None and self.base is None:
            raise ValueError(
                "shape says how large reward.base is, and base is null: reward models start from the SFT model, whose shape is "
                "sft.shape. Set base, or leave shape out"
            )
        return self

    @model_validator(mode="after")
    def _stopping_needs_patience(self) -> "RewardConfig":
        if self.stop_on != "original" and self.patience is None:
            raise ValueError(
                f"stop_on is {self.stop_on} and patience null: no fit stops early. Set patience, or stop_on to original"
            )
        return self


class MetaConfig(Section):
    """MetaRM: one gradient ascent on the difference loss of the shifted samples before each preference step (Algorithm 1)."""

    enabled: bool = True
    """False trains a vanilla reward model every round."""
    eta: float = Field(5e-6, ge=0)
    """Ascent step size. The papers' value is for 7B models; choose it so that J measurably rises at theta'."""
    order: Order = 1
    """1 = Algorithm 1, which drops what is differentiated through theta'; 2 keeps it (small models, one rank, no
    resources.reward.recompute_activations)."""
    deploy: Literal["theta", "theta_prime"] = "theta"
    """Weights that are kept at the end: theta (Algorithm 1), or theta' = theta + eta grad J on all of S_k."""
    objective: Literal["meta", "joint"] = "meta"
    """meta = Algorithm 1; joint descends L - joint_coef * J instead, at theta."""
    joint_coef: float = Field(1.0, ge=0)
    """lambda of the joint objective."""
    direction: Direction = "ascent"
    """Where theta' lies from theta: along grad J, against it, or in a random direction of equal length (controls)."""
    samples_per_prompt: int = Field(5, ge=2)
    """Responses per prompt in S_k (k). One response has no difference to any other."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts of S_k per ascent (m)."""
    num_prompts: int = Field(256, ge=1)
    """Prompts sampled for S_k at the start of a round."""
    prompts: PathText | None = None
    """A prompt data set of its own (path, hub name, or sandbox:DOMAINS); null = the prompts of D."""
    samples: PathText | None = None
    """Recorded S_k for `reward`: the meta_rollouts.parquet of a run's round (RUN/rounds/round_NNN, see docs/run_directory.md).
    `reward` then trains by MetaRM, and a vanilla twin to compare with; null = it trains a vanilla model. `run` samples its
    own S_k."""

    @model_validator(mode="after")
    def _options_agree(self) -> "MetaConfig":
        if self.objective == "joint" and (self.order != 1 or self.direction != "ascent" or self.deploy != "theta"):
            raise ValueError(
                f"objective joint differentiates at theta and knows no theta': got order {self.order}, direction "
                f"{self.direction}, deploy {self.deploy}. Leave them at their defaults, or set objective to meta"
            )
        if self.order == 2 and self.direction == "random":
            raise ValueError("order 2 differentiates through the ascent, and a random direction has none: set order to 1")
        return self


class StrengthConfig(Section):
    """Preference strength: M reward models trained on the same pairs, which then vote on each of them (section 2.2)."""

    num_members: int = Field(10, ge=1)
    """Members (M)."""
    members: MemberKind = "full"
    """full = M whole models (the paper's); lora = M adapters on one frozen backbone; heads = M heads on one backbone that is
    trained once."""
    folds: int = Field(1, ge=1)
    """1 = members score the pairs they were trained on (as in the paper); K >= 2 = each pair is scored by members trained on the
    K - 1 parts that do not hold its prompt."""
    lora_rank: int = Field(8, ge=1)
    """Rank of the adapters of ``lora`` members."""
    lora_lr: float | None = Field(None, gt=0)
    """Learning rate of ``lora`` members; null = ten times reward.lr, since adapters learn more slowly than whole weights."""
    batch_size: int = Field(64, ge=1)
    """Sequences per forward pass when scoring."""
    num_workers: int = Field(1, ge=1)
    """Scoring processes (Ray Data's actor pool)."""
    rows_per_block: int = Field(1024, ge=1)
    """Pairs that are scored, written and committed together."""


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
    """Fewest members with finite scores that a score may rest on; null = all of them, but for the few scores that
    ``guards.bad_scores`` lets go."""
    reward_model: str | None = Field(None, pattern=r"^(domains?|general|features):.+")
    """A reward model that is taken as it is, in every round: domain:NAME pays PPO by what `customize` made for a domain (NAME is
    DOMAIN, RUN/DOMAIN or RUN/STRATEGY/DOMAIN); domains:RUN or domains:RUN/STRATEGY by the adapter of each prompt's own domain;
    general:RUN by what `generalize` made; features:DIRECTORY by the reward of people on the feature model there, see ``people``;
    null = reward models that are trained here."""
    batch_size: int = Field(64, ge=1)
    """Sequences per forward pass."""
