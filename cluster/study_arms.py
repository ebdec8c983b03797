"""What is studied: which parts of the pairs, by preference strength, and what is done to them.

Source: Secrets of RLHF II (2401.06080), Figures 4 to 8 and 21 to 25.

Letters: N training pairs, n those of an arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from actors.study import Treated
from evaluation.studies import AMBIGUOUS_BAND, FLIPPED_BAND, STRONGEST, TREATED_BAND, WEAKEST
from preferences.config import DenoiseConfig, DenoiseMethod
from preferences.denoise import noisy_pairs
from tokens.errors import UserError

TENTHS = 10


@dataclass(frozen=True)
class Arm:
    """What a reward model is trained on. Two arms that are equal are fitted once, whatever they are called in which study.

    Args:
        first: tenth of the pairs by strength from which on they are trained on, 0 = the weakest.
        last: tenth before which that ends.
        method: joined by "+": flip, soft, margin, drop; or none.
        noisy: whom flip, soft and drop are done to: all pairs of the arm, those of the weakest tenth, or those that
            ``data.denoise`` calls noisy. A margin is for all pairs.
    """

    first: int = 0
    last: int = TENTHS
    method: str = "none"
    noisy: Literal["all", "weakest", "rule"] = "all"


@dataclass(frozen=True, eq=False)
class Ranked:
    """Training pairs by strength.

    Args:
        ids: of the N pairs.
        mean: [N] float64, strength.
        margin: [N] float64, strength as a margin: scaled and clipped as ``data.denoise`` says.
        tenth: [N] int64, 0 to 9; equal in size but for one pair.
    """

    ids: tuple[str, ...]
    mean: np.ndarray
    margin: np.ndarray
    tenth: np.ndarray

    @classmethod
    def of(cls, ids: tuple[str, ...], mean: np.ndarray, margin: np.ndarray) -> Ranked:
        """Sort into tenths; of equal strengths the smaller id is the weaker.

        Raises:
            UserError: if there are fewer pairs than tenths.
        """
        if len(ids) < TENTHS:
            raise UserError(f"a study needs at least {TENTHS} training pairs, one for each tenth by strength; got {len(ids)}")
        rising = np.array(sorted(range(len(ids)), key=lambda row: (mean[row], ids[row])))
        tenth = np.empty(len(ids), dtype=np.int64)
        for number, rows in enumerate(np.array_split(rising, TENTHS)):
            tenth[rows] = number
        return cls(ids, mean, margin, tenth)


def arms_of() -> Mapping[str, Mapping[str, Arm]]:
    """Every study: its arms by name, in the order in which they are drawn.

    deciles: each tenth alone (Fig. 4). lowest: the two weakest, as labelled and flipped (5). top: the strongest tenth with soft
    labels, margins, both (6). margin: all pairs without and with margins (7). methods: every method of ``data.denoise`` on all
    pairs (8). growing: the weakest 10, 20 ... 100%, and the strongest (21, 22). bands: the weakest tenth flipped, alone (23); the
    fourth alone (24); all pairs with the weakest tenth flipped or smoothed (25).
    """
    both = ("none", "soft", "margin", "soft+margin")
    flipped = ("flip", "flip+soft", "flip+margin", "flip+soft+margin")
    by_rule = [method for method in get_args(DenoiseMethod) if method not in ("none", "margin")]
    whole = {name: Arm(method=name) for name in ("none", "margin")}
    rules = {name: Arm(method=name, noisy="rule") for name in by_rule}
    return {
        "deciles": {_band(i): Arm(i, i + 1) for i in range(TENTHS)},
        "lowest": {f"{_band(i)}: {method}": Arm(i, i + 1, method) for i in (0, 1) for method in ("none", "flip")},
        "top": {method: Arm(TENTHS - 1, TENTHS, method) for method in both},
        "margin": whole,
        "methods": {name: (whole | rules)[name] for name in get_args(DenoiseMethod)},
        "growing": {f"{WEAKEST}: {10 * i}%": Arm(0, i) for i in range(1, TENTHS + 1)}
        | {f"{STRONGEST}: {10 * i}%": Arm(TENTHS - i, TENTHS) for i in range(1, TENTHS + 1)},
        "bands": {f"{FLIPPED_BAND}: {method}": Arm(0, 1, method) for method in flipped}
        | {f"{AMBIGUOUS_BAND}: {method}": Arm(3, 4, method) for method in both}
        | {f"{TREATED_BAND}: none": Arm()}
        | {f"{TREATED_BAND}: {method}": Arm(method=method, noisy="weakest") for method in ("flip", "soft")},
    }


def _band(tenth: int) -> str:
    return f"{10 * tenth}-{10 * tenth + 10}%"


def treat(arm: Arm, ranked: Ranked, config: DenoiseConfig) -> Treated:
    """An arm's pairs and what is done to them; on all pairs by the rule the same as ``preferences.denoise.denoise``.

    Args:
        arm: of a study.
        ranked: the training pairs.
        config: smoothing, and which pairs count as noisy.

    Returns:
        n of the N pairs, in the order of the data.

    Raises:
        UserError: if none is left.
    """
    words = set(arm.method.split("+"))
    inside = (ranked.tenth >= arm.first) & (ranked.tenth < arm.last)
    noisy = _noisy(arm, ranked, config)
    rows = np.flatnonzero(inside & ~noisy if "drop" in words else inside)
    if not len(rows):
        raise UserError(f"a study's arm ({arm.method} on tenths {arm.first} to {arm.last - 1}) has no pair left to train on")
    flipped = noisy[rows] & ("flip" in words)
    margin = np.where(flipped, -ranked.margin[rows], ranked.margin[rows])
    return Treated(
        rows=rows,
        flipped=flipped,
        margin=margin if "margin" in words else np.zeros(len(rows)),
        smoothing=np.where(noisy[rows] & ("soft" in words), config.smoothing, 0.0),
    )


def _noisy(arm: Arm, ranked: Ranked, config: DenoiseConfig) -> np.ndarray:
    if arm.noisy == "all":
        return np.ones(len(ranked.ids), dtype=bool)
    if arm.noisy == "weakest":
        return np.asarray(ranked.tenth == 0)
    return noisy_pairs(ranked.mean, list(ranked.ids), DenoiseConfig.model_validate(config.model_dump() | {"method": arm.method}))
