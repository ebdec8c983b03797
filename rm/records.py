"""What a fit of a reward model reports: each step, and the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rm.spread import Separation


@dataclass(frozen=True)
class MetaStep:
    """What one step saw. Norms run over all trainable parameters.

    Args:
        loss: L where it was differentiated: at theta', under the joint objective at theta; nats per pair.
        difference: J at theta.
        difference_ascended: J at theta'; None unless it was measured, and where there is no theta' (joint).
        heldout: J and spread at theta, on samples that no ascent sees; None unless measured.
        heldout_ascended: likewise at theta'.
        displacement: ||theta' - theta|| as it really came out, after rounding; 0 under the joint objective.
        relative_displacement: displacement / ||theta||.
        ascent_norm: ||gJ|| at theta.
        gradient_norm: ||g||, before any clipping.
        alignment_cos: cos(-gL, gJ), gL where L was differentiated: above 0, following the preferences also spreads the shifted
            samples. 0 if either norm is 0.
    """

    loss: float
    difference: float
    difference_ascended: float | None
    heldout: Separation | None
    heldout_ascended: Separation | None
    displacement: float
    relative_displacement: float
    ascent_norm: float
    gradient_norm: float
    alignment_cos: float


@dataclass(frozen=True)
class RewardStep:
    """One optimizer step.

    Args:
        step: counted from 1 over the whole fit.
        num_steps: steps of the whole fit.
        num_pairs: pairs in this step.
        loss: what is descended, without J: the preference loss, nats per pair, and whatever the objective adds; at theta' under
            MetaRM.
        accuracy: share of the step's pairs ranked as labelled, before the update; at theta' under MetaRM.
        lr: learning rate of this step.
        gradient_norm: before clipping.
        parts: what the objective reports beside the loss, by the metrics file's names.
        meta: what the MetaRM step saw; None for a vanilla step.
        duplicates: responses among the step's m * k that repeat an earlier one of their prompt (no gradient between them).
        skipped: steps of the fit before this one that were left out, since a loss or gradient was not finite.
    """

    step: int
    num_steps: int
    num_pairs: int
    loss: float
    accuracy: float
    lr: float
    gradient_norm: float
    parts: Mapping[str, float]
    meta: MetaStep | None
    duplicates: int
    skipped: int

    def as_dict(self) -> dict[str, float]:
        """The step as a row of the metrics file.

        Returns:
            Numbers by name; those of MetaRM only where it ran, and those that take a further pass only where they were measured.
        """
        row = {
            "reward/loss": self.loss,
            "reward/accuracy": self.accuracy,
            "reward/lr": self.lr,
            "reward/gradient_norm": self.gradient_norm,
            "reward/skipped": float(self.skipped),
            **self.parts,
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
        for place, found in (("", self.meta.heldout), ("_ascended", self.meta.heldout_ascended)):
            if found is not None:
                row |= {f"reward/J_heldout{place}": found.difference, f"reward/spread_heldout{place}": found.spread}
        return row


META_NUMBERS = (
    "J_before", "J_after", "displacement", "displacement_deployed", "alignment_cos", "duplicate_share",
    "J_heldout_start", "J_heldout_before", "J_heldout_after", "J_heldout",
    "spread_heldout_start", "spread_heldout_before", "spread_heldout_after", "spread_heldout",
)  # fmt: skip
"""MetaRM's numbers in the ledger. Before and after: at theta and at theta', on the same samples. Held out: on prompts that no
ascent saw; there, start is the weights that the fit started from, and no suffix those that it left behind."""

UNTRAINED: Mapping[str, float | None] = {"loss": None, "accuracy": None, "num_steps": 0, "best_step": None} | dict.fromkeys(
    META_NUMBERS
)
"""The ledger's numbers of a reward model that was taken as it is; see ``RewardFit.as_dict``."""


