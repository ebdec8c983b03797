"""What the numbers of a reward model's fit say: MetaRM's diagnostics and the prototypes of SwAV, as tiles and sentences.

The numbers of a whole fit are those of a reward run's card and of a round in the ledger: J and spread at theta (``_before``), at
theta' (``_after``), of the weights that the fit started from (``_start``) and of those that it left behind (no suffix).
"""

from collections.abc import Mapping, Sequence

from evaluation.page import Tiles

META_WORDS = (
    "J measures how far the scores of one prompt's responses lie apart. J alone rises by inflation: scores that only grow larger "
    "raise it. The scale-free spread (std within a prompt over std of all scores) does not know the scale, so it is the one to "
    "look at. Both are of prompts that no ascent saw; means over the last quarter of the fit."
)
COLLAPSED = 1.1
"""Effective prototypes below which a batch's rows all look the same to them; ``rm.contrastive_term`` warns at the same number."""
LEVEL_SPREAD = 0.001
"""A spread that rises by less than this has not risen."""
_OTHERS = (
    ("displacement", "‖θ′ − θ‖", ".3g", "of one ascent"),
    ("displacement_deployed", "moved at the end", ".3g", "meta.deploy: theta_prime"),
    ("alignment_cos", "cos(−∇L, ∇J)", "+z.2f", "above 0: L raises J too"),
    ("duplicate_share", "repeated responses", ".1%", "of S_k; they teach nothing"),
)
"""Key, label, format and hint of the tiles that show one number."""


def meta_tiles(fit: Mapping[str, float]) -> Tiles:
    """MetaRM's diagnostics of a whole fit.

    Source: Secrets of RLHF Part II, Algorithm 1 and Eqs 11-12; the spread is ours.

    Args:
        fit: numbers by name, those that are null left out.

    Returns:
        (label, value, hint) each; none of a fit without MetaRM.

    Padding contract: there is none.
    """
    if "J_before" not in fit:
        return ()
    tiles: list[tuple[str, str, str]] = []
    for name, key in (("J", "J_heldout"), ("spread", "spread_heldout")):
        tiles += _pair(fit, f"{name} at θ′", f"{key}_after", f"{key}_before", "at θ")
        tiles += _pair(fit, f"{name}, kept weights", key, f"{key}_start", "before the fit")
    for key, label, form, hint in _OTHERS:
        if key in fit:
            tiles.append((label, format(fit[key], form), hint))
    return tuple(tiles)


def inflation(fit: Mapping[str, float]) -> str | None:
    """A sentence for an ascent that raises J on prompts it did not see, and not the scale-free spread.

    Source: J is not scale invariant (Secrets of RLHF Part II, Eq 11).

    Args:
        fit: numbers by name, those that are null left out.

    Returns:
        The sentence; None where J did not rise or the spread did too, or they were not measured.

    Padding contract: there is none.
    """
    names = [f"{kind}_heldout_{when}" for kind in ("J", "spread") for when in ("before", "after")]
    if any(name not in fit for name in names):
        return None
    j_before, j_after, spread_before, spread_after = (fit[name] for name in names)
    if j_after <= j_before or spread_after - spread_before >= LEVEL_SPREAD:
        return None
    return (
        f"The ascent makes scores larger and tells responses apart no better: on prompts that it did not see J rose from "
        f"{j_before:.3f} to {j_after:.3f} at θ′, and the scale-free spread went from {spread_before:.3f} to {spread_after:.3f}."
    )


def collapsed(effective: Sequence[float]) -> str | None:
    """A sentence for prototypes that do not tell the rows of a batch apart.

    Source: ``rm.contrastive.prototype_usage``; 1 = every row looks the same to the prototypes.

    Args:
        effective: prototypes in effective use by step; none without SwAV.

    Returns:
        The sentence and what to do; None where the last quarter of the steps has more than ``COLLAPSED`` on average.

    Padding contract: there is none.
    """
    last = effective[-max(1, len(effective) // 4) :]
    if not last or (mean := sum(last) / len(last)) >= COLLAPSED:
        return None
    return (
        f"The prototypes of SwAV have collapsed, or were never learnt: in the last quarter of the fit {mean:.2f} of them were in "
        "effective use (1 = no row is told from another), so the contrastive loss taught nothing. Lower "
        "reward.contrastive.num_prototypes, temperature or epsilon, or raise reward.batch_size or reward.lr."
    )


def _pair(fit: Mapping[str, float], label: str, key: str, other: str, what: str) -> Tiles:
    if key not in fit or other not in fit:
        return ()
    return ((label, f"{fit[key]:.3f}", f"{fit[other]:.3f} {what}"),)
