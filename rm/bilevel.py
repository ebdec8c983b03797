"""A reward that is good when a policy has been optimised by it: the two levels, for one distribution after another.

    lower level   theta*(r) = argmin over theta of  mean over x of [ KL(pi_theta || pi_ref) - beta E_{y ~ pi_theta} r(x, y) ]
    upper level   min over phi of  mean over pairs of  -log sigma( log pi_theta*(y_w | x) - log pi_theta*(y_l | x) ),  r = r_phi

Our reconstruction: "Generalizing Reward Modeling for Out-of-Distribution Preference Learning" (2402.14760) states the two levels;
its official code trains something else. That beta multiplies the reward, that the upper loss compares the likelihoods of the
optimised policy, and the three ways below to differentiate it (``rm.hypergradient``) are ours.

The policy is log-linear over a finite set of candidates, log pi_theta = log softmax(log pi_ref + f theta); with one parameter for
each candidate (f the identity) it is tabular, and may be any distribution over them.

Letters: X prompts, K candidates of each, D policy parameters, N comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NEVER = -1e9
"""log pi_ref of a place in the table that holds no candidate: its probability is 0, and so is its gradient."""


@dataclass(frozen=True)
class Distribution:
    """One distribution that preferences are known of: its reference policy over candidates, and its comparisons.

    Args:
        name: of the domain, for messages.
        reference: [X, K] float, log pi_ref up to a constant of the prompt; ``NEVER`` where a prompt has fewer candidates.
        features: [X, K, D] float, f; None = tabular, D = X * K.
        lead: [N] float, log pi_ref(y_w | x) - log pi_ref(y_l | x).
        contrast: tabular: [2, N] int64, places of y_w and y_l in the flattened table, both of one prompt; else [N, D] float,
            f(x, y_w) - f(x, y_l), which may be of other prompts than the lower level's.

    Raises:
        ValueError: if there is no comparison, or the shapes do not fit.
    """

    name: str
    reference: Tensor
    features: Tensor | None
    lead: Tensor
    contrast: Tensor

    def __post_init__(self) -> None:
        number = len(self.lead)
        wanted = (2, number) if self.features is None else (number, self.features.shape[-1])
        if self.lead.dim() != 1 or number < 1 or tuple(self.contrast.shape) != wanted:
            raise ValueError(
                f"{self.name}: expected a lead [N] with N >= 1 and contrasts {wanted}, got {tuple(self.lead.shape)} and "
                f"{tuple(self.contrast.shape)}"
            )
        if self.features is not None and self.features.shape[:-1] != self.reference.shape:
            raise ValueError(
                f"{self.name}: features of {tuple(self.features.shape[:-1])} candidates, a reference of "
                f"{tuple(self.reference.shape)}"
            )

    @classmethod
    def tabular(cls, name: str, reference: Tensor, compared: Tensor) -> Distribution:
        """Every candidate has a parameter of its own, and the comparisons are among the candidates.

        Args:
            name: of the domain.
            reference: [X, K] float.
            compared: [2, N] int64, places of the better and the worse in the flattened table.
        """
        flat = reference.flatten()
        return cls(name, reference, None, flat[compared[0]] - flat[compared[1]], compared)

    @property
    def num_parameters(self) -> int:
        """D."""
        return self.reference.numel() if self.features is None else self.features.shape[-1]

    def log_policy(self, theta: Tensor) -> Tensor:
        """log pi_theta of every candidate.

            log softmax over a prompt's candidates of (log pi_ref + f theta)

        Args:
            theta: [D] float; 0 is the reference.

        Returns:
            [X, K], nats.
        """
        moved = theta.view_as(self.reference) if self.features is None else self.features @ theta
        return functional.log_softmax(self.reference + moved, dim=-1)

    def leads(self, theta: Tensor) -> Tensor:
        """log pi_theta(y_w | x) - log pi_theta(y_l | x); the normaliser cancels.

        Args:
            theta: [D] float.

        Returns:
            [N], nats.
        """
        if self.features is None:
            return self.lead + theta[self.contrast[0]] - theta[self.contrast[1]]
        return self.lead + self.contrast @ theta


def lower_loss(theta: Tensor, rewards: Tensor, distribution: Distribution, beta: float) -> Tensor:
    """What the policy minimises.

        G(theta, r) = 1/X sum over x of [ KL(pi_theta || pi_ref) - beta sum_y pi_theta(y | x) r(x, y) ]

    For a tabular policy the least is at pi* = pi_ref exp(beta r) / Z, that is at theta = beta r.

    Source: 2402.14760, lower level; our reconstruction in that beta multiplies the reward.

    Args:
        theta: [D] float.
        rewards: [X, K] float, of the candidates; finite also where there is none.
        distribution: of one domain.
        beta: reward factor, > 0.

    Returns:
        A scalar, nats per prompt.

    Padding contract: a place with ``NEVER`` adds nothing.
    """
    log_policy = distribution.log_policy(theta)
    log_reference = functional.log_softmax(distribution.reference, dim=-1)
    return (log_policy.exp() * (log_policy - log_reference - beta * rewards)).sum(-1).mean()


def upper_loss(theta: Tensor, distribution: Distribution) -> Tensor:
    """How badly the policy agrees with the preferences.

        F(theta) = -1/N sum log sigma( log pi_theta(y_w | x) - log pi_theta(y_l | x) )

    Source: 2402.14760, upper level; our reconstruction in that likelihoods are compared, without a scale.

    Args:
        theta: [D] float.
        distribution: of one domain.

    Returns:
        A scalar, nats per comparison.

    Padding contract: only candidates that are compared play a part.
    """
    return -functional.logsigmoid(distribution.leads(theta)).mean()


def table(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """Numbers of prompts with unlike many candidates as one rectangle.

    Source: none needed.

    Args:
        rows: X of them, of k numbers each.
        fill: where a prompt has fewer than the most.

    Returns:
        [X, K] float32, K the largest k.

    Padding contract: ``fill`` stands behind a row's own numbers.
    """
    width = max(map(len, rows))
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows])
