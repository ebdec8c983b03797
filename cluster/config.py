"""The whole config of a run, and what must hold between its sections."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.config import ResourcesConfig, RolloutConfig
from cluster.health import FaultsConfig
from cluster.rounds_config import PPO, RoundsConfig
from cluster.store_uri import check_storage_name
from evaluation.config import EvaluationConfig
from policy.config import DPOConfig, PolicyConfig, SFTConfig
from preferences.config import DataConfig, FreshConfig
from rm.bilevel_config import GeneralizeConfig
from rm.config import HELDOUT_SHARE, MetaConfig, RewardConfig, ScorerConfig, StrengthConfig
from rm.domain_config import CustomizeConfig
from rm.features_config import FeaturesConfig
from rm.people_config import PeopleConfig
from sandbox.config import WorldConfig
from tokens.errors import UserError
from tokens.guards import GuardsConfig
from tokens.paths import PathText
from tokens.section import Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

ONE_POLICY: dict[str, Any] = {
    "reward.start": "sft",
    "scorer.refresh": "never",
    "policy.start": "previous",
    "policy.reference": "sft",
}
"""What only rounds have a use for, and its default: a baseline has one reward model, one start and one reference."""
PPO_ALONE: dict[str, Any] = {"policy.ptx_coef": 0, "policy.kl.controller": "fixed", "policy.lora.rank": 0}
"""What only PPO has a use for, and its default."""


class RunConfig(Section):
    """A run of iterated RLHF: sample, MetaRM, PPO, evaluate, commit, and again."""

    name: str
    """Name of the run; its directory is STORAGE/runs/NAME."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random number of the run follows from it, the sandbox's world apart (``world.seed``)."""
    storage: str | None = None
    """Directory that holds runs and caches, or an object store for `run` (s3://bucket/prefix; docs/storage.md); null = the
    environment's RONDO_STORAGE, else ~/rondo."""
    scratch: PathText | None = None
    """With an object store: the directory where the work is done, mounted by all nodes; null = RONDO_SCRATCH, else ~/rondo."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that `run` reports its numbers to (docs/trackers.md): wandb, mlflow, trackio; each must be installed. TensorBoard
    is written to with or without being named."""
    rounds: RoundsConfig = RoundsConfig()
    world: WorldConfig = WorldConfig()
    data: DataConfig = DataConfig()
    fresh: FreshConfig = FreshConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    meta: MetaConfig = MetaConfig()
    scorer: ScorerConfig = ScorerConfig()
    strength: StrengthConfig = StrengthConfig()
    rollout: RolloutConfig = RolloutConfig()
    policy: PolicyConfig = PolicyConfig()
    dpo: DPOConfig = DPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    customize: CustomizeConfig = CustomizeConfig()
    generalize: GeneralizeConfig = GeneralizeConfig()
    people: PeopleConfig = PeopleConfig()
    features: FeaturesConfig = FeaturesConfig()
    guards: GuardsConfig = GuardsConfig()
    resources: ResourcesConfig = ResourcesConfig()
    faults: FaultsConfig = FaultsConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(f"a run's name has letters, digits, '.', '_' and '-' only, 64 at most, got {name!r}")
        return name

    @field_validator("storage")
    @classmethod
    def _storage_has_no_secret(cls, storage: str | None) -> str | None:
        return storage if storage is None else check_storage_name(storage)

    @model_validator(mode="before")
    @classmethod
    def _baselines_know_no_metarm(cls, tree: Any) -> Any:
        """meta.* is switched off for a baseline, so that one recipe serves both; the run says so."""
        rounds = tree["rounds"] if isinstance(tree, dict) and "rounds" in tree else None
        if not isinstance(rounds, dict) or "baseline" not in rounds or rounds["baseline"] == "none":
            return tree
        meta = tree["meta"] if "meta" in tree else {}
        return tree | {"meta": meta | {"enabled": False, "deploy": "theta"} if isinstance(meta, dict) else meta}

    @model_validator(mode="before")
    @classmethod
    def _judge_where_none_is_named(cls, tree: Any) -> Any:
        """Without a judge of the config's own: the sandbox's truth, and elsewhere reward models that nothing is trained by."""
        sections = ("data", "evaluation", "scorer")
        if not isinstance(tree, dict) or any(name in tree and not isinstance(tree[name], dict) for name in sections):
            return tree
        data, evaluation, scorer = (tree[name] if name in tree else {} for name in sections)
        sandbox = "preferences" not in data or data["preferences"] == "sandbox"
        given = "reward_model" in scorer and scorer["reward_model"] is not None
        if sandbox or given or "judge" in evaluation:
            return tree
        return tree | {"evaluation": evaluation | {"judge": "held_out"}}

    @model_validator(mode="after")
    def _judge_can_judge(self) -> "RunConfig":
        evaluation, stop, given = self.evaluation, self.rounds.stop, self.scorer.reward_model
        if evaluation.judge == "held_out" and not evaluation.num_held_out:
            raise ValueError(
                "evaluation.judge is held_out and evaluation.held_out_members 0: there is nobody to judge; set held_out_members "
                "to 1 or more, or to null"
            )
        if evaluation.num_held_out and given is not None:
            raise ValueError(
                f"evaluation.judge is {evaluation.judge}, evaluation.held_out_members {evaluation.num_held_out} and "
                f"scorer.reward_model {given}: with a given reward model none is trained, held-out ones neither; set "
                "held_out_members to null and judge to gold (in the sandbox) or ensemble"
            )
        if stop is not None and evaluation.judge == "ensemble":
            raise ValueError(
                f"rounds.stop.patience is {stop.patience} and evaluation.judge ensemble, which is what PPO is trained by: it "
                "goes on rising when the policy gets worse; set evaluation.judge to held_out (or gold in the sandbox), or "
                "rounds.stop to null"
            )
        return self

    @model_validator(mode="after")
    def _baseline_means_something(self) -> "RunConfig":
        baseline = self.rounds.baseline
        if baseline == "none":
            return self
        tree = self.model_dump(mode="json")
        idle = ONE_POLICY if baseline in PPO else ONE_POLICY | PPO_ALONE
        for dotted, usual in idle.items():
            value: Any = tree
            for key in dotted.split("."):
                value = value[key]
            if value != usual:
                raise ValueError(
                    f"{dotted} is {value!r} and rounds.baseline {baseline}, which has no use for it: set it to {usual!r}, or "
                    "rounds.baseline to none"
                )
        if baseline == "dpo":
            self._refuse_for_dpo()
        if baseline == "ensemble_ppo" and (self.scorer.num_members < 2 or self.scorer.aggregate == "primary"):
            raise ValueError(
                f"rounds.baseline is ensemble_ppo, scorer.num_members {self.scorer.num_members} and scorer.aggregate "
                f"{self.scorer.aggregate}: paid by one reward model, it is vanilla_ppo; set rounds.baseline to that, or "
                "num_members to 2 or more and aggregate to mean, worst or mean_minus_std"
            )
        return self

    def _refuse_for_dpo(self) -> None:
        method, ranks = self.data.denoise.method, self.resources.learner.num_ranks
        if method not in ("none", "flip", "drop"):
            raise ValueError(
                f"data.denoise.method is {method} and rounds.baseline dpo, whose loss knows neither margins nor soft labels of a "
                "pair: set it to flip, drop or none"
            )
        if ranks > 1:
            raise ValueError(f"resources.learner.num_ranks is {ranks} and rounds.baseline dpo trains in one process: set it to 1")

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
    def _a_given_reward_is_not_trained(self) -> "RunConfig":
        given = self.scorer.reward_model
        for_people = given is not None and given.startswith("features:")
        if for_people != self.people.chosen:
            raise ValueError(
                f"scorer.reward_model is {given} and people.profile, people.mixture and people.group are "
                f"{'set' if self.people.chosen else 'not'}: a feature model scores as somebody, whom one of the three names; set "
                "scorer.reward_model to features:DIRECTORY and one of them, or neither"
            )
        if given is None:
            return self
        picked = ("none", "best_of_n")
        idle = {
            "meta.enabled": (self.meta.enabled, False),
            "scorer.num_members": (self.scorer.num_members, 1),
            "reward.base": (self.reward.base, None),
            "reward.start": (self.reward.start, "sft"),
            "reward.patience": (self.reward.patience, None),
            "data.denoise.method": (self.data.denoise.method, "none"),
            "rounds.baseline": (self.rounds.baseline, self.rounds.baseline if self.rounds.baseline in picked else "none"),
        }
        for key, (got, wanted) in idle.items():
            if got != wanted:
                raise ValueError(
                    f"{key} is {got!r} and scorer.reward_model {given}: that reward model is taken as it is, "
                    f"and none is trained; set {key} to {wanted!r}, or scorer.reward_model to null"
                )
        return self

    @model_validator(mode="after")
    def _fresh_pairs_can_be_had(self) -> "RunConfig":
        fresh, meta = self.fresh, self.meta
        if not fresh.num_pairs:
            return self
        asked, given = f"fresh.num_pairs is {fresh.num_pairs}", self.scorer.reward_model
        if self.rounds.baseline != "none":
            raise ValueError(
                f"{asked} and rounds.baseline {self.rounds.baseline}, which trains no reward model after its start: set "
                "fresh.num_pairs to 0, or rounds.baseline to none"
            )
        if given is not None:
            raise ValueError(
                f"{asked} and scorer.reward_model {given}, which is taken as it is: no reward model is trained that could learn "
                "from them; set fresh.num_pairs to 0, or scorer.reward_model to null"
            )
        if fresh.judge in ("gold", "annotators") and self.data.preferences != "sandbox":
            raise ValueError(
                f"fresh.judge is {fresh.judge} and data.preferences {self.data.preferences}: it knows the sandbox's prompts "
                "only; set fresh.judge to reward:DIR, ensemble:DIR or openai:BASE_URL#MODEL"
            )
        back = max(1, int(HELDOUT_SHARE * meta.num_prompts)) if meta.enabled and meta.num_prompts > 1 else 0
        most = (meta.num_prompts - back) * (meta.samples_per_prompt // 2)
        if fresh.num_pairs > most:
            raise ValueError(
                f"{asked}, and S_k makes {most} pairs at most: meta.num_prompts is {meta.num_prompts}, of which MetaRM keeps "
                f"{back} back, meta.samples_per_prompt {meta.samples_per_prompt}, and no sample is in two pairs; raise one of "
                "these, or lower fresh.num_pairs"
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
    def _roles_can_be_placed(self) -> "RunConfig":
        shares, sync = self.resources, self.rollout.sync
        roles = {"rollout": shares.rollout, "reward": shares.reward, "scorer": shares.scorer, "learner": shares.learner}
        gpus = {name: share.num_gpus for name, share in roles.items()}
        asked = ", ".join(f"resources.{name}.num_gpus {number:g}" for name, number in gpus.items())
        if shares.placement == "colocated" and set(gpus.values()) not in ({0.0}, {1.0}):
            raise ValueError(
                f"resources.placement is colocated, got {asked}: roles that take turns share whole GPUs; set all four to 1, "
                "or all to 0 on a machine without"
            )
        if shares.placement == "colocated" and any(share.labels != shares.learner.labels for share in roles.values()):
            labels = ", ".join(f"resources.{name}.labels {share.labels}" for name, share in roles.items())
            raise ValueError(
                f"resources.placement is colocated, got {labels}: roles that take turns are on the same nodes; set all four to "
                "the same"
            )
        on_gpus = bool(gpus["rollout"] and gpus["learner"])
        if sync == "nccl" and on_gpus and min(gpus["rollout"], gpus["learner"]) < 1:
            raise ValueError(
                f"rollout.sync is nccl, got {asked}: NCCL refuses two processes on one GPU, so engines and learner need "
                "whole ones; set rollout.sync to auto"
            )
        wanted = {"nccl": "disaggregated", "ipc": "colocated"}
        if sync in wanted and (not on_gpus or shares.placement != wanted[sync]):
            raise ValueError(
                f"rollout.sync is {sync}, got resources.placement {shares.placement} and {asked}: it needs {wanted[sync]} "
                "engines and learner, both on GPUs; set rollout.sync to auto"
            )
        if sync == "ipc" and self.rollout.num_engines > shares.learner.num_ranks:
            raise ValueError(
                f"rollout.sync is ipc and rollout.num_engines {self.rollout.num_engines}: every engine must share the GPU of one "
                f"of the learner's ranks, of which there are {shares.learner.num_ranks}; raise resources.learner.num_ranks, or "
                "set rollout.sync to store"
            )
        if shares.learner.offload and self.policy.lora.rank:
            raise ValueError(
                f"resources.learner.offload is true and policy.lora.rank {self.policy.lora.rank}: the reference is the policy "
                "without its adapters, so nothing can wait in host memory; set offload to false"
            )
        if shares.placement == "colocated" and self.policy.max_lag:
            raise ValueError(
                f"policy.max_lag is {self.policy.max_lag} and resources.placement colocated: roles that take turns on a device "
                "cannot sample while they learn; set policy.max_lag to 0, or resources.placement to disaggregated"
            )
        return self

    @model_validator(mode="after")
    def _pool_can_grow(self) -> "RunConfig":
        rollout, placement = self.rollout, self.resources.placement
        if rollout.max_engines is None:
            return self
        if placement == "colocated":
            raise ValueError(
                f"rollout.max_engines is {rollout.max_engines} and resources.placement colocated: roles that take turns on the "
                "same GPUs have none for more engines; set max_engines to null, or resources.placement to disaggregated"
            )
        if rollout.sync == "nccl":
            raise ValueError(
                f"rollout.max_engines is {rollout.max_engines} and rollout.sync nccl: a group of NCCL cannot take in an engine "
                "that joins later; set rollout.sync to auto or store, or max_engines to null"
            )
        return self

    @model_validator(mode="after")
    def _importance_is_known(self) -> "RunConfig":
        asked = [*self.rollout.reshaped(), *([f"policy.max_lag {self.policy.max_lag}"] if self.policy.max_lag else [])]
        if asked and self.policy.importance_cap is None:
            raise ValueError(
                f"{', '.join(asked)}, and policy.importance_cap null: the rollouts are drawn from another distribution than the "
                "one that learns, and nothing corrects for it; set policy.importance_cap (2.0 is usual), or leave the others out"
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
        ranks = self.resources.learner.num_ranks
        if self.policy.ptx_coef and self.policy.ptx_batch_size % ranks:
            raise ValueError(
                f"policy.ptx_batch_size ({self.policy.ptx_batch_size}) is not a multiple of resources.learner.num_ranks "
                f"({ranks}): every rank takes as many texts as the others"
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
        if self.data.preferences == "sandbox" or (self.sft.model is None and self.reward.base is None):
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
