"""The curve of over-optimisation: how a reward rises and falls with the distance from SFT.

Letters: N points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_POINTS = 3
"""Points off SFT that a curve of two coefficients is fitted to."""


@dataclass(frozen=True)
class Overoptimisation:
    """R(d) = d (alpha - beta log d), d = sqrt(KL).

    Args:
        alpha: slope near the start, reward per square root of a nat.
        beta: how fast it bends; <= 0 = it does not.
        residual: root mean square of the reward that is left over.
    """

    alpha: float
    beta: float
    residual: float

    def at(self, distance: float) -> float:
        """The curve's reward.

        Args:
            distance: d >= 0.
        """
        return 0.0 if distance == 0 else distance * (self.alpha - self.beta * math.log(distance))

    @property
    def peak(self) -> float | None:
        """The distance of the highest reward, exp(alpha / beta - 1); None where the curve does not bend down within e^20."""
        if self.beta <= 0 or self.alpha / self.beta > 20:
            return None
        return math.exp(self.alpha / self.beta - 1)


def fit_overoptimisation(kls: Sequence[float], gains: Sequence[float]) -> Overoptimisation | None:
    """Fit Gao's curve for reinforcement learning by least squares.

    R(d) = d (alpha - beta log d), d = sqrt(KL);  linear in (alpha, beta), with columns d and -d log d

    Source: Gao et al. 2023 (arXiv:2210.10760), section 3.1: the form for RL; their fit of the gold reward, ours of any.

    Args:
        kls: [N] from SFT, nats per response; an estimate may be negative.
        gains: [N] reward over SFT's.

    Returns:
        The curve; None with fewer than three different distances above 0.

    Raises:
        ValueError: if they differ in number.

    Padding contract: points at or below KL 0 change nothing, since every curve is 0 there.
    """
    points = [(math.sqrt(kl), gain) for kl, gain in zip(kls, gains, strict=True) if kl > 0]
    if len({d for d, _ in points}) < FEWEST_POINTS:
        return None
    d, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))  # [N]
    columns = np.stack([d, -d * np.log(d)], axis=1)  # [N, 2]
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    left = y - columns @ np.array([alpha, beta])
    return Overoptimisation(float(alpha), float(beta), float(np.sqrt(np.mean(left**2))))
