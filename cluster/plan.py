"""What would run where: resource and memory arithmetic, without Ray.

``plan`` prints it; ``run`` asks Ray for exactly these bundles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from actors.config import Share
from actors.labels import in_words, satisfies
from cluster.config import RunConfig
from cluster.memory import MASTER, Part, engine_parts, frozen_part, learner_parts, reward_parts
from cluster.model_sizes import ModelSize, reward_size
from tokens.errors import UserError

GIB = 1 << 30
PROCESS = 3 * GIB // 4
"""What a process of ours holds before it holds a model: Python, torch, transformers (0.4 to 0.8 GiB seen)."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of heads that vLLM 0.32's CPU attention has."""
GPU_USABLE = 0.9
"""Share of a GPU's memory that a model may take, the rest left to activations of the allocator and the driver."""


@dataclass(frozen=True)
class Bundle:
    """One process and what it asks for.

    Args:
        role: rollout, reward, scorer or learner.
        name: of the process, e.g. ``learner-1``.
        num_cpus: Ray CPUs, fractions allowed.
        num_gpus: Ray GPUs.
        memory: estimate of what its weights, gradients, optimizer and activations need, bytes; on the GPU where it has one.
        why: what that memory is made of, in a few words.
        parts: the same, part by part.
        host: memory that is needed on its machine besides, bytes: with a GPU the whole model while it is loaded, and on the
            learner's rank 0 the optimizer's state while it is saved; models that rest there, other processes of the bundle.
        labels: selector of the nodes where it may run.
    """

    role: str
    name: str
    num_cpus: float
    num_gpus: float
    memory: int
    why: str
    parts: tuple[Part, ...] = ()
    host: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray's placement group takes it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray CPUs, GPUs, memory of the machine and of one GPU in bytes.

    Its labels, or None where they are not known: then nothing is asked of them.
    """

    num_cpus: float
    num_gpus: float
    memory: int
    gpu_memory: int
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """Where each bundle lands, and what is short, in words."""

    bundles: tuple[Bundle, ...]
    nodes: tuple[Node, ...]
    placed: tuple[int | None, ...]
    shortfalls: tuple[str, ...]


def _bundle(role: str, rank: int, share: Share, parts: tuple[Part, ...], why: str, host: int = 0) -> Bundle:
    memory = sum(part.bytes for part in parts)
    if share.fraction_reason is not None:
        why += f"; {share.num_gpus:g} of a GPU because {share.fraction_reason}"
    own = host if share.num_gpus else 0
    return Bundle(role, f"{role}-{rank}", share.num_cpus, share.num_gpus, memory, why, parts, own, share.labels)


def reward_bundles(config: RunConfig, size: ModelSize, metarm: bool) -> tuple[Bundle, ...]:
    """The reward trainer's processes.

    Args:
        config: of the run.
        size: of the reward model.
        metarm: whether there are shifted samples to ascend on.
    """
    share = config.resources.reward
    parts = reward_parts(config, size, metarm)
    why = "reward model, " + ("adapters' AdamW" if config.reward.lora.rank else "AdamW") + (", MetaRM's copies" if metarm else "")
    host = MASTER * size.parameters
    return tuple(_bundle("reward", rank, share, parts, why, host) for rank in range(share.num_ranks))


def member_bundle(config: RunConfig, size: ModelSize) -> Bundle | None:
    """One member of the preference-strength ensemble, where ``data.denoise`` has it trained first; trained whole, in one process.

    Args:
        config: of the run.
        size: of the reward model.

    Returns:
        The bundle; None where nothing is denoised, or the config names strengths that are there already.
    """
    denoise, resources = config.data.denoise, config.resources
    if denoise.method == "none" or denoise.strength is not None:
        return None
    from rm.member_settings import member_settings

    alone = resources.model_copy(update={"reward": resources.reward.model_copy(update={"num_ranks": 1})})
    changed = {"resources": alone, "reward": member_settings(config.reward, config.strength)}
    (bundle,) = reward_bundles(config.model_copy(update=changed), size, metarm=False)
    return replace(bundle, role="member", name="member of the strength ensemble")


def bundles(config: RunConfig, size: ModelSize) -> tuple[Bundle, ...]:
    """The processes of a run and what each asks for.

    Args:
        config: of the run.
        size: of the policy; reward models and the critic have its shape unless ``reward.base`` gives them another.

    Returns:
        The bundles: engines, reward trainer's ranks, scorers, learner's ranks.
    """
    shares, scorers = config.resources, reward_size(config, size)
    parallel, judges = config.rollout.tensor_parallel, config.evaluation.num_held_out
    members = config.scorer.num_members + judges
    if size.num_heads % parallel:
        raise UserError(f"rollout.tensor_parallel is {parallel} and the policy has {size.num_heads} heads: it must divide them")
    if not shares.rollout.num_gpus and size.head_size not in CPU_HEAD_SIZES:
        raise UserError(
            f"the policy's heads are {size.head_size} wide (hidden_size / num_heads), and vLLM on CPUs computes attention for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))} only: take another sft.shape.num_heads, another model, or engines with GPUs"
        )
    engine = "engine; its cache takes what is left" if shares.rollout.num_gpus else "engine"
    scoring = f"{members} reward models" + (f", {judges} of them held out" if judges else "")
    whole = shares.scorer.model_copy(update={"num_ranks": 1})  # each of its processes holds all members
    ensemble = (frozen_part(scoring, members * scorers.parameters, whole),)
    learner = learner_parts(config, size, scorers)
    loading = MASTER * max(size.parameters, scorers.parameters)
    saving = MASTER * size.parameters + 2 * MASTER * (size.parameters + scorers.parameters)
    return (
        *(_bundle("rollout", i, shares.rollout, engine_parts(config, size), engine) for i in range(config.rollout.num_engines)),
        *reward_bundles(config, scorers, config.meta.enabled),
        *(
            _bundle("scorer", i, shares.scorer, ensemble, ensemble[0].name, ensemble[0].bytes // members)
            for i in range(shares.scorer.num_ranks)
        ),
        *(
            _bundle("learner", rank, shares.learner, learner, "policy, critic, AdamW, reference", loading if rank else saving)
            for rank in range(shares.learner.num_ranks)
        ),
    )


def this_machine() -> Node:
    """The machine we are on; its GPUs as the NVIDIA driver lists them, of 80 GiB unless the command line says otherwise."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*")) if Path("/proc/driver/nvidia/gpus").is_dir() else []
    return Node(len(os.sched_getaffinity(0)), len(gpus), memory, 80 * GIB)


