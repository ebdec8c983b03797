"""The contrastive part of a reward model's objective: its settings, how large a batch it needs, and its prototypes over a fit.

Letters: N rows of a view, H features, K prototypes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rm.config import ContrastiveConfig, RewardConfig
from rm.contrastive import contrasted, prototype_scores, prototype_usage, simcse_loss, swav_loss
from tokens.errors import UserError

COLLAPSED = 1.1
"""Prototypes in effective use below which the rows of a batch all look the same to them."""
COLLAPSE_STEPS = 50
"""Steps in a row after which that is said: at the start of a fit the prototypes are random, and tell little apart yet."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContrastiveSettings:
    """What ``reward.contrastive`` comes to where it is left null.

    Source: Secrets of RLHF Part II, appendix B (beta, K). It gives no temperature: SimCSE's own 0.05, SwAV's own 0.1.

    Args:
        beta: weight beside the preference loss.
        temperature: tau.
        num_prototypes: K; 0 for SimCSE.
    """

    beta: float
    temperature: float
    num_prototypes: int

    @classmethod
    def of(cls, config: ContrastiveConfig) -> ContrastiveSettings:
        """What is given, and the paper's values for what is null.

        Args:
            config: reward.contrastive, of a method that is not "none".

        Returns:
            The settings.
        """
        if config.method == "simcse":
            return cls(_or(config.beta, 1.0), _or(config.temperature, 0.05), 0)
        beta, num_prototypes = (0.1, 50) if config.on == "pairs" else (0.5, 20)
        return cls(_or(config.beta, beta), _or(config.temperature, 0.1), config.num_prototypes or num_prototypes)


def rows_needed(config: ContrastiveConfig) -> int:
    """Fewest rows of a view with which the contrastive loss says anything.

    SimCSE: 2, or a row has nothing to be told from. SwAV: more than K / 2. Sinkhorn gives every prototype N / K rows' worth, so a
    row can lean to one prototype with at most N / K; with K / 2 rows or fewer it cannot lean to one more than to all others
    together. The paper's batch of 16 pairs passes: 32 rows for K = 50, 16 for K = 20.

    Args:
        config: reward.contrastive.

    Returns:
        Rows; 0 for "none".
    """
    if config.method == "none":
        return 0
    return max(2, ContrastiveSettings.of(config).num_prototypes // 2 + 1)


def check_contrastive(reward: RewardConfig, num_pairs: int, num_ranks: int) -> None:
    """Refuse settings under which the contrastive loss cannot work; to be asked before any work starts.

    Args:
        reward: the settings; without a contrastive method all is well.
        num_pairs: in D.
        num_ranks: processes that share the model. A row is told from all others of its batch, so one process must hold them all.

    Raises:
        UserError: if there are several ranks, two rates of dropout, or no batch with enough rows: on "pairs" a pair gives 2, on
            "differences" 1.
    """
    config = reward.contrastive
    if config.method == "none":
        return
    if num_ranks > 1:
        raise UserError(
            f"reward.contrastive.method={config.method} contrasts all rows of a batch, which {num_ranks} processes would share: "
            "expected 1. Train the reward model in one process, or set the method to none."
        )
    if reward.dropout > 0:
        raise UserError(
            f"reward.dropout is {reward.dropout}, and reward.contrastive.dropout={config.dropout} already makes the two views: "
            "expected one of them. Set reward.dropout to 0."
        )
    largest = min(reward.batch_size, num_pairs)
    rows, needed, per_pair = _rows(config, largest), rows_needed(config), _rows(config, 1)
    if rows >= needed:
        return
    got = f"{largest} pairs in the largest batch give {rows} rows for {config.method} on {config.on}"
    remedy = f"Set reward.batch_size to at least {-(-needed // per_pair)}, with as many pairs"
    if config.method == "simcse":
        raise UserError(f"{got}: expected at least {needed}, so that a row can be told from another. {remedy}.")
    num_prototypes = ContrastiveSettings.of(config).num_prototypes
    other = f", or reward.contrastive.num_prototypes to at most {2 * rows - 1}" if rows > 1 else ""
    raise UserError(
        f"{got}, too few for reward.contrastive.num_prototypes={num_prototypes}: expected more than half as many rows as "
        f"prototypes. {remedy}{other}."
    )


class ContrastiveTerm:
    """L_cl of one batch after another. For SwAV it owns the prototypes, which are trained but are no part of the model.

    Args:
        config: reward.contrastive, of a method that is not "none".
        num_features: H of the model.
        seed: of the prototypes' first directions; the global generator is not touched.
        device: of the features.
    """

    def __init__(self, config: ContrastiveConfig, num_features: int, seed: int, device: torch.device) -> None:
        self.config = config
        self.settings = ContrastiveSettings.of(config)
        self.prototypes: nn.Parameter | None = None
        """[K, H] float32, any length: every step takes their directions only. None for SimCSE."""
        self.parts: dict[str, float] = {}
        """What the last batch reports: the loss, how alike the two views are, and how many prototypes tell the rows apart."""
        self.steps_collapsed = 0
        if config.method == "swav":
            drawn = torch.randn(self.settings.num_prototypes, num_features, generator=torch.Generator().manual_seed(seed))
            self.prototypes = nn.Parameter(functional.normalize(drawn, dim=-1).to(device))

    def __call__(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
        """L_cl between two dropout views of the same pairs. 0 for a batch too small to say anything, the last of an epoch.

        Args:
            first: features of the chosen and of the rejected responses, [pairs, H] each.
            second: the same under another dropout mask.

        Returns:
            A scalar, nats per row, not yet weighted by beta.
        """
        s, t = contrasted(*first, self.config.on), contrasted(*second, self.config.on)
        if len(s) < rows_needed(self.config):
            self.parts = {}
            return 0 * s.sum()
        loss = self._loss(s, t)
        self.parts = {
            "reward/contrastive": float(loss.detach()),
            "reward/view_cos": float(functional.cosine_similarity(s.detach(), t.detach()).mean()),
        }
        if self.prototypes is not None:
            self._watch(s, t, self.prototypes.detach())
        return loss

    def _loss(self, s: Tensor, t: Tensor) -> Tensor:
        if self.prototypes is None:
            return simcse_loss(s, t, self.settings.temperature)
        prototypes = self.prototypes.to(s.dtype)
        return swav_loss(s, t, prototypes, self.settings.temperature, self.config.epsilon, self.config.sinkhorn_iterations)

    def _watch(self, s: Tensor, t: Tensor, prototypes: Tensor) -> None:
        usage = prototype_usage(prototype_scores(torch.cat([s, t]).detach(), prototypes.to(s.dtype)), self.settings.temperature)
        self.parts |= {"reward/prototypes_effective": usage.effective, "reward/prototypes_used": usage.share}
        self.steps_collapsed = self.steps_collapsed + 1 if usage.effective < COLLAPSED else 0
        if self.steps_collapsed == COLLAPSE_STEPS:
            log.warning(
                "swav on %s has told no rows apart for %d steps (%.2f of %d prototypes in effective use): they have collapsed, "
                "or were never learnt. Lower reward.contrastive.num_prototypes, temperature or epsilon, or raise "
                "reward.batch_size or reward.lr",
                self.config.on,
                COLLAPSE_STEPS,
                usage.effective,
                self.settings.num_prototypes,
            )


def _rows(config: ContrastiveConfig, num_pairs: int) -> int:
    return 2 * num_pairs if config.on == "pairs" else num_pairs


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
