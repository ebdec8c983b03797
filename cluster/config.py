"""The whole config of a run, and what must hold between its sections."""

import re

from pydantic import Field, field_validator, model_validator

from actors.config import ResourcesConfig, RolloutConfig
from evaluation.config import EvaluationConfig
from policy.config import PolicyConfig, SFTConfig
from preferences.config import DataConfig
from rm.config import MetaConfig, RewardConfig, ScorerConfig, StrengthConfig
from sandbox.config import WorldConfig
from tokens.errors import UserError
from tokens.section import Section


class RoundsConfig(Section):
    """How many times the theme returns."""

    num_rounds: int = Field(3, ge=1, le=1000)


class RunConfig(Section):
    """A run of iterated RLHF: sample, MetaRM, PPO, evaluate, commit, and again."""

    name: str
    """Name of the run; its directory is STORAGE/runs/NAME."""
    seed: int = Field(0, ge=0)
    """Every random number of the run follows from it, the sandbox's world apart (``world.seed``)."""
    storage: str | None = None
    """Directory that holds runs and caches; null = the environment's RONDO_STORAGE, else ~/rondo."""
    rounds: RoundsConfig = RoundsConfig()
    world: WorldConfig = WorldConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    meta: MetaConfig = MetaConfig()
    scorer: ScorerConfig = ScorerConfig()
    strength: StrengthConfig = StrengthConfig()
    rollout: RolloutConfig = RolloutConfig()
    policy: PolicyConfig = PolicyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(f"a run's name has letters, digits, '.', '_' and '-' only, 64 at most, got {name!r}")
        return name

    @model_validator(mode="after")
    def _reward_models_can_be_trained(self) -> "RunConfig":
        reward, data, num_ranks = self.reward, self.data, self.resources.reward.num_ranks
        if reward.contrastive.method != "none":
            from rm.contrastive_term import check_contrastive

            check_contrastive(reward, reward.batch_size, num_ranks)
        measured = {"evaluate_every": reward.evaluate_every, "patience": reward.patience}
        asked = ", ".join(f"reward.{key} is {value}" for key, value in measured.items() if value is not None)
        if asked and data.preferences != "sandbox" and data.validation is None and data.validation_fraction == 0:
            raise ValueError(
                f"{asked}, data.validation_fraction 0 and data.validation null: no pair is held out to measure on; raise "
                "data.validation_fraction, name a data.validation, or set reward.evaluate_every and reward.patience to null"
            )
        if reward.stop_on != "original" and data.preferences == "sandbox":
            raise ValueError(
                f"reward.stop_on is {reward.stop_on}, and no second labeller has seen the sandbox's pairs: set it to original, "
                "or data.preferences to what `python -m cluster relabel sandbox:CONFIG` writes"
            )
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> "RunConfig":
        data = self.data
        if data.validation is not None and self.policy.prompts is None:
            usual: float = type(data).model_fields["validation_fraction"].default
            if data.validation_fraction not in (0, usual):
                raise ValueError(
                    f"data.validation is {data.validation!r} and data.validation_fraction {data.validation_fraction:g}: the "
                    "pairs are held out by one of the two; leave data.validation_fraction out, or set data.validation to null"
                )
        return self

    @model_validator(mode="after")
    def _metarm_can_run(self) -> "RunConfig":
        meta, num_ranks = self.meta, self.resources.reward.num_ranks
        if not meta.enabled:
            for key, given, wanted in (("deploy", meta.deploy, "theta"), ("samples", meta.samples, None)):
                if given != wanted:
                    raise ValueError(
                        f"meta.{key} is {given!r} and meta.enabled false: nothing is displaced without MetaRM; set it to true"
                    )
            return self
        if meta.order == 2 and num_ranks > 1:
            raise ValueError(
                f"meta.order 2 differentiates twice and needs the whole model in one process, resources.reward.num_ranks is "
                f"{num_ranks}; set meta.order or num_ranks to 1"
            )
        if meta.order == 2 and self.resources.reward.recompute_activations:
            raise ValueError(
                "meta.order 2 differentiates twice, and activations can be recomputed for one backward pass only: got "
                "resources.reward.recompute_activations true; set it to false, or meta.order to 1"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        if self.meta.enabled and self.meta.prompts_per_step > self.meta.num_prompts:
            raise ValueError(
                f"meta.prompts_per_step ({self.meta.prompts_per_step}) is larger than meta.num_prompts ({self.meta.num_prompts})"
            )
        if self.scorer.aggregate == "mean_minus_std" and self.scorer.num_members < 2:
            raise ValueError("scorer.aggregate mean_minus_std needs scorer.num_members of 2 or more: one member has no spread")
        if self.scorer.min_members is not None and self.scorer.min_members > self.scorer.num_members:
            raise ValueError(
                f"scorer.min_members ({self.scorer.min_members}) is larger than scorer.num_members ({self.scorer.num_members})"
            )
        if self.policy.minibatch_size % self.resources.learner.num_ranks:
            raise ValueError(
                f"policy.minibatch_size ({self.policy.minibatch_size}) is not a multiple of resources.learner.num_ranks "
                f"({self.resources.learner.num_ranks}): every rank takes as many rollouts of a minibatch as the others"
            )
        written = self.world.max_response_tokens + 1
        if self.data.preferences == "sandbox" and written > self.data.max_response_tokens:
            raise ValueError(
                f"world.max_response_tokens and its EOS make {written} tokens, "
                f"data.max_response_tokens is {self.data.max_response_tokens}"
            )
        if self.sft.model is None and (self.reward.base is None or self.data.preferences == "sandbox"):
            self.refuse_short_context()
        return self

    @model_validator(mode="after")
    def _engines_have_their_gpus(self) -> "RunConfig":
        parallel, gpus = self.rollout.tensor_parallel, self.resources.rollout.num_gpus
        if parallel > 1 and gpus == 0:
            raise ValueError(
                f"rollout.tensor_parallel is {parallel} and resources.rollout.num_gpus 0: on the CPU an engine is one process; "
                "set tensor_parallel to 1, or give the engines GPUs"
            )
        if max(parallel, gpus) > 1 and parallel != gpus:
            raise ValueError(
                f"rollout.tensor_parallel is {parallel} and resources.rollout.num_gpus {gpus:g}: an engine computes on as many "
                "GPUs as it is given; set both to the same number"
            )
        return self

    def refuse_short_context(self) -> None:
        """Check that the SFT model that is made here sees a whole prompt and response.

        Raises:
            UserError: if its context is too short.
        """
        needed = self.data.max_prompt_tokens + max(self.data.max_response_tokens, self.rollout.max_new_tokens)
        if needed > self.sft.shape.context_length:
            raise UserError(
                "prompt and response do not fit into the model's context: data.max_prompt_tokens + the larger of "
                f"data.max_response_tokens and rollout.max_new_tokens = {needed}, sft.shape.context_length = "
                f"{self.sft.shape.context_length}"
            )
