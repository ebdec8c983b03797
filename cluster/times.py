"""How long the phases of a run should take on GPUs, from FLOPs and bandwidths. Formulas and worked numbers: docs/planning.md.

Letters: N parameters that a token is multiplied by, T tokens, B sequences, P prompt tokens, G GPUs, F FLOP/s achieved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from actors.config import Share
from cluster.config import RunConfig
from cluster.memory import BYTES, MASTER, Cache, cache_token_bytes, narrow
from cluster.model_sizes import ModelSize

Bound = Literal["compute", "memory", "link"]

TFLOPS = 989.0
"""Dense bfloat16 peak of an H100 SXM or H200, NVIDIA's data sheet; products of 8192 x 8192 reach about 780 of it."""
FLOAT32_SHARE = 67.0 / 989.0
"""Of that peak, what float32 without tensor cores has (same data sheet); torch's default keeps float32 products exact."""
H100_TBS = 3.35
"""Memory bandwidth of an H100 SXM with 80 GB, data sheet."""
H200_TBS = 4.8
"""Memory bandwidth of an H200 with 141 GB, data sheet; 4.3 were measured for a copy."""
LINK_GBS = 50.0
"""Between nodes, for each GPU: 400 Gb/s InfiniBand."""
NVLINK_GBS = 450.0
"""Between the GPUs of a node, one direction: NVLink 4, data sheet."""
TRAINING_MFU = 0.25
"""Share of the peak that training reaches: 23 to 27 % were measured on one H200 for 1B and (with adapters) 7B parameters, in
benchmarks/results/gpu.jsonl. Llama 3 reports 38 to 43 % (arXiv:2407.21783, table 4)."""
SCORING_MFU = 0.31
"""Share of the peak that forward passes reach: measured there for a reward model of 1B parameters."""
SECOND_ORDER = 2
"""A MetaRM step of order 2 takes about twice as long as one of order 1: the gradient is differentiated once more."""


@dataclass(frozen=True)
class Speeds:
    """What the times rest on.

    Args:
        name: of the GPU that the numbers are of.
        tflops: dense bfloat16 peak that both MFUs are shares of.
        bandwidth_tbs: of a GPU's memory, TB/s.
        link_gbs: between nodes, a GPU, GB/s.
        nvlink_gbs: within a node, a GPU, GB/s.
        mfu: of training.
        scoring_mfu: of forward passes, prompts and large decoding batches.
    """

    name: str
    tflops: float
    bandwidth_tbs: float
    link_gbs: float
    nvlink_gbs: float
    mfu: float
    scoring_mfu: float

    def training(self, dtype: str) -> float:
        """FLOP/s of one GPU that trains."""
        return self.tflops * 1e12 * self.mfu * (1.0 if dtype == "bfloat16" else FLOAT32_SHARE)

    def scoring(self, dtype: str) -> float:
        """FLOP/s of one GPU in a forward pass."""
        return self.tflops * 1e12 * self.scoring_mfu * (1.0 if dtype == "bfloat16" else FLOAT32_SHARE)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a response: the limits, or a mean that the user names."""

    prompt: float
    response: float

    @property
    def whole(self) -> float:
        """Of both."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Phase:
    """One row of the table: seconds, and what bounds them."""

    name: str
    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Times:
    """A step's phases and a round's, seconds. Overlapped, a step takes the longer of sampling and all else."""

    step: tuple[Phase, ...]
    round: tuple[Phase, ...]
    steps: int
    max_lag: int

    @property
    def sampling(self) -> float:
        """g: seconds of a step in which the engines sample."""
        return sum(phase.seconds for phase in self.step if phase.name.startswith("sample"))

    @property
    def synchronous(self) -> float:
        """g + t: seconds of a step whose phases follow one another."""
        return sum(phase.seconds for phase in self.step)

    @property
    def overlapped(self) -> float:
        """max(g, t): seconds of a step whose batch was sampled while the last one was learned from."""
        return max(self.sampling, self.synchronous - self.sampling)

    @property
    def per_round(self) -> float:
        """Seconds of a round."""
        step = self.overlapped if self.max_lag else self.synchronous
        return step * self.steps + sum(phase.seconds for phase in self.round)


def token_flops(size: ModelSize, length: float) -> float:
    """FLOPs of one token's forward pass: 2 N, and attention over half of the sequence on the average.

        2 N + 2 L a length,   a = heads * head size

    Source: Kaplan et al. 2020 (arXiv:2001.08361), table 1; attention causal.

    Args:
        size: of the model.
        length: of the sequence, tokens.

    Returns:
        The FLOPs.
    """
    return 2.0 * size.products + 2.0 * size.num_layers * size.num_heads * size.head_size * length


