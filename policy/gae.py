"""Generalised advantage estimation over response tokens.

Letters: B rollouts, T positions (prompt + response + padding).
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every response token.

        delta_t = r_t + gamma * V_next - V_t,    A_t = delta_t + gamma * lam * A_next,    return_t = A_t + V_t

    where "next" is the next position of the row at which ``mask`` is True. A response ends its episode:
    after its last token V_next = A_next = 0, also when the token limit cut it.

    Source: Schulman et al. 2016 (arXiv:1506.02438), Eq. 16, on a finite episode.

    Args:
        rewards: [B, T] float, reward for emitting token t.
        values: [B, T] float, the critic's estimate from the state before token t.
        mask: [B, T] bool, True = a response token.
        gamma: discount, in (0, 1].
        lam: mixes one-step (0) and Monte Carlo (1) estimates, in [0, 1].

    Returns:
        Advantages and returns, each [B, T] of the dtype of ``values``; 0 outside ``mask``; no gradient.

    Raises:
        ValueError: if shapes differ, ``mask`` is not bool, or a factor lies outside its range.

    Padding contract: the recursion carries through positions outside ``mask``, so padding on the left, on the right or in
    the middle changes nothing; values there are never read, not even as 0 * NaN.
    """
    if not (rewards.shape == values.shape == mask.shape) or rewards.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(
            "gae needs rewards, values and a bool mask of one shape [B, T], got "
            f"{tuple(rewards.shape)}, {tuple(values.shape)}, {tuple(mask.shape)} ({mask.dtype})"
        )
    if not 0 < gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gae needs gamma in (0, 1] and lam in [0, 1], got {gamma} and {lam}")
    values = torch.where(mask, values.detach(), 0.0)
    rewards = torch.where(mask, rewards.detach(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # [B]
    next_advantage = torch.zeros_like(next_value)  # [B]
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        counts = mask[:, t]
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
    return advantages, advantages + values
