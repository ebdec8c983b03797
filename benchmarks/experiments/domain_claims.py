"""The claims of "Everyone Deserves A Reward" as paired differences between customisations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from evaluation.domains import DomainRun, Outcome, outcomes
from evaluation.groups import FEWEST_SEEDS, over_seeds


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a difference between two strategies, positive where it holds.

    Args:
        text: the sentence.
        better: the strategy that should be ahead.
        other: the other.
        of: "general" for accuracy on the general sets at the end, "domain" for that on the own domain, "kept" for minus what is
            forgotten in the domain stage.
    """

    text: str
    better: str
    other: str
    of: str


CLAIMS = (
    Claim("General fine-tuning first helps the domain", "grft-crft", "direct", "domain"),
    Claim("Imitation in the general stage preserves general accuracy", "imitate-general", "grft-crft", "kept"),
    Claim("Imitation in the domain stage preserves general accuracy", "imitate-domain", "grft-crft", "kept"),
    Claim("Imitation in both stages preserves general accuracy", "imitate-both", "grft-crft", "kept"),
    Claim("Imitation preserves more in the domain stage than in the general stage", "imitate-domain", "imitate-general", "kept"),
    Claim("More general data (1.5x) preserves general accuracy", "enriched-1.5", "grft-crft", "kept"),
    Claim("More general data (2.5x) preserves general accuracy", "enriched-2.5", "grft-crft", "kept"),
    Claim("More general data (4.5x) preserves general accuracy", "enriched-4.5", "grft-crft", "kept"),
    Claim("More general data (6.5x) preserves general accuracy", "enriched-6.5", "grft-crft", "kept"),
    Claim("Rehearsal preserves general accuracy", "rehearsal", "grft-crft", "kept"),
    Claim("EWC preserves general accuracy", "ewc", "grft-crft", "kept"),
    Claim("L2-to-start preserves general accuracy", "l2", "grft-crft", "kept"),
)
BASE_CLAIMS = (
    Claim("A plain base makes better domain models than a tuned one", "grft-crft", "grft-crft", "domain"),
    Claim("The same without general fine-tuning", "direct", "direct", "domain"),
    Claim("A plain base preserves general accuracy", "grft-crft", "grft-crft", "kept"),
)
"""``better`` on the plain base against ``other`` on the tuned one."""


def per_seed(run: DomainRun, strategy: str, of: str) -> dict[int, float]:
    """A quantity of a strategy by seed; none where the strategy is not there or has no such quantity."""
    found = {}
    for seed in sorted({row.seed for row in run.rows}):
        rows = tuple(row for row in run.rows if row.seed == seed and row.strategy == strategy)
        outcome = next((o for o in outcomes(replace(run, rows=rows)) if o.strategy == strategy), None)
        value = None if outcome is None else _quantity(outcome, of)
        if value is not None:
            found[seed] = value
    return found


def _quantity(outcome: Outcome, of: str) -> float | None:
    if of == "domain":
        return outcome.domain.value
    if of == "general":
        return None if outcome.general is None else outcome.general.value
    return None if outcome.forgotten is None else -outcome.forgotten.value


def judged(run: DomainRun, other: DomainRun | None = None, claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Every claim: the mean difference over the seeds, paired, with its 95% interval.

    A strategy may forget little because it had little to lose: beside what is kept stands the difference in general accuracy at
    the end.

    Args:
        run: as read.
        other: the run of ``Claim.other``; None = the same.
        claims: to look at; one whose strategies are not both there is "not run".
    """
    rows = []
    for claim in claims:
        better, worse = per_seed(run, claim.better, claim.of), per_seed(other or run, claim.other, claim.of)
        row: dict[str, Any] = {"claim": claim.text, "of": claim.of, **_compared(better, worse)}
        if claim.of == "kept":
            ends = (per_seed(run, claim.better, "general"), per_seed(other or run, claim.other, "general"))
            row["general"] = _compared(*ends)
        rows.append(row)
    return rows


def _compared(better: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """A paired difference and its verdict."""
    if not better or not other:
        return {"verdict": "not run"}
    if better.keys() != other.keys():
        raise ValueError(f"paired differences need the same seeds, got {sorted(better)} and {sorted(other)}")
    differences = [better[seed] - other[seed] for seed in sorted(better)]
    row: dict[str, Any] = {"difference": fmean(differences), "seeds": len(differences)}
    if len(differences) < FEWEST_SEEDS:
        return row | {"verdict": "too few seeds"}
    interval = over_seeds(differences)
    verdict = "holds" if interval.low > 0 else "does not hold" if interval.high < 0 else "not told"
    return row | {"low": interval.low, "high": interval.high, "verdict": verdict}


def merged(runs: Sequence[DomainRun]) -> DomainRun:
    """Customisations of several seeds as one: each was split, sampled and fitted by its own.

    Args:
        runs: of one recipe and base, a seed each.
    """
    rows = tuple(replace(row, seed=number) for number, run in enumerate(runs) for row in run.rows)
    alone = {name: fmean(run.length_alone[name] for run in runs) for name in runs[0].length_alone}
    return replace(runs[0], rows=rows, length_alone=alone)
