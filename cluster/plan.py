"""What would run where: resource and memory arithmetic, without Ray.

``plan`` prints it; ``run`` asks Ray for exactly these bundles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.config import Share
from cluster.config import RunConfig
from tokens.errors import UserError

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
PROCESS = 3 * GIB // 4
"""What a process of ours holds before it holds a model: Python, torch, transformers (0.4 to 0.8 GiB seen)."""
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
        why: what that memory is made of.
        host: memory that is needed on its machine besides, bytes: models that rest there, other processes of the bundle.
    """

    role: str
    name: str
    num_cpus: float
    num_gpus: float
    memory: int
    why: str
    host: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray's placement group takes it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray CPUs, GPUs, memory of the machine and of one GPU in bytes."""

    num_cpus: float
    num_gpus: float
    memory: int
    gpu_memory: int


@dataclass(frozen=True)
class Plan:
    """Where each bundle lands, and what is short, in words."""

    bundles: tuple[Bundle, ...]
    nodes: tuple[Node, ...]
    placed: tuple[int | None, ...]
    shortfalls: tuple[str, ...]


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on: the shape of the policy, which all roles' models share."""

    parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


def model_size(config: RunConfig) -> ModelSize:
    """The size of the policy model, from its directory or from the shape it will be made with.

    Args:
        config: of the run.

    Returns:
        The size; a tied embedding is counted once.
    """
    shape = config.sft.shape
    if config.sft.model is None or not Path(config.sft.model).is_dir():
        vocabulary, hidden, inner = shape.vocab_size, shape.hidden_size, shape.intermediate_size
        layers, key_value, tied = shape.num_layers, hidden, config.sft.model is None
    else:
        from transformers import AutoConfig

        stored = AutoConfig.from_pretrained(config.sft.model)
        try:
            vocabulary, hidden, inner = stored.vocab_size, stored.hidden_size, stored.intermediate_size
            layers, tied = stored.num_hidden_layers, stored.tie_word_embeddings
            key_value = hidden * stored.num_key_value_heads // stored.num_attention_heads
        except AttributeError as error:
            raise UserError(f"{config.sft.model}: the config of a decoder-only model is expected, and {error}") from error
    per_layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner + 2 * hidden
    return ModelSize(vocabulary * hidden * (1 if tied else 2) + layers * per_layer + hidden, layers, hidden, vocabulary)


def activations(size: ModelSize, share: Share, sequences: float, length: int, at_once: int, with_logits: bool) -> int:
    """Upper estimate of what one rank keeps for the backward pass, bytes.

    About 34 numbers of hidden size per token and layer (Korthikanti et al. 2022, section 4.1, attention matrices not kept), or
    one with recomputation, and then the full amount for the layer that is being recomputed; plus logits, their log-softmax
    and their gradient in float32.

    Args:
        size: of the model.
        share: of the role.
        sequences: kept at the same time, over all ranks.
        length: longest prompt + response, tokens.
        at_once: sequences of one forward pass.
        with_logits: True for a language model.

    Returns:
        The bytes.
    """
    tokens, together = sequences * length / share.num_ranks, min(at_once, sequences / share.num_ranks) * length
    unit = size.hidden_size * BYTES[share.dtype]
    kept = tokens * size.num_layers + 34 * together if share.recompute_activations else 34 * tokens * size.num_layers
    return int(kept * unit + (3 * 4 * together * size.vocab_size if with_logits else 0))


def reward_size(config: RunConfig, size: ModelSize) -> ModelSize:
    """The size of a reward model: of ``reward.base`` where it is a directory, else the policy's.

    Args:
        config: of the run.
        size: of the policy.
    """
    base = config.reward.base
    if base is None or not Path(base).expanduser().is_dir():
        return size
    import torch
    from transformers import AutoConfig, AutoModel

    stored = AutoConfig.from_pretrained(Path(base).expanduser())
    with torch.device("meta"):
        model = AutoModel.from_config(stored)
    text = stored.get_text_config()
    return ModelSize(sum(p.numel() for p in model.parameters()), text.num_hidden_layers, text.hidden_size, text.vocab_size)


def _memory(share: Share, frozen: float, trained: float, active: int) -> int:
    """Bytes of one rank: frozen parameters; weights, gradient and two moments of the trained ones in float32; the rest."""
    return int((frozen * BYTES[share.dtype] + trained * 16) / share.num_ranks + active)


