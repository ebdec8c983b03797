"""How likely a model and the SFT model find the same responses: what KL and perplexity are made of.

Letters: B rollouts, T positions (prompt + response + padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.experience import rollout_batch
from policy.microbatches import divide
from tokens.logprobs import response_logprobs
from tokens.lora import WithoutAdapters
from tokens.packing import is_packed
from tokens.ranks import ALONE, Ranks
from tokens.records import Rollout


@dataclass(frozen=True)
class SequenceStatistics:
    """Sums over each response.

    Args:
        policy_logprob: [B] float64, nats, sum over the response's tokens under the policy.
        sft_logprob: [B] float64, nats, the same under the SFT model.
        num_tokens: [B] int64, response tokens, EOS included.
    """

    policy_logprob: Tensor
    sft_logprob: Tensor
    num_tokens: Tensor

    def kl(self) -> float:
        """KL(policy || SFT) per response, nats: mean over rollouts of the summed log-ratio (k1)."""
        return float((self.policy_logprob - self.sft_logprob).mean())

    def perplexity(self) -> float:
        """Of the responses under the SFT model: exp(-sum of log-probs / number of tokens)."""
        return float(torch.exp(-self.sft_logprob.sum() / self.num_tokens.sum()))


@torch.no_grad()
def sequence_statistics(
    model: PreTrainedModel,
    sft: PreTrainedModel | WithoutAdapters,
    rollouts: Sequence[Rollout],
    pad_id: int,
    temperature: float,
    microbatch: int,
    ranks: Ranks = ALONE,
    tokens: int | None = None,
) -> SequenceStatistics:
    """Summed log-probabilities of each response under a policy and under the SFT model.

        policy_logprob = sum_t log pi(y_t | x, y_<t),    sft_logprob = sum_t log pi_sft(y_t | x, y_<t)

    Source: Gao et al. 2022 (arXiv:2210.10760): the distance d = sqrt(KL(pi || pi_init)) is estimated from such sums.

    Args:
        model: the policy, in evaluation mode.
        sft: the SFT model, in evaluation mode; may be the policy without its adapters.
        rollouts: B rollouts that the policy sampled.
        pad_id: id written at padding.
        temperature: applied to both models; the sampler's for an unbiased KL of what was sampled.
        microbatch: sequences per forward pass, where ``tokens`` is None.
        ranks: that share the two models; all must call this, with the same rollouts.
        tokens: most tokens of a forward pass of several sequences, padding included where they are not packed.

    Returns:
        The sums, on the CPU.

    Raises:
        ValueError: if there are no rollouts.

    Padding contract: equal for a batch with more padding.
    """
    batch = rollout_batch(rollouts, pad_id)
    sums: list[list[Tensor]] = [[], []]
    division = divide(batch.lengths(), torch.arange(len(batch)), ranks, microbatch, tokens, is_packed(model))
    for index in division.rows():
        part = batch.rows(index)
        for which, each in enumerate((model, sft)):
            sums[which].append(response_logprobs(each, part.to(each.device), temperature).double().sum(-1).cpu())
    gathered = [division.whole(torch.cat(each)) for each in sums]
    return SequenceStatistics(gathered[0], gathered[1], batch.response_mask.sum(-1))
