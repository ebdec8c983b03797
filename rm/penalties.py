"""Staying near to where a fit started: what customisation is compared with that keeps general knowledge by other means.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rm.model import RewardModel
from rm.ranked import score_responses
from rm.ranking import comparisons, ranking_loss
from tokens.queries import Query


@dataclass(frozen=True, eq=False)
class QuadraticPenalty:
    """A spring from each weight to where it was.

        L = coef / 2 * sum_i F_i (theta_i - theta*_i)^2

    F = 1 is L2-to-start; F = the diagonal of the Fisher information on general data is elastic weight consolidation.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", Eq 3 (EWC); Li et al. 2018,
    "Explicit inductive bias for transfer learning" (L2-SP).

    Args:
        parameters: what is trained.
        start: theta*, of the same shapes.
        stiffness: F, of the same shapes; None = 1 everywhere.
        coef: lambda, >= 0.
    """

    parameters: Sequence[nn.Parameter]
    start: Sequence[Tensor]
    stiffness: Sequence[Tensor] | None
    coef: float

    @classmethod
    def at(cls, parameters: Sequence[nn.Parameter], stiffness: Sequence[Tensor] | None, coef: float) -> QuadraticPenalty:
        """With theta* = the weights as they are now.

        Args:
            parameters: what is trained.
            stiffness: F; None = 1.
            coef: lambda.
        """
        return cls(parameters, [p.detach().clone() for p in parameters], stiffness, coef)

    def __call__(self) -> Tensor:
        """The penalty, with gradient."""
        stiffness = [None] * len(self.start) if self.stiffness is None else self.stiffness
        total = torch.zeros((), device=self.parameters[0].device)
        for parameter, start, weight in zip(self.parameters, self.start, stiffness, strict=True):
            moved = (parameter - start).square()
            total = total + (moved if weight is None else weight * moved).sum()
        return 0.5 * self.coef * total


def fisher_diagonal(
    model: RewardModel,
    queries: Sequence[Query],
    parameters: Sequence[nn.Parameter],
    pad_id: int,
    microbatch: int,
    on_query: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """How much each weight matters to the ranking of general responses.

        F_i = mean over queries of (d/dtheta_i sum over the query's comparisons of log sigma(r_better - r_worse))^2

    The labels are those of the data (the empirical Fisher information), one backward pass a query.

    Source: Kirkpatrick et al. 2017, section 2 (F of the task that must not be forgotten).

    Args:
        model: on its device; its gradients are cleared.
        queries: general ones, at least one with a comparison.
        parameters: P tensors, of the model.
        pad_id: id written at padding.
        microbatch: sequences per forward pass.
        on_query: called after each.

    Returns:
        P tensors of the parameters' shapes.

    Raises:
        ValueError: if there is no comparison.

    Padding contract: equal for any microbatch.
    """
    told = [query for query in queries if query.comparisons]
    if not told:
        raise ValueError("the Fisher information needs queries with a comparison, got none")
    sums = [torch.zeros_like(p) for p in parameters]
    for query in told:
        scores = score_responses(model, [query], pad_id, microbatch)
        loss = ranking_loss(scores, comparisons([query]), 1.0)
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total += gradient.square()
        on_query()
    return [total / len(told) for total in sums]
