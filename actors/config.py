"""How each role is run: its sampling, its share of the machine, its numbers' type."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from actors.labels import wrong_with
from tokens.section import Section

Dtype = Literal["float32", "bfloat16"]
Backend = Literal["store", "nccl", "ipc"]
"""How weights reach the engines; see ``actors.transfer``."""


class RolloutConfig(Section):
    """The vLLM pool and the distribution it samples from."""

    num_engines: int = Field(1, ge=1)
    """Engines that are there for the whole run."""
    max_engines: int | None = Field(None, ge=1)
    """Engines that there may be while the run samples: those beyond ``num_engines`` are asked of the cluster when sampling
    begins, join when they are ready, and end when the reward model trains. With it, prompts are handed out in pieces; null =
    always ``num_engines``, with an equal part of each batch. An engine that dies is replaced either way. docs/elastic.md."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one node that share an engine's weights and cache; ``resources.rollout.num_gpus`` is then as many. Divides the
    policy's heads."""
    temperature: float = Field(0.8, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 the sampler draws from the likeliest tokens alone, and its log-probs are of that distribution, which the learner
    does not know: the run says so, and cannot compare the two after a sync. The same holds for the three that follow."""
    top_k: int = Field(0, ge=0)
    """Draw from the k likeliest tokens alone; 0 = all of them."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Leave out tokens less likely than this share of the likeliest one's probability; 0 = none."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens of the prompt and of the response so far less likely; 1 = off."""
    max_new_tokens: int = Field(64, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """vLLM's share of a GPU's memory; not used on the CPU."""
    kv_cache_mib: int = Field(256, ge=16)
    """Key-value cache of one engine on the CPU."""
    sync: Literal["auto", "store", "nccl", "ipc"] = "auto"
    """How the learner's weights reach the engines: ``store`` = Ray's object store; ``nccl`` = vLLM's broadcast between GPUs, for
    ``resources.placement: disaggregated``; ``ipc`` = vLLM's sharing of one GPU's memory, for ``colocated``; ``auto`` = what
    fits, ``store`` on the CPU."""
    sync_chunk_mib: int = Field(256, ge=1)
    """Weights travel in pieces of this size at most, one of which an engine holds at a time; a larger tensor is one by itself."""
    parity_bound: float = Field(1e-4, gt=0)
    """Largest difference allowed between the engine's and the learner's log-prob of one token after a sync, nats."""

    @model_validator(mode="after")
    def _grows(self) -> "RolloutConfig":
        if self.max_engines is not None and self.max_engines < self.num_engines:
            raise ValueError(
                f"rollout.max_engines is {self.max_engines} and rollout.num_engines {self.num_engines}: the pool grows from the "
                "second to the first; raise max_engines, or set it to null for a pool of one size"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> "RolloutConfig":
        if self.top_k == 1:
            raise ValueError(
                "rollout.top_k is 1: every response would be the likeliest one, drawn with probability 1, and importance ratios "
                "against it mean nothing; set it to 0 (off) or to 2 or more"
            )
        return self

    def reshaped(self) -> tuple[str, ...]:
        """The settings by which the engine draws from another distribution than the policy's at its temperature."""
        settings: tuple[tuple[str, float, float], ...] = (
            ("top_p", self.top_p, 1),
            ("top_k", self.top_k, 0),
            ("min_p", self.min_p, 0),
            ("repetition_penalty", self.repetition_penalty, 1),
        )
        return tuple(f"rollout.{key} {value:g}" for key, value, off in settings if value != off)


class Share(Section):
    """What one process of a role asks Ray for."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    fraction_reason: str | None = None
    """Why the role takes part of a GPU: what else is on the rest of it, and that both fit. Needed where ``num_gpus`` is not
    whole: Ray does not keep such processes from taking each other's memory. ``placement: colocated`` works its fractions out
    itself."""
    labels: dict[str, str] = Field({})
    """Label selector of the nodes where the role's processes may run, e.g. ``{pool: trainer}``; a value may be ``in(a, b)``, or
    stand behind ``!``. Not looked at where the command starts a Ray of its own: there is one node."""
    threads: int = Field(1, ge=1)
    """torch threads of the process."""
    num_ranks: int = Field(1, ge=1)
    """Processes of the role: reward trainer and learner share the model (FSDP2); scorers hold all members each and share the
    rollouts out. Engines: see ``rollout.num_engines``."""
    dtype: Dtype = "float32"
    recompute_activations: bool = False
    """Learner and reward trainer: layers keep only their inputs for the backward pass. Less memory, about a third more time."""

    offload: bool = False
    """Learner: reference and SFT model wait in host memory but while their log-probs are computed."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Share":
        if self.num_cpus == 0 and self.num_gpus == 0:
            raise ValueError("num_cpus and num_gpus are both 0: Ray would start any number of these at once")
        return self

    @model_validator(mode="after")
    def _fractions_have_a_reason(self) -> "Share":
        whole = self.num_gpus == int(self.num_gpus)
        if not whole and self.num_gpus > 1:
            raise ValueError(f"num_gpus is {self.num_gpus:g}: above 1 Ray gives whole GPUs only; set it to {int(self.num_gpus)}")
        if not whole and not (self.fraction_reason or "").strip():
            raise ValueError(
                f"num_gpus is {self.num_gpus:g}, a fraction, and fraction_reason says nothing: name what shares the GPU and why "
                "its memory holds both, or set num_gpus to 1"
            )
        if whole and self.fraction_reason is not None:
            raise ValueError(
                f"fraction_reason is given and num_gpus is {self.num_gpus:g}, no fraction: leave it out, or set "
                "num_gpus to the share that it is the reason of"
            )
        return self

    @field_validator("labels")
    @classmethod
    def _labels_are_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        wrong = wrong_with(labels)
        if wrong is not None:
            raise ValueError(wrong)
        return {key: value.replace(" ", "") for key, value in labels.items()}


class ResourcesConfig(Section):
    """The five roles and their shares. The driver itself asks for nothing."""

    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """``disaggregated`` = every process has its share of the machine to itself; ``colocated`` = all roles share the same GPUs and
    take turns: before one works, the one that worked moves its models and optimizers to host memory, or vLLM sleeps."""

    rollout: Share = Share()
    reward: Share = Share()
    scorer: Share = Share()
    learner: Share = Share()
    allow_open_dashboard: bool = False
    """Run on a cluster although its dashboard listens on more than the loopback address and asks for no token: whoever reaches it
    can run code on every node."""
    wait_limit_s: float | None = Field(None, gt=0)
    """Give up when the cluster has not found room by then; null = wait, and say every 30 s what is short."""
    deadline_s: float = Field(3600.0, gt=0)
    """Longest that a call to a role may go without progress, and that one rank of a role waits for another."""

    @model_validator(mode="after")
    def _only_trained_models_are_shared(self) -> "ResourcesConfig":
        for name, share in (("rollout", self.rollout), ("reward", self.reward), ("scorer", self.scorer)):
            if share.offload:
                raise ValueError(f"{name}.offload is true: only the learner has models that can wait; set it to false")
        if self.rollout.num_ranks > 1:
            raise ValueError(
                f"rollout.num_ranks is {self.rollout.num_ranks}: engines are counted by rollout.num_engines; set it to 1"
            )
        return self
