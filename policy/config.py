"""What the policy side of a recipe may say. Defaults are the papers' (Secrets of RLHF I and II)."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.section import Section


class ModelShape(Section):
    """A small Llama-shaped model to train from scratch, where no model directory is given."""

    vocab_size: int = Field(512, ge=16)
    """Entries of the tokenizer; where the tokenizer is given, its own size is used."""
    hidden_size: int = Field(128, ge=16)
    intermediate_size: int = Field(384, ge=16)
    num_layers: int = Field(5, ge=1)
    num_heads: int = Field(4, ge=1)
    context_length: int = Field(128, ge=8)
    """Longest prompt + response, in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 16:
            raise ValueError(
                f"hidden_size / num_heads must be a multiple of 16 (vLLM's attention), got {self.hidden_size} / {self.num_heads}"
            )
        return self


class SFTConfig(Section):
    """The first stage: where the SFT model comes from. All but ``model`` says how to train one from scratch."""

    model: str | None = None
    """A model directory or hub name that is already fine-tuned; null = train one from scratch on the texts."""
    shape: ModelShape = ModelShape()
    """Of the model made from scratch; also what ``plan`` counts while ``model`` is not there."""
    epochs: float = Field(1.0, gt=0)
    lr: float = Field(2e-5, gt=0)
    batch_size: int = Field(32, ge=1)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)


class KLConfig(Section):
    """The token-level KL penalty in the reward."""

    coef: float = Field(0.05, ge=0)
    """Initial coefficient; the penalty of token t is -coef * (log pi - log pi_ref)."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive moves the coefficient toward ``target`` (Ziegler et al. 2019)."""
    target: float = Field(6.0, gt=0)
    """KL per response that the adaptive controller aims at, nats."""
    horizon: int = Field(10_000, ge=1)
    """Rollouts over which the adaptive controller reacts."""


class PolicyConfig(Section):
    """PPO: one round is ``steps_per_round`` times sample, score, update."""

    start: Literal["previous", "sft"] = "previous"
    """Weights the policy starts a round from."""
    reference: Literal["sft", "previous"] = "sft"
    """Model the KL is measured against."""
    critic_start: Literal["reward", "previous"] = "reward"
    """The critic starts a round from r_k and is warmed up, or continues."""
    prompts: str | None = None
    """A prompt data set of its own (path, hub name, or sandbox:DOMAINS); null = the prompts of D."""
    steps_per_round: int = Field(2000, ge=1)
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    epochs: int = Field(1, ge=1)
    """Passes over each rollout batch."""
    minibatch_size: int = Field(32, ge=1)
    """Rollouts per optimizer step; divides prompts_per_step * samples_per_prompt."""
    microbatch_size: int = Field(32, ge=1)
    """Rollouts per backward pass; divides minibatch_size. Changes memory, not the result."""
    lr: float = Field(5e-7, gt=0)
    critic_lr: float = Field(1.5e-6, gt=0)
    critic_warmup_steps: int = Field(1, ge=0)
    """Critic updates on the first rollout batch of a round before the policy moves."""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)
    """PPO's ratio clip."""
    value_clip: float = Field(0.2, gt=0)
    reward_clip: float = Field(0.8, gt=0)
    """Clip of the score after it is normalised by its running mean and std (PPO-max)."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the normalised score of a response that was cut by the token limit."""
    max_grad_norm: float = Field(1.0, gt=0)
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
