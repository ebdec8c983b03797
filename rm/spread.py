"""How far a reward model tells the responses to one prompt apart: J, and beside it a measure that inflation cannot raise.

Letters: m prompts, k responses per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rm.losses import difference_loss


@dataclass(frozen=True)
class Separation:
    """One model on one set of shifted samples.

    Args:
        difference: J, which grows with the scale of the scores.
        spread: its scale-free companion (``scale_free_spread``), in [0, 1].
    """

    difference: float
    spread: float

    @classmethod
    def of(cls, scores: Tensor) -> Separation:
        """Both measures of one set of scores.

        Args:
            scores: [m, k] float, a row per prompt; k >= 2.

        Returns:
            The two numbers.

        Raises:
            ValueError: if ``scores`` is not [m, k] with m >= 1 and k >= 2.
        """
        return cls(float(difference_loss(scores.detach().double())), scale_free_spread(scores))


def scale_free_spread(scores: Tensor) -> float:
    """Share of the scores' variation that lies within prompts.

    spread = mean over prompts of std(r_1 .. r_k)  /  std of all m k scores        (population stds)

    Equal for r and a r + b with any a other than 0, so a model whose scores only grow larger does not gain; J would. In [0, 1]:
    0 if every prompt's responses are scored alike, 1 if all prompts have one mean and one std.

    Source: none; the companion that J (Secrets of RLHF Part II, Eq 11) needs, since J alone rises with the scores' scale.

    Args:
        scores: [m, k] float, a row per prompt; k >= 2.

    Returns:
        A number in [0, 1]; 0 where all scores are equal.

    Raises:
        ValueError: if ``scores`` is not [m, k] with m >= 1 and k >= 2.

    Padding contract: sees scores only.
    """
    if scores.dim() != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(f"the spread needs scores [m, k] with m >= 1 and k >= 2, got {tuple(scores.shape)}")
    wide = scores.detach().double()
    wide = wide - wide[0, 0]  # equal scores have a std of exactly 0 then
    overall = float(wide.std(correction=0))
    return float(wide.std(dim=1, correction=0).mean()) / overall if overall > 0 else 0.0
