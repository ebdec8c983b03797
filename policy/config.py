"""What the policy side of a recipe may say. Defaults are the papers' (Secrets of RLHF I and II)."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.config import AdapterConfig
from tokens.paths import PathText
from tokens.section import Section
from tokens.shape import ModelShape


class SFTConfig(Section):
    """The first stage: where the SFT model comes from, and how `sft` (or `run`, from scratch) trains it."""

    model: PathText | None = None
    """A model directory or hub name. `run` takes it as it is, already fine-tuned (by `sft`: STORAGE/sft/NAME); `sft` starts from
    it. null = one made from scratch and trained on the texts."""
    data: PathText | None = None
    """What `sft` trains on, a data set of its own (prompt and completion, messages, or text; a path or hub name); null = the
    texts of the config's data: the chosen responses, or the sandbox's texts. `run` does not read it."""
    shape: ModelShape = ModelShape()
    """Of the model made from scratch; also what ``plan`` counts while ``model`` is not there."""
    epochs: float = Field(1.0, gt=0)
    lr: float = Field(2e-5, gt=0)
    batch_size: int = Field(32, ge=1)
    microbatch_size: int | None = Field(None, ge=1)
    """Texts per backward pass; divides batch_size. Changes memory, not the result; null = the whole batch."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _batches_divide(self) -> "SFTConfig":
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size must divide batch_size ({self.batch_size}), got {self.microbatch_size}")
        return self


class DPOConfig(Section):
    """The outside comparison ``rounds.baseline: dpo``: direct preference optimisation of the SFT model on D, by TRL."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the SFT model."""
    lr: float = Field(5e-7, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step."""
    microbatch_size: int | None = Field(None, ge=1)
    """Pairs per backward pass; divides batch_size. Changes memory, not the result; null = the whole batch."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "DPOConfig":
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size must divide batch_size ({self.batch_size}), got {self.microbatch_size}")
        return self


class KLConfig(Section):
    """The penalty on the policy's distance from the reference. ``coef: 0`` is PPO without one; the distance is still reported."""

    coef: float = Field(0.05, ge=0)
    """Coefficient (the first one, where it is adaptive)."""
    place: Literal["reward", "loss"] = "reward"
    """reward: -coef * estimate is part of each token's reward. loss: +coef * estimate is part of the policy loss."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate of KL (Schulman 2020). In the reward only k1 adds up to the KL of the whole response; in the loss k2
    has the gradient of each token's KL, k3 of a KL the other way round, k1 none."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive moves the coefficient toward ``target`` (Ziegler et al. 2019)."""
    target: float = Field(6.0, gt=0)
    """KL per response that the adaptive controller aims at, nats."""
    horizon: int = Field(10_000, ge=1)
    """Rollouts over which the adaptive controller reacts."""

    @model_validator(mode="after")
    def _penalty_does_something(self) -> "KLConfig":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.place loss with kl.estimator k1: the gradient of log pi - log ref is zero on average, so the policy "
                "would not be held at all; use k2 (its gradient is that of the KL) or k3, or kl.place reward"
            )
        if self.controller == "adaptive" and self.coef == 0:
            raise ValueError(
                "kl.controller adaptive multiplies its coefficient, and kl.coef is 0: it would stay 0; raise kl.coef"
            )
        return self


