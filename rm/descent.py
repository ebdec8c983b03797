"""A step of AdamW on a reward model, and what is done about one whose numbers went wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from rm.config import RewardConfig
from tokens.guards import BadNumber, Budget
from tokens.ranks import clip_gradients, weights_norm

log = logging.getLogger(__name__)

Step = TypeVar("Step")


def adamw(trained: Sequence[nn.Parameter], lr: float, reward: RewardConfig) -> torch.optim.AdamW:
    """The optimizer of a fit.

    Args:
        trained: parameters.
        lr: peak learning rate.
        reward: betas, eps and weight decay.
    """
    return torch.optim.AdamW(trained, lr=lr, betas=(reward.beta1, reward.beta2), eps=reward.eps, weight_decay=reward.weight_decay)


def descend(
    optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], max_norm: float, lr: float | Sequence[float], what: str
) -> float:
    """Clip the gradients, and take a step.

    Args:
        optimizer: of the parameters.
        trained: those with a gradient; on several ranks all call this.
        max_norm: largest norm of the gradient.
        lr: learning rate of the step, of all parameters or of each of the optimizer's groups.
        what: the loss, for messages.

    Returns:
        The gradient's norm before clipping.

    Raises:
        BadNumber: if it is not finite; nothing is changed.
    """
    norm = clip_gradients(trained, max_norm)
    if not math.isfinite(norm):
        raise BadNumber(f"the gradient norm of the {what}", norm)
    rates = [lr] * len(optimizer.param_groups) if isinstance(lr, float) else lr
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def within(
    budget: Budget,
    attempt: Callable[[], Step],
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    where: str,
    advice: str,
) -> Step | None:
    """Take a step, or leave it out where a number went wrong before anything was changed.

    Args:
        budget: of steps that may be left out.
        attempt: takes the step.
        optimizer: whose gradients are dropped then.
        trained: parameters.
        where: step of the fit, for messages.
        advice: what to lower.

    Returns:
        What ``attempt`` did; None where it was left out.

    Raises:
        BadNumber: if the budget is spent, or the weights themselves are broken.
    """
    try:
        step = attempt()
    except BadNumber as bad:
        optimizer.zero_grad(set_to_none=True)
        budget.bad()
        broken = not math.isfinite(weights_norm(trained))
        why = "the weights themselves are not finite" if broken else budget.spent()
        if why:
            raise bad.found(where, undo=broken, note=f"{why}; lower {advice}") from bad
        log.warning("left out: %s", bad.found(where))
        return None
    budget.good()
    return step


def check_weights(trained: Sequence[nn.Parameter], where: str, advice: str) -> None:
    """Weights that are kept are finite, also those that nothing in the last steps has read.

    Args:
        trained: parameters.
        where: step of the fit, for messages.
        advice: what to lower.

    Raises:
        BadNumber: if one is not.
    """
    norm = weights_norm(trained)
    if not math.isfinite(norm):
        raise BadNumber("the norm of the weights", norm, where=where, undo=True, note=f"lower {advice}")