def place(bundles_: Sequence[Bundle], nodes: Sequence[Node]) -> Plan:
    """Pack bundles onto nodes, GPUs first, largest first.

    Args:
        bundles_: to place.
        nodes: to place them on.

    Returns:
        The plan: the node of each bundle or None, and the shortfalls in words.
    """
    cpus = [node.num_cpus for node in nodes]
    gpus = [node.num_gpus for node in nodes]
    memory = [float(node.memory) for node in nodes]
    placed: list[int | None] = [None] * len(bundles_)
    shortfalls: list[str] = []
    order = sorted(range(len(bundles_)), key=lambda i: (-bundles_[i].num_gpus, -bundles_[i].num_cpus))
    for i in order:
        bundle = bundles_[i]
        host_memory = PROCESS + bundle.host + (0 if bundle.num_gpus else bundle.memory)
        for n, node in enumerate(nodes):
            if node.labels is not None and not satisfies(node.labels, bundle.labels):
                continue
            if bundle.num_gpus and bundle.memory > bundle.num_gpus * node.gpu_memory * GPU_USABLE:
                continue
            if cpus[n] + 1e-9 >= bundle.num_cpus and gpus[n] + 1e-9 >= bundle.num_gpus and memory[n] >= host_memory:
                cpus[n], gpus[n], memory[n], placed[i] = (
                    cpus[n] - bundle.num_cpus,
                    gpus[n] - bundle.num_gpus,
                    memory[n] - host_memory,
                    n,
                )
                break
        if placed[i] is None:
            allowed = [n for n, node in enumerate(nodes) if node.labels is None or satisfies(node.labels, bundle.labels)]
            left = [Left(nodes[n], cpus[n], gpus[n], memory[n]) for n in allowed]
            shortfalls.append(_shortfall(bundle, left, len(nodes)))
    return Plan(tuple(bundles_), tuple(nodes), tuple(placed), tuple(shortfalls))


LESS = {
    "member": "each is trained in one process: set strength.members to lora, or name strengths in data.denoise.strength",
    "scorer": "every process of it holds all members: lower scorer.num_members, or name a smaller model in reward.base",
    "rollout": "raise rollout.tensor_parallel and resources.rollout.num_gpus with it",
    "reward": "raise resources.reward.num_ranks",
    "learner": "raise resources.learner.num_ranks",
    "shared": "raise num_ranks of the largest of them, or set resources.placement to disaggregated",
}
"""What makes a process of a role need less of one GPU."""


@dataclass(frozen=True)
class Left:
    """What a node that the labels allow has left."""

    node: Node
    num_cpus: float
    num_gpus: float
    memory: float


def _shortfall(bundle: Bundle, left: Sequence[Left], num_nodes: int) -> str:
    needs = f"{bundle.name} needs {bundle.num_cpus:g} CPU, {bundle.num_gpus:g} GPU, {bundle.memory / GIB:.1f} GiB ({bundle.why})"
    where = f" on {in_words(bundle.labels)}" if bundle.labels else ""
    with_gpus = [one.node.gpu_memory for one in left if one.node.num_gpus]
    if bundle.num_gpus and with_gpus and bundle.memory > bundle.num_gpus * max(with_gpus) * GPU_USABLE:
        has = f"{GPU_USABLE:.0%} of its {bundle.num_gpus:g} GPU of {max(with_gpus) / GIB:.0f} GiB"
        return f"{needs}: more than {has}; {LESS[bundle.role]}"
    if bundle.host:
        needs += f", and {(PROCESS + bundle.host) / GIB:.1f} GiB of its machine's memory"
    if not left:
        return f"{needs}{where}: " + (
            f"none of the {num_nodes} nodes has these labels" if num_nodes else "the cluster has no node"
        )
    best = max(left, key=lambda one: (one.num_gpus, one.num_cpus, one.memory))
    return (
        f"{needs}{where}; at most {best.num_cpus:g} CPU, {best.num_gpus:g} GPU, {best.memory / GIB:.1f} GiB are left on one node"
    )
