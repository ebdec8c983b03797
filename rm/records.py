"""What a fit of a reward model reports: each step, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rm.metarm import MetaStep


@dataclass(frozen=True)
class RewardStep:
    """One optimizer step.

    Args:
        step: counted from 1 over the whole fit.
        num_steps: steps of the whole fit.
        num_pairs: pairs in this step.
        loss: Bradley-Terry loss, nats per pair; at theta' under MetaRM.
        accuracy: share of the step's pairs ranked as labelled, before the update; at theta' under MetaRM.
        lr: learning rate of this step.
        gradient_norm: before clipping.
        meta: what the MetaRM step saw; None for a vanilla step.
        duplicates: responses among the step's m * k that repeat an earlier one of their prompt (no gradient between them).
    """

    step: int
    num_steps: int
    num_pairs: int
    loss: float
    accuracy: float
    lr: float
    gradient_norm: float
    meta: MetaStep | None
    duplicates: int

    def as_dict(self) -> dict[str, float]:
        """The step as a row of the metrics file.

        Returns:
            Numbers by name; those of MetaRM only where it ran.
        """
        row = {
            "reward/loss": self.loss,
            "reward/accuracy": self.accuracy,
            "reward/lr": self.lr,
            "reward/gradient_norm": self.gradient_norm,
        }
        if self.meta is None:
            return row
        row |= {
            "reward/J": self.meta.difference,
            "reward/J_gradient_norm": self.meta.ascent_norm,
            "reward/displacement": self.meta.displacement,
            "reward/relative_displacement": self.meta.relative_displacement,
            "reward/alignment_cos": self.meta.alignment_cos,
            "reward/duplicates": float(self.duplicates),
        }
        if self.meta.difference_ascended is not None:
            row["reward/J_ascended"] = self.meta.difference_ascended
        return row


@dataclass(frozen=True)
class RewardFit:
    """A whole fit: means over its last quarter of steps.

    Args:
        num_steps: optimizer steps taken.
        loss: Bradley-Terry loss, nats per pair.
        accuracy: share of training pairs ranked as labelled.
        difference: J at theta; None for a vanilla fit, like the next four.
        difference_ascended: J at theta'.
        displacement: ||theta' - theta||.
        alignment_cos: cos(-gL, gJ).
        duplicate_share: of all responses of S_k, those that repeat an earlier one of their prompt.
    """

    num_steps: int
    loss: float
    accuracy: float
    difference: float | None
    difference_ascended: float | None
    displacement: float | None
    alignment_cos: float | None
    duplicate_share: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The fit as the round's ledger names it.

        Returns:
            Numbers by name; None where MetaRM did not run.
        """
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "J_before": self.difference,
            "J_after": self.difference_ascended,
            "displacement": self.displacement,
            "alignment_cos": self.alignment_cos,
            "duplicate_share": self.duplicate_share,
        }

    @classmethod
    def of(cls, steps: Sequence[RewardStep], duplicate_share: float | None) -> RewardFit:
        """Means over the last quarter of the steps (at least one).

        Args:
            steps: all of them, at least one.
            duplicate_share: of S_k; None for a vanilla fit.

        Returns:
            The fit.
        """
        last = steps[-max(1, len(steps) // 4) :]
        meta = [step.meta for step in last if step.meta is not None]
        ascended = [step.difference_ascended for step in meta if step.difference_ascended is not None]
        return cls(
            num_steps=len(steps),
            loss=fmean(step.loss for step in last),
            accuracy=fmean(step.accuracy for step in last),
            difference=fmean(step.difference for step in meta) if meta else None,
            difference_ascended=fmean(ascended) if ascended else None,
            displacement=fmean(step.displacement for step in meta) if meta else None,
            alignment_cos=fmean(step.alignment_cos for step in meta) if meta else None,
            duplicate_share=duplicate_share,
        )
