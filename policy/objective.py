"""What one microbatch adds to the losses of policy and critic: forward pass, terms, diagnostics. Gradients are the caller's.

Letters: b rows of the microbatch, T positions (prompt + response + padding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from policy.config import PolicyConfig
from policy.experience import Experience
from policy.kl import kl_estimate
from policy.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from tokens.logprobs import response_logprobs, response_logprobs_and_entropy
from tokens.masked import masked_sum
from tokens.records import SequenceBatch


@dataclass(frozen=True)
class PolicyTerms:
    """The policy's loss of a microbatch, and what it is made of.

    Args:
        loss: scalar with gradient: surrogate + KL - entropy bonus, each divided by the denominator.
        surrogate: PPO's own part, with its diagnostics.
        entropy: scalar, sum over tokens of the whole distribution's entropy, nats; None where no bonus is asked for.
    """

    loss: Tensor
    surrogate: PolicyLoss
    entropy: Tensor | None


def policy_terms(
    policy: nn.Module,
    data: Experience,
    index: Tensor,
    denominator: Tensor,
    config: PolicyConfig,
    temperature: float,
    kl_coef: float,
) -> PolicyTerms:
    """The policy's loss on some rows.

        loss = surrogate + kl_coef * sum_t w_t kl_t / denominator - entropy_coef * sum_t H_t / denominator

    The second term is there where ``kl.place`` is ``loss``, the third where ``entropy_coef`` is above 0. w_t are the importance
    weights; that the policy has moved since the update began is left out of the KL, as it is small within a clip.

    Source: Schulman et al. 2017 (arXiv:1707.06347), Eq. 7 and 9; Schulman 2020 for kl_t.

    Args:
        policy: being trained.
        data: the batch.
        index: [b] int64, rows of it.
        denominator: tokens learned from in the whole minibatch (all microbatches, all ranks).
        config: the policy section.
        temperature: the sampler's.
        kl_coef: coefficient of the KL in the loss.

    Returns:
        The terms.

    Padding contract: positions that are not learned from are never read.
    """
    part = data.batch.rows(index)
    old, ref, advantages, weights, learned = (
        cut(x, index, part) for x in (data.old.logprobs, data.old.ref_logprobs, data.advantages, data.weights, data.learned)
    )
    entropy = None
    if config.entropy_coef:
        logprobs, entropies = response_logprobs_and_entropy(policy, part, temperature)
        entropy = masked_sum(entropies, learned)
    else:
        logprobs = response_logprobs(policy, part, temperature)
    surrogate = policy_loss(logprobs, old, advantages, learned, config.clip, denominator, weights, config.dual_clip)
    loss = surrogate.loss
    if config.kl.place == "loss" and kl_coef:
        loss = loss + kl_coef * masked_sum(weights * kl_estimate(logprobs, ref, config.kl.estimator), learned, denominator)
    if entropy is not None:
        loss = loss - config.entropy_coef * entropy / denominator
    return PolicyTerms(loss, surrogate, None if entropy is None else entropy.detach())


def critic_loss(
    critic: nn.Module, data: Experience, index: Tensor, denominator: Tensor, config: PolicyConfig, clip: float
) -> ValueLoss:
    """The critic's loss on some rows; ``policy.losses.value_loss`` has the formula.

    Source: Secrets of RLHF I (arXiv:2307.04964), value function clipping.

    Args:
        critic: being trained.
        data: the batch.
        index: [b] int64, rows of it.
        denominator: tokens learned from in the whole minibatch.
        config: the policy section.
        clip: of the value's move; ``math.inf`` = none.

    Returns:
        The loss.

    Padding contract: positions that are not learned from are never read.
    """
    part = data.batch.rows(index)
    old, returns, learned = (cut(x, index, part) for x in (data.old.values, data.returns, data.learned))
    return value_loss(critic(part), old, returns, learned, clip, denominator, config.value_loss)


def value_clip(config: PolicyConfig) -> float:
    """The clip of the critic's move as the loss takes it.

    Args:
        config: the policy section.

    Returns:
        ``value_clip``, infinity where it is null.

    Padding contract: none, there are no sequences.
    """
    return math.inf if config.value_clip is None else config.value_clip


def ptx_loss(policy: nn.Module, part: SequenceBatch, denominator: Tensor) -> Tensor:
    """Language-modelling loss on supervised responses.

        loss = -1/denominator * sum_t log pi(y_t | x, y_<t)

    Source: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 2, the pretraining term.

    Args:
        policy: being trained.
        part: b sequences.
        denominator: response tokens of all the texts of the step (all microbatches, all ranks).

    Returns:
        A scalar with gradient; at temperature 1, whatever the sampler's.

    Padding contract: positions outside the response mask are never read.
    """
    return -masked_sum(response_logprobs(policy, part), part.response_mask, denominator)


def ptx_batch(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], number: int, size: int, order: Tensor, pad_id: int
) -> SequenceBatch:
    """The texts of one optimizer step: pass after pass through a shuffled order.

    Args:
        examples: (prompt ids, response ids) of every text, at least one.
        number: of the optimizer step, from 0.
        size: texts of a step.
        order: [number of examples] int64, the shuffled order.
        pad_id: id written at padding.

    Returns:
        ``size`` texts, on the CPU.

    Padding contract: padded on the right to the longest of them.
    """
    chosen = [int(order[(number * size + i) % len(examples)]) for i in range(size)]
    return SequenceBatch.from_ids([examples[i][0] for i in chosen], [examples[i][1] for i in chosen], pad_id)


def cut(x: Tensor, index: Tensor, part: SequenceBatch) -> Tensor:
    """The rows of a [B, T] tensor that a part of the batch was made of, as wide as the part.

    Args:
        x: [B, T].
        index: [b] int64.
        part: ``batch.rows(index)``.

    Returns:
        [b, width of the part].

    Padding contract: drops columns that are padding in every row.
    """
    return x[index, : part.input_ids.shape[1]]