@dataclass(frozen=True)
class MetaFit:
    """What MetaRM did in a whole fit. Means are over the steps of its last quarter at which J was measured.

    Args:
        difference: J at theta, on the samples of the step.
        difference_ascended: J at theta', on the same; None under the joint objective.
        displacement: ||theta' - theta||.
        alignment_cos: cos(-gL, gJ).
        duplicate_share: of all responses of S_k, those that repeat an earlier one of their prompt.
        heldout: J and spread at theta, on the prompts that no ascent saw; None where there are none, like the next three.
        heldout_ascended: at theta'.
        heldout_start: of the weights that the fit started from.
        heldout_deployed: of the weights that it left behind.
        deployed_displacement: ||theta' - theta|| of the last ascent, after which theta' was kept; None where theta was.
    """

    difference: float
    difference_ascended: float | None
    displacement: float
    alignment_cos: float
    duplicate_share: float
    heldout: Separation | None
    heldout_ascended: Separation | None
    heldout_start: Separation | None
    heldout_deployed: Separation | None
    deployed_displacement: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The numbers as the round's ledger names them.

        Returns:
            By ``META_NUMBERS``; None where there is none.
        """
        heldout = (self.heldout_start, self.heldout, self.heldout_ascended, self.heldout_deployed)
        numbers = (
            self.difference,
            self.difference_ascended,
            self.displacement,
            self.deployed_displacement,
            self.alignment_cos,
            self.duplicate_share,
            *(None if found is None else found.difference for found in heldout),
            *(None if found is None else found.spread for found in heldout),
        )
        return dict(zip(META_NUMBERS, numbers, strict=True))

    @classmethod
    def of(
        cls,
        steps: Sequence[MetaStep],
        duplicate_share: float,
        heldout_start: Separation | None,
        heldout_deployed: Separation | None,
        deployed_displacement: float | None,
    ) -> MetaFit:
        """Means over steps.

        Args:
            steps: those to be averaged, at least one; where some were measured at theta', over those alone, so that J before
                and after is of the same samples.
            duplicate_share: as above, like the next three.
            heldout_start: as above.
            heldout_deployed: as above.
            deployed_displacement: as above.

        Returns:
            The fit.
        """
        ascended = [step.difference_ascended for step in steps if step.difference_ascended is not None]
        steps = [step for step in steps if step.difference_ascended is not None] or steps
        return cls(
            difference=fmean(step.difference for step in steps),
            difference_ascended=fmean(ascended) if ascended else None,
            displacement=fmean(step.displacement for step in steps),
            alignment_cos=fmean(step.alignment_cos for step in steps),
            duplicate_share=duplicate_share,
            heldout=_mean([step.heldout for step in steps]),
            heldout_ascended=_mean([step.heldout_ascended for step in steps]),
            heldout_start=heldout_start,
            heldout_deployed=heldout_deployed,
            deployed_displacement=deployed_displacement,
        )


@dataclass(frozen=True)
class RewardFit:
    """A whole fit: means over its last quarter of steps.

    Args:
        num_steps: optimizer steps taken.
        loss: as a step's.
        accuracy: share of training pairs ranked as labelled.
        best_step: the step after which the weights stood that were kept; None without early stopping, which keeps the last.
        meta: what MetaRM did; None for a vanilla fit.
    """

    num_steps: int
    loss: float
    accuracy: float
    best_step: int | None
    meta: MetaFit | None

    def as_dict(self) -> dict[str, float | None]:
        """The fit as the round's ledger names it.

        Returns:
            Numbers by name; None where there is none, as for all of MetaRM's where it did not run.
        """
        row: dict[str, float | None] = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "num_steps": self.num_steps,
            "best_step": self.best_step,
        }
        return row | (dict.fromkeys(META_NUMBERS) if self.meta is None else self.meta.as_dict())

    @classmethod
    def of(cls, steps: Sequence[RewardStep], best_step: int | None, meta: MetaFit | None) -> RewardFit:
        """Means over the last quarter of the steps (at least one).

        Args:
            steps: all of them, at least one.
            best_step: as above.
            meta: as above.

        Returns:
            The fit.
        """
        last = last_quarter(steps)
        return cls(len(steps), fmean(step.loss for step in last), fmean(step.accuracy for step in last), best_step, meta)


def last_quarter(steps: Sequence[RewardStep]) -> Sequence[RewardStep]:
    """The steps that a fit's means are over.

    Args:
        steps: all of them, at least one.

    Returns:
        The last quarter, at least one.
    """
    return steps[-max(1, len(steps) // 4) :]


def _mean(found: Sequence[Separation | None]) -> Separation | None:
    measured = [one for one in found if one is not None]
    if not measured:
        return None
    return Separation(fmean(one.difference for one in measured), fmean(one.spread for one in measured))
