"""How far two sets of judgements lie apart, in standard deviations of SFT's.

Letters: N prompts, k samples per prompt.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Protocol, TypeVar

import numpy as np

from evaluation.records import EvaluationRow


class OfPrompt(Protocol):
    """A row that belongs to a prompt of S_k."""

    @property
    def prompt_id(self) -> str:
        """Shared by the k responses of a prompt."""

    @property
    def kept_back(self) -> bool:
        """Whether MetaRM's ascent never saw the prompt."""


Sampled = TypeVar("Sampled", bound=OfPrompt)


def gain(
    rows: Sequence[EvaluationRow], start: Sequence[EvaluationRow], value: Callable[[EvaluationRow], float]
) -> tuple[float, float]:
    """Mean gain over SFT on the same prompts, in standard deviations of SFT's responses.

    gain = mean(x - x_sft) / std(x_sft);  half = 1.96 * std(x - x_sft) / sqrt(N) / std(x_sft)

    Source: a paired difference of means with a normal 95% interval; the unit makes proxy and gold comparable.

    Args:
        rows: [N] judged responses of the policy.
        start: [N] those of SFT, the same prompts in any order.
        value: which number of a row.

    Returns:
        (gain, half width of its interval); with a std of 0 the unit is that of the number itself.

    Raises:
        ValueError: if a prompt has no response by SFT, or there are no rows.

    Padding contract: there is none.
    """
    theirs = {row.prompt_id: value(row) for row in start}
    missing = [row.prompt_id for row in rows if row.prompt_id not in theirs]
    if missing or not rows:
        raise ValueError(f"{len(missing)} of {len(rows)} prompts have no response by SFT to compare with: {missing[:3]}")
    unit = float(np.std(list(theirs.values()))) or 1.0
    difference = np.array([value(row) - theirs[row.prompt_id] for row in rows]) / unit  # [N]
    return float(difference.mean()), float(1.96 * difference.std() / np.sqrt(len(rows)))


def pair_differences(
    rows: Sequence[Sampled], score: Callable[[Sampled], float | None]
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """|r_i - r_j| over all pairs of the k responses of each prompt: how well a reward model tells them apart.

    Source: MetaRM (Dou et al. 2024), the difference that its meta objective J raises.

    Args:
        rows: rollouts of S_k.
        score: of a row; None leaves the row out.

    Returns:
        [prompts * k * (k - 1) / 2] float64, in the unit of the score; in the order of first appearance.

    Padding contract: there is none.
    """
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        value = score(row)
        if value is not None:
            by_prompt.setdefault(row.prompt_id, []).append(value)
    return np.array([abs(a - b) for scores in by_prompt.values() for a, b in combinations(scores, 2)], dtype=np.float64)


def unseen(rows: Sequence[Sampled]) -> tuple[Sequence[Sampled], bool]:
    """The part of S_k that no ascent saw, which the paper's validation set of the meta dataset is.

    Source: Secrets of RLHF Part II, the text at Figure 16.

    Args:
        rows: rollouts of S_k.

    Returns:
        It, and True; all rows and False where nothing was kept back, or that was not recorded.

    Padding contract: there is none.
    """
    back = [row for row in rows if row.kept_back]
    return (back, True) if back else (rows, False)


def scaled(differences: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Differences as parts of the largest one, so that the scale of the scores no longer matters.

    d_i / max d

    Source: Secrets of RLHF Part II, Figure 16 (its differences are "normalized to a range of 0-1").

    Args:
        differences: [N] float64, not negative.

    Returns:
        [N] float64 in [0, 1]; all zeros stay zeros.

    Padding contract: there is none.
    """
    top = float(differences.max()) if len(differences) else 0.0
    return differences / top if top > 0 else differences
