"""How each role is run: its sampling, its share of the machine, its numbers' type."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.section import Section

Dtype = Literal["float32", "bfloat16"]


class RolloutConfig(Section):
    """The vLLM pool and the distribution it samples from."""

    num_engines: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one node that share an engine's weights and cache; ``resources.rollout.num_gpus`` is then as many. Divides the
    policy's heads."""
    temperature: float = Field(0.8, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 the sampler's log-probs are of the truncated distribution, which the learner does not know: the run says so, and
    cannot compare the two after a sync."""
    max_new_tokens: int = Field(64, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """vLLM's share of a GPU's memory; not used on the CPU."""
    kv_cache_mib: int = Field(256, ge=16)
    """Key-value cache of one engine on the CPU."""
    parity_bound: float = Field(1e-4, gt=0)
    """Largest difference allowed between the engine's and the learner's log-prob of one token after a sync, nats."""


class Share(Section):
    """What one process of a role asks Ray for."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    """torch threads of the process."""
    num_ranks: int = Field(1, ge=1)
    """Processes that share the role's model (FSDP2): of the reward trainer and of the learner."""
    dtype: Dtype = "float32"
    recompute_activations: bool = False
    """Learner and reward trainer: layers keep only their inputs for the backward pass. Less memory, about a third more time."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Share":
        if self.num_cpus == 0 and self.num_gpus == 0:
            raise ValueError("num_cpus and num_gpus are both 0: Ray would start any number of these at once")
        return self


class ResourcesConfig(Section):
    """The five roles and their shares. The driver itself asks for nothing."""

    rollout: Share = Share()
    reward: Share = Share()
    scorer: Share = Share()
    learner: Share = Share()
    wait_limit_s: float | None = Field(None, gt=0)
    """Give up when the cluster has not found room by then; null = wait, and say every 30 s what is short."""
    deadline_s: float = Field(3600.0, gt=0)
    """Longest that a call to a role may go without progress, and that one rank of a role waits for another."""

    @model_validator(mode="after")
    def _only_trained_models_are_shared(self) -> "ResourcesConfig":
        for name, share in (("rollout", self.rollout), ("scorer", self.scorer)):
            if share.num_ranks > 1:
                raise ValueError(f"{name}.num_ranks is {share.num_ranks}: only reward and learner can have several ranks")
        return self