def reward_bundles(config: RunConfig, size: ModelSize, metarm: bool) -> tuple[Bundle, ...]:
    """The reward trainer's processes.

    Args:
        config: of the run.
        size: of the reward model.
        metarm: whether there are shifted samples to ascend on.
    """
    share, reward, meta = config.resources.reward, config.reward, config.meta
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    shifted = meta.prompts_per_step * meta.samples_per_prompt if metarm else 0
    views = 1 if reward.contrastive.method == "none" else 2
    active = activations(size, share, max(2 * views * reward.batch_size, shifted), longest, reward.microbatch_size, False)
    if reward.lora.rank:
        adapters = 2 * 7 * reward.lora.rank * size.hidden_size * size.num_layers  # an upper estimate: A and B of seven matrices
        frozen, trained, what = size.parameters * 4 / BYTES[share.dtype], float(adapters), "reward model, adapters' AdamW"
    else:
        frozen, trained, what = 0.0, float(size.parameters), "reward model, AdamW"
    if metarm:
        frozen += trained * 2 * 4 / BYTES[share.dtype]  # theta, and the ascent's direction, in float32
        what += ", MetaRM's copies"
    memory = _memory(share, frozen, trained, active)
    return tuple(
        Bundle("reward", f"reward-{rank}", share.num_cpus, share.num_gpus, memory, what) for rank in range(share.num_ranks)
    )


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
    from rm.members import member_settings

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
        The bundles: engines, reward trainer's ranks, scorer, learner's ranks.
    """
    shares, policy, data = config.resources, config.policy, config.data
    number, scorers = size.parameters, reward_size(config, size)

    def make(role: str, share: Share, rank: int, frozen: float, trained: float, active: int, why: str) -> Bundle:
        memory = _memory(share, frozen, trained, active)
        return Bundle(role, f"{role}-{rank}", share.num_cpus, share.num_gpus, memory, why)

    engine = config.rollout.kv_cache_mib << 20 if not shares.rollout.num_gpus else 0
    rollout = data.max_prompt_tokens + config.rollout.max_new_tokens
    learner = activations(
        size, shares.learner, policy.microbatch_size * shares.learner.num_ranks, rollout, policy.microbatch_size, True
    )
    members = config.scorer.num_members
    references = 2 if policy.reference == "previous" else 1
    return (
        *(
            make("rollout", shares.rollout, i, number, 0, engine, "engine" + ("" if engine else "; its cache takes what is left"))
            for i in range(config.rollout.num_engines)
        ),
        *reward_bundles(config, scorers, config.meta.enabled),
        make("scorer", shares.scorer, 0, members * scorers.parameters, 0, 0, f"{members} reward models"),
        *(
            make("learner", shares.learner, i, references * number, number + scorers.parameters, learner,
                 "policy, critic, AdamW, reference")
            for i in range(shares.learner.num_ranks)
        ),
    )  # fmt: skip


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
            shortfalls.append(_shortfall(bundle, nodes, cpus, gpus, memory))
    return Plan(tuple(bundles_), tuple(nodes), tuple(placed), tuple(shortfalls))


def _shortfall(bundle: Bundle, nodes: Sequence[Node], cpus: list[float], gpus: list[float], memory: list[float]) -> str:
    needs = f"{bundle.name} needs {bundle.num_cpus:g} CPU, {bundle.num_gpus:g} GPU, {bundle.memory / GIB:.1f} GiB ({bundle.why})"
    if bundle.num_gpus and any(node.num_gpus for node in nodes):
        largest = max(node.gpu_memory for node in nodes if node.num_gpus)
        if bundle.memory > bundle.num_gpus * largest * GPU_USABLE:
            less = (
                "each is trained in one process: set strength.members to lora, or name strengths in data.denoise.strength"
                if bundle.role == "member"
                else f"raise resources.{bundle.role}.num_ranks"
            )
            return f"{needs}: more than {GPU_USABLE:.0%} of its {bundle.num_gpus:g} GPU of {largest / GIB:.0f} GiB; {less}"
    if not nodes:
        return f"{needs}: the cluster has no node"
    best = max(range(len(nodes)), key=lambda n: (gpus[n], cpus[n], memory[n]))
    return f"{needs}; at most {cpus[best]:g} CPU, {gpus[best]:g} GPU, {memory[best] / GIB:.1f} GiB are left on one node"
