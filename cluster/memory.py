"""How much memory the models of a process take, part by part. The formulas, with sources and worked numbers: docs/planning.md.

Letters: N parameters, R ranks, b bytes of a number in the role's dtype, L layers, h hidden size, i MLP width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import Share
from cluster.config import RunConfig
from cluster.model_sizes import ModelSize

BYTES = {"float32": 4, "bfloat16": 2}
MASTER = 4
"""Bytes of a trained weight, of its gradient and of either moment: always float32."""
CHUNK = 1 << 24
"""Logits that are float32 at a time, as `tokens.softmax` has it (whose import would take seconds)."""
ENGINE_TOKENS, ENGINE_SEQUENCES = 16384, 1024
"""What vLLM 0.32 computes at once by default on a GPU of 70 GiB or more (max_num_batched_tokens, max_num_seqs)."""


@dataclass(frozen=True)
class Part:
    """One thing that a process holds: its name, its bytes, and what it is made of."""

    name: str
    bytes: int
    why: str


def narrow(share: Share) -> bool:
    """Whether gathered weights are bfloat16: on several GPUs. Elsewhere autocast makes bfloat16 copies as they are used."""
    return share.num_gpus > 0 and share.num_ranks > 1 and share.dtype == "bfloat16"


def trained_parts(name: str, parameters: float, share: Share) -> tuple[Part, ...]:
    """Weights, gradients and AdamW's moments of one rank: 4, 4 and 8 bytes of N / R each.

    Args:
        name: of the model.
        parameters: that are trained.
        share: of the role.

    Returns:
        Three parts.
    """
    each = parameters * MASTER / share.num_ranks
    return (
        Part(f"{name} weights", int(each), "float32"),
        Part(f"{name} gradients", int(each), "float32"),
        Part(f"{name} optimizer", int(2 * each), "AdamW's two moments, float32"),
    )


def frozen_part(name: str, parameters: float, share: Share, dtype: str | None = None) -> Part:
    """Weights that are not trained: b N / R.

    Args:
        name: of them.
        parameters: how many.
        share: of the role.
        dtype: of them; None = the role's.

    Returns:
        The part.
    """
    kind = share.dtype if dtype is None else dtype
    return Part(name, int(parameters * BYTES[kind] / share.num_ranks), kind)


def working_weights(size: ModelSize, share: Share) -> Part | None:
    """Weights that exist while they compute: what FSDP2 gathers, or autocast's copies.

        several ranks:  b (root + 2 layer) + (b + 4) max(root, layer)    gathered, the next layer ahead; a unit's gradient, twice
        one, bfloat16:  2 N, or 2 (root + layer) with recomputation      autocast's copies, which the backward pass needs

    Source: PyTorch's FSDP2 (fully_shard) notes: a unit is gathered before it computes and the next one is prefetched.

    Args:
        size: of the largest model that computes.
        share: of the role.

    Returns:
        The part; None for one process that computes in float32.
    """
    if share.num_ranks > 1:
        unit = BYTES["bfloat16"] if narrow(share) else MASTER
        gathered = unit * (size.root + 2 * size.layer) + (unit + MASTER) * max(size.root, size.layer)
        return Part("gathered", gathered, "FSDP2: root and two layers whole, and the gradient of one unit")
    if share.dtype == "float32":
        return None
    copied = size.root + size.layer if share.recompute_activations else size.parameters
    return Part("bfloat16 copies", copied * BYTES["bfloat16"], "autocast's, of float32 weights")


def layer_bytes(size: ModelSize, share: Share) -> int:
    """What the backward pass needs of one token in one layer.

        float32:                    4 (11 h + 4 i)
        bfloat16 weights gathered:  2 (13 h + 4 i)
        bfloat16 by autocast:       2 (18 h + 4 i)

    Counted as in Korthikanti et al. 2022, section 4.1, for a Llama layer without fused kernels: both norms' inputs and outputs
    (float32), the inputs of q, k, v, gate and up (autocast casts each anew), q, k, v with keys and values repeated for every
    head, the attention's output twice, and gate, silu(gate), up and their product. Attention matrices are not kept.

    Args:
        size: of the model.
        share: of the role.

    Returns:
        The bytes.
    """
    hidden = 11 if share.dtype == "float32" else 13 if narrow(share) else 18
    return BYTES[share.dtype] * (hidden * size.hidden_size + 4 * size.intermediate_size)


def activations(size: ModelSize, share: Share, sequences: float, length: int, at_once: float) -> Part:
    """Upper estimate of what one rank keeps for the backward pass.

        kept whole:    tokens L layer_bytes + together layer_bytes
        recomputed:    tokens L h (4, gathered bfloat16: 2) + 2 together layer_bytes

    The last term is the layer whose gradient is being computed; with recomputation its activations come back first.

    Args:
        size: of the model.
        share: of the role.
        sequences: kept at the same time, over all ranks.
        length: longest prompt + response, tokens.
        at_once: sequences of one forward pass.

    Returns:
        The part.
    """
    tokens = sequences * length / share.num_ranks
    together = min(at_once, sequences / share.num_ranks) * length
    layer = layer_bytes(size, share)
    if share.recompute_activations:
        stream = size.hidden_size * (BYTES["bfloat16"] if narrow(share) else MASTER)
        return Part("activations", int(tokens * size.num_layers * stream + 2 * together * layer), "layers' inputs, and one layer")
    return Part("activations", int((tokens * size.num_layers + together) * layer), "of every layer, and gradients of one")


def logits(size: ModelSize, share: Share, tokens: float, entropy: bool) -> Part:
    """Logits and what comes of them: b V for each token, as much for their gradient, and two float32 chunks of them.

        2 b V tokens + 2 * 4 min(V tokens, 2^24)        3 in place of the first 2 with an entropy bonus

    Args:
        size: of the model.
        share: of the role.
        tokens: of one forward pass; all of them, since the columns of a padded batch reach from the first response to the last.
        entropy: whether there is an entropy bonus, which has a gradient of its own.

    Returns:
        The part.
    """
    number = size.vocab_size * tokens
    kept = (3 if entropy else 2) * BYTES[share.dtype] * number + 2 * MASTER * min(number, CHUNK)
    return Part("logits", int(kept), "and their gradient, " + share.dtype + "; two float32 chunks")


@dataclass(frozen=True)
class Cache:
    """An engine's key-value cache.

    Args:
        token_bytes: of one token, over the engine's GPUs.
        bytes: that are there, over its GPUs.
        sequence_tokens: longest prompt + response.
        samples: that a step asks of one engine.
    """

    token_bytes: int
    bytes: int
    sequence_tokens: int
    samples: int

    @property
    def tokens(self) -> int:
        """Tokens that fit."""
        return self.bytes // self.token_bytes

    @property
    def sequences(self) -> int:
        """Sequences of full length that fit, prompts counted once for each sample."""
        return self.tokens // self.sequence_tokens


def cache_token_bytes(size: ModelSize, dtype: str, tensor_parallel: int) -> int:
    """Bytes of one token in the cache: 2 L * heads * head size * b; heads are repeated where there are more GPUs than heads.

    Source: Kwon et al. 2023 (arXiv:2309.06180), section 3.

    Args:
        size: of the model.
        dtype: of the engine.
        tensor_parallel: GPUs of the engine.

    Returns:
        The bytes, over all GPUs of the engine.
    """
    heads = max(size.num_kv_heads, tensor_parallel)
    return 2 * size.num_layers * heads * size.head_size * BYTES[dtype]


def engine_parts(config: RunConfig, size: ModelSize) -> tuple[Part, ...]:
    """What an engine holds on its GPUs before its cache takes the rest, and the least cache it can do with.

        working memory:  b E (2 h + 3 i) + 3 * 4 * S V      E tokens and S sequences at once

    Args:
        config: of the run.
        size: of the policy.

    Returns:
        The parts, over all GPUs of the engine; on the CPU the cache that the config gives it.
    """
    share, gpus = config.resources.rollout, config.rollout.tensor_parallel
    weights = Part("weights", size.parameters * BYTES[share.dtype], share.dtype + (f", over {gpus} GPUs" if gpus > 1 else ""))
    if not share.num_gpus:
        return weights, Part("KV cache", config.rollout.kv_cache_mib << 20, "rollout.kv_cache_mib")
    hidden = ENGINE_TOKENS * (2 * size.hidden_size * gpus + 3 * size.intermediate_size) * BYTES[share.dtype]
    sampled = 3 * 4 * ENGINE_SEQUENCES * size.vocab_size * gpus
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    least = cache_token_bytes(size, share.dtype, gpus) * longest
    return (
        weights,
        Part("working memory", hidden + sampled, f"{ENGINE_TOKENS} tokens and the logits of {ENGINE_SEQUENCES} sequences"),
        Part("least KV cache", least, "one sequence of full length; the cache takes what is left"),
    )


def engine_cache(config: RunConfig, size: ModelSize, gpu_memory: int) -> Cache:
    """The cache of one engine: what weights and working memory leave of ``rollout.gpu_memory_utilization``.

    Args:
        config: of the run.
        size: of the policy.
        gpu_memory: bytes of one GPU.

    Returns:
        The cache.
    """
    share, rollout = config.resources.rollout, config.rollout
    parts = engine_parts(config, size)
    if share.num_gpus:
        there = int(rollout.tensor_parallel * gpu_memory * rollout.gpu_memory_utilization) - sum(p.bytes for p in parts[:-1])
    else:
        there = parts[-1].bytes
    prompts = -(-config.policy.prompts_per_step // rollout.num_engines)
    return Cache(
        cache_token_bytes(size, share.dtype, rollout.tensor_parallel),
        max(0, there),
        config.data.max_prompt_tokens + rollout.max_new_tokens,
        prompts * config.policy.samples_per_prompt,
    )


def learner_parts(config: RunConfig, size: ModelSize, critic: ModelSize) -> tuple[Part, ...]:
    """What a rank of the learner holds.

    Args:
        config: of the run.
        size: of the policy.
        critic: of the critic.

    Returns:
        The parts.
    """
    share, policy = config.resources.learner, config.policy
    length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    at_once: float = policy.microbatch_size
    if policy.microbatch_tokens is not None:
        at_once = max(1.0, policy.microbatch_tokens / length)
    each = (activations(model, share, at_once * share.num_ranks, length, at_once) for model in (size, critic))
    kept = (max(each, key=lambda part: part.bytes), logits(size, share, at_once * length, policy.entropy_coef > 0))
    largest = max(size, critic, key=lambda each: each.parameters)
    if policy.lora.rank:
        adapters = {name: adapter_parameters(model, policy.lora.rank) for name, model in (("policy", size), ("critic", critic))}
        return (
            frozen_part("policy and reference", size.parameters, share),
            frozen_part("critic's backbone", critic.parameters, share),
            *(part for name, number in adapters.items() for part in trained_parts(f"{name} adapter", number, share)),
            *_working(largest, max(adapters.values()), share, *kept, frozen=True),
        )
    references = 2 if policy.reference == "previous" else 1
    return (
        *trained_parts("policy", size.parameters, share),
        *trained_parts("critic", critic.parameters, share),
        frozen_part("reference" if references == 1 else "reference, SFT", references * size.parameters, share),
        *_working(largest, largest.parameters, share, *kept),
    )


def adapter_parameters(size: ModelSize, rank: int) -> float:
    """Parameters of adapters on the seven matrices of each layer: r L (4 * 2 h + 3 (h + i)), keys and values as wide as queries.

    Args:
        size: of the model.
        rank: of the adapters.
    """
    hidden, inner = size.hidden_size, size.intermediate_size
    return float(rank * size.num_layers * (4 * 2 * hidden + 3 * (hidden + inner)))


def reward_parts(config: RunConfig, size: ModelSize, metarm: bool) -> tuple[Part, ...]:
    """What a rank of the reward trainer holds.

    Args:
        config: of the run.
        size: of the reward model.
        metarm: whether there are shifted samples to ascend on.

    Returns:
        The parts.
    """
    share, reward, meta = config.resources.reward, config.reward, config.meta
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    shifted = meta.prompts_per_step * meta.samples_per_prompt if metarm else 0
    views = 1 if reward.contrastive.method == "none" else 2
    trained: float = size.parameters
    frozen: tuple[Part, ...] = ()
    if reward.lora.rank:
        trained = adapter_parameters(size, reward.lora.rank)
        frozen = (frozen_part("backbone", size.parameters, share, "float32"),)
    copies = (frozen_part("MetaRM's copies", 2 * trained, share, "float32"),) if metarm else ()  # theta, the ascent's direction
    held = max(2 * views * reward.batch_size, shifted)
    if reward.backward_size is not None:  # of each rank; a pair or a prompt's k samples are not divided
        held = min(held, share.num_ranks * max(reward.backward_size, meta.samples_per_prompt if metarm else 2))
    kept = activations(size, share, held, longest, reward.microbatch_size)
    name = "adapter" if reward.lora.rank else "reward model"
    return (*frozen, *trained_parts(name, trained, share), *copies, *_working(size, trained, share, kept))


def _working(size: ModelSize, trained: float, share: Share, *kept: Part, frozen: bool = False) -> tuple[Part, ...]:
    """What lives while the largest model computes, and what the optimizer's step needs beyond that.

    Frozen weights lie in the role's dtype already: one process makes no copies of them.
    """
    weights = None if frozen and share.num_ranks == 1 else working_weights(size, share)
    parts = kept if weights is None else (weights, *kept)
    if not share.num_gpus or share.num_ranks > 1:
        return parts  # AdamW goes from tensor to tensor there
    step = int(trained * MASTER) - sum(part.bytes for part in parts)
    return (*parts, Part("optimizer's step", step, "AdamW of all tensors at once, beyond the three above")) if step > 0 else parts