def bounded(name: str, compute: float, memory: float = 0.0, link: float = 0.0) -> Phase:
    """A phase whose parts overlap at best: the longest of them counts.

    Args:
        name: of the phase.
        compute: seconds of arithmetic.
        memory: seconds of reading memory.
        link: seconds of exchange between GPUs.

    Returns:
        The phase.
    """
    bounds: tuple[tuple[float, Bound], ...] = ((compute, "compute"), (memory, "memory"), (link, "link"))
    seconds, bound = max(bounds, key=lambda each: each[0])
    return Phase(name, seconds, bound)


@dataclass(frozen=True)
class Clock:
    """Times the phases of one run.

    Args:
        config: of the run.
        policy: size of the policy.
        reward: size of a reward model and of the critic.
        speeds: of the GPUs.
        lengths: assumed.
        num_pairs: of D.
        cache: of one engine.
        across: roles whose ranks lie on several nodes.
    """

    config: RunConfig
    policy: ModelSize
    reward: ModelSize
    speeds: Speeds
    lengths: Lengths
    num_pairs: int
    cache: Cache
    across: frozenset[str]

    def times(self) -> Times:
        """The step's phases, and those that a round has beside its steps."""
        policy, meta, evaluation = self.config.policy, self.config.meta, self.config.evaluation
        rollouts = policy.prompts_per_step * policy.samples_per_prompt
        step = (
            *self.sample(policy.prompts_per_step, policy.samples_per_prompt),
            self.score("score", rollouts),
            self.experience(rollouts),
            self.update(rollouts),
            self.sync(),
        )
        shifted = self.sample(meta.num_prompts, meta.samples_per_prompt)
        judged = self.sample(evaluation.num_prompts, 1)
        warm_up = (self.warm_up(rollouts),) if policy.critic_start != "previous" and policy.critic_warmup_steps else ()
        whole = (
            _together("sample S_k", shifted),
            self.train_reward(),
            self.score("score S_k", meta.num_prompts * meta.samples_per_prompt),
            *warm_up,
            _together("evaluate", (*judged, self.score("", evaluation.num_prompts))),
        )
        return Times(step, whole, policy.steps_per_round, self.config.policy.max_lag)

    def sample(self, prompts: int, samples: int) -> tuple[Phase, Phase]:
        """Prompts once each, whatever the samples (prefix sharing); then one token of each running sequence a decoding step.

            prompts:    P * token_flops / (G F)
            responses:  waves * response * max((W + B ctx kv) / (G BW), B token_flops / (G F)),   ctx = P + response / 2

        B is what an engine runs at once: the samples that it is asked for, or as many as its cache holds; then in waves.
        Source: the roofline of Williams et al. 2009; prefix sharing as in Kwon et al. 2023, section 4.4.

        Args:
            prompts: over all engines.
            samples: of each.

        Returns:
            The two phases, of the engine that has most to do.
        """
        share, rollout, size, lengths = self.config.resources.rollout, self.config.rollout, self.policy, self.lengths
        gpus, number = rollout.tensor_parallel, -(-prompts // rollout.num_engines)
        flops, bandwidth = gpus * self.speeds.scoring(share.dtype), gpus * self.speeds.bandwidth_tbs * 1e12
        prefill = bounded("sample: prompts", number * lengths.prompt * token_flops(size, lengths.prompt) / flops)
        wanted = number * samples
        fit = max(1, int(self.cache.tokens // lengths.whole))
        waves = -(-wanted // fit)
        running, context = wanted / waves, lengths.prompt + lengths.response / 2
        read = size.products * BYTES[share.dtype] + running * context * cache_token_bytes(size, share.dtype, gpus)
        steps = waves * lengths.response
        computed = running * token_flops(size, 2 * context) / flops
        return prefill, bounded("sample: responses", steps * computed, memory=steps * read / bandwidth)

    def score(self, name: str, rollouts: int) -> Phase:
        """2 N T for each member, one after another; the processes share the rollouts out."""
        share, lengths, scorer = self.config.resources.scorer, self.lengths, self.config.scorer
        own = -(-rollouts // share.num_ranks)
        flops = scorer.num_members * own * lengths.whole * token_flops(self.reward, lengths.whole)
        return bounded(name, flops / self.speeds.scoring(share.dtype))

    def experience(self, rollouts: int) -> Phase:
        """Log-probs of policy and reference, and values: 2 N T each."""
        share = self.config.resources.learner
        tokens = rollouts * self.lengths.whole / share.num_ranks
        passes = self._passes(rollouts)
        models = (self.policy, self.policy, self.reward)
        flops = tokens * sum(token_flops(size, self.lengths.whole) for size in models)
        link = passes * sum(self._gathered(size, share) for size in models) / self._rate("learner")
        return bounded("policy: experience", flops / self.speeds.scoring(share.dtype), link=link)

    def update(self, rollouts: int) -> Phase:
        """6 N T for policy and critic, 8 with recomputation, every epoch."""
        epochs = self.config.policy.epochs
        return self._learn("policy: update", (self.policy, self.reward), epochs * rollouts)

    def warm_up(self, rollouts: int) -> Phase:
        """The critic alone, and the experience once more."""
        policy = self.config.policy
        learned = self._learn("critic warm-up", (self.reward,), policy.critic_warmup_steps * policy.minibatch_size)
        return _together("critic warm-up", (self.experience(rollouts), learned))

    def _learn(self, name: str, models: tuple[ModelSize, ...], sequences: int) -> Phase:
        share, policy = self.config.resources.learner, self.config.policy
        minibatches = sequences // policy.minibatch_size
        micro = minibatches * self._passes(policy.minibatch_size)
        factor, tokens = 4 if policy.lora.rank else 6, sequences * self.lengths.whole
        flops = sum(self._training_flops(size, share, tokens, factor) for size in models) / share.num_ranks
        link = (
            micro * sum(2 * self._gathered(size, share) + self._reduced(size, share) for size in models) / self._rate("learner")
        )
        return bounded(name, flops / self.speeds.training(share.dtype), link=link)

    def _passes(self, sequences: int) -> int:
        """Microbatches that a rank of the learner makes of so many sequences."""
        policy, own = self.config.policy, sequences / self.config.resources.learner.num_ranks
        at_once: float = policy.microbatch_size
        if policy.microbatch_tokens is not None:
            at_once = max(1.0, policy.microbatch_tokens // self.lengths.whole)
        return math.ceil(own / at_once)

    def train_reward(self) -> Phase:
        """6 N T (8 with recomputation) of two responses a pair and of S_k's share in a step, for every member that is fitted.

        So a step takes 1 + m times as long with MetaRM, m = tokens of S_k / tokens of pairs.
        """
        share, reward, meta = self.config.resources.reward, self.config.reward, self.config.meta
        views = 1 if reward.contrastive.method == "none" else 2
        steps = reward.epochs * -(-self.num_pairs // reward.batch_size)
        shifted = meta.prompts_per_step * meta.samples_per_prompt if meta.enabled else 0
        fits = self.config.scorer.num_members if self.config.scorer.refresh == "each_round" else 1
        sequences = 2 * views * reward.batch_size + shifted
        order = SECOND_ORDER if meta.enabled and meta.order == 2 else 1
        factor = 4 if reward.lora.rank else 6  # frozen weights need no gradient
        flops = self._training_flops(self.reward, share, sequences * self.lengths.whole, factor) * order * steps * fits
        trips = steps * fits * order * -(-sequences // (share.num_ranks * reward.microbatch_size))
        link = trips * (2 * self._gathered(self.reward, share) + self._reduced(self.reward, share)) / self._rate("reward")
        return bounded("reward model", flops / share.num_ranks / self.speeds.training(share.dtype), link=link)

    def sync(self) -> Phase:
        """The policy's weights, in the engines' dtype, once over a link: b N / rate."""
        sent = BYTES[self.config.resources.rollout.dtype] * self.policy.parameters
        return bounded("sync", 0.0, link=sent / (self.speeds.link_gbs * 1e9))

    def _training_flops(self, size: ModelSize, share: Share, tokens: float, factor: int = 6) -> float:
        passes = factor / 2 + (1 if share.recompute_activations else 0)
        return passes * tokens * token_flops(size, self.lengths.whole)

    def _gathered(self, size: ModelSize, share: Share) -> float:
        """Bytes that a rank receives when every unit is gathered once: b N (R - 1) / R."""
        width = BYTES["bfloat16"] if narrow(share) else MASTER
        return width * size.parameters * (share.num_ranks - 1) / share.num_ranks

    def _reduced(self, size: ModelSize, share: Share) -> float:
        """Bytes of gradients, in float32, summed over the ranks: 4 N (R - 1) / R."""
        return MASTER * size.parameters * (share.num_ranks - 1) / share.num_ranks

    def _rate(self, role: str) -> float:
        return 1e9 * (self.speeds.link_gbs if role in self.across else self.speeds.nvlink_gbs)


def _together(name: str, phases: tuple[Phase, ...]) -> Phase:
    """Phases one after another, bounded by what bounds the longest."""
    return Phase(name, sum(phase.seconds for phase in phases), max(phases, key=lambda phase: phase.seconds).bound)