class PolicyConfig(Section):
    """PPO: one round is ``steps_per_round`` times sample, score, update."""

    start: Literal["previous", "sft"] = "previous"
    """Weights the policy starts a round from."""
    reference: Literal["sft", "previous"] = "sft"
    """Model the KL is measured against."""
    critic_start: Literal["reward", "sft", "previous"] = "reward"
    """The critic starts a round from r_k, or from SFT with a head that says 0, and is warmed up; or it continues."""
    prompts: PathText | None = None
    """A prompt data set of its own (path, hub name, or sandbox:DOMAINS); null = the prompts of D."""
    steps_per_round: int = Field(2000, ge=1)
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    max_lag: int = Field(0, ge=0)
    """Updates by which the weights that sampled a batch may be older than those that learn from it. 0 is on-policy; from 1 on the
    engines sample the next batches while the learner trains."""
    epochs: int = Field(1, ge=1)
    """Passes over each rollout batch."""
    minibatch_size: int = Field(32, ge=1)
    """Rollouts per optimizer step; divides prompts_per_step * samples_per_prompt."""
    microbatch_size: int = Field(32, ge=1)
    """Rollouts per backward pass; divides minibatch_size. Changes memory, not the result."""
    microbatch_tokens: int | None = Field(None, ge=1)
    """Most tokens (prompt and response) per backward pass, in place of microbatch_size; a longer rollout is alone in one. null =
    by microbatch_size. Changes memory, not the result."""
    packing: bool = False
    """Put sequences one after another without padding, each seeing only itself. Changes speed and memory, not the result."""
    lr: float = Field(5e-7, gt=0)
    critic_lr: float = Field(1.5e-6, gt=0)
    critic_warmup_steps: int = Field(1, ge=0)
    """Critic updates on the first rollout batch of a round before the policy moves."""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step's whole batch to mean 0 and variance 1."""
    clip: float = Field(0.2, gt=0)
    """PPO's ratio clip."""
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of a token with a negative advantage at this ratio (Ye et al. 2020); null = no such bound."""
    value_loss: Literal["squared", "huber"] = "squared"
    """Error of the critic: half its square, or Huber's, which grows linearly beyond 1 (in normalised scores)."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move in one update before the loss takes the worse of the two errors; null = no clip."""
    entropy_coef: float = Field(0.0, ge=0)
    """Entropy bonus: -coef * entropy is part of the policy loss, nats per token. The whole distribution's, at the temperature."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of a language-modelling loss on supervised texts beside PPO's (Ouyang et al. 2022, PPO-ptx)."""
    ptx_data: PathText | None = None
    """The texts of it, a data set of its own (as sft.data); null = those that SFT learns from: the chosen responses of D, or the
    sandbox's texts."""
    ptx_batch_size: int = Field(32, ge=1)
    """Texts of it per optimizer step."""
    max_update_kl: float | None = Field(None, gt=0)
    """The update ends before a step at which the policy has moved further than this: mean k3 per token, nats; null = never."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Tokens weigh min(learner's / sampler's probability, cap) in the policy loss, since the engine that drew them is not the
    learner; null = no correction."""
    reward_normalisation: Literal["running", "scale", "none"] = "running"
    """running: (score - mean) / std over the scores seen so far; scale: score / std; none: the score as it is."""
    reward_clip: float | None = Field(0.8, gt=0)
    """Clip of the score after it is normalised (PPO-max); null = no clip."""
    truncated: Literal["score", "lowest", "mask"] = "score"
    """Responses that the token limit cut: scored as they stand, given the lowest score there is (-reward_clip), or not learned
    from."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the normalised score of a response that was cut by the token limit."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken from the normalised score for each token beyond ``length_free``."""
    length_free: int = Field(0, ge=0)
    """Response tokens that cost nothing."""
    max_grad_norm: float = Field(1.0, gt=0)
    lora: AdapterConfig = AdapterConfig()
    """Adapters of policy and critic; the reference is then the policy without them."""
    kl: KLConfig = KLConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> "PolicyConfig":
        batch = self.prompts_per_step * self.samples_per_prompt
        if batch % self.minibatch_size:
            raise ValueError(
                f"minibatch_size must divide the rollouts of a step (prompts_per_step * samples_per_prompt = {batch}), "
                f"got {self.minibatch_size}"
            )
        if self.minibatch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size must divide minibatch_size ({self.minibatch_size}), got {self.microbatch_size}")
        return self

    @model_validator(mode="after")
    def _reference_is_the_base(self) -> "PolicyConfig":
        if self.lora.rank and self.reference == "previous":
            raise ValueError(
                f"policy.lora.rank is {self.lora.rank} and policy.reference previous: with adapters the reference is the policy "
                "without them, which is SFT. Set policy.reference to sft, or policy.lora.rank to 0"
            )
        return self

    @model_validator(mode="after")
    def _options_agree(self) -> "PolicyConfig":
        if self.truncated == "lowest" and self.reward_clip is None:
            raise ValueError("policy.truncated lowest gives -reward_clip, and reward_clip is null: set it, or truncated to score")
        if self.truncated == "mask" and self.missing_eos_penalty:
            raise ValueError(
                f"policy.truncated mask leaves cut responses out, so missing_eos_penalty {self.missing_eos_penalty:g} would do "
                "nothing; set it to 0, or truncated to score"
            )
        if self.ptx_data is not None and not self.ptx_coef:
            raise ValueError(f"policy.ptx_data is {self.ptx_data!r} and ptx_coef 0: it would do nothing; raise ptx_coef")
        if self.length_free and not self.length_penalty:
            raise ValueError(
                f"policy.length_free is {self.length_free} and length_penalty 0: it would do nothing; raise length_penalty"
            )
        return self
