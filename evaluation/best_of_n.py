"""Best-of-n sampling: which sample is picked, and how far from the sampling policy that is.

Letters: P prompts, n samples of each.
"""

import math
from collections.abc import Sequence
from random import Random


def pick_best(scores: Sequence[float], num_samples: int) -> tuple[int, ...]:
    """The sample with the highest score among the n of each prompt; of equal ones the first.

    Source: Stiennon et al. 2020 (arXiv:2009.01325), section 4.3.

    Args:
        scores: [P * n], prompt by prompt.
        num_samples: n.

    Returns:
        [P] indices into ``scores``.

    Raises:
        ValueError: if the scores are not a whole number of prompts' n.

    Padding contract: there is none.
    """
    return tuple(max(range(i, i + num_samples), key=scores.__getitem__) for i in _prompts(scores, num_samples))


def soft_weights(scores: Sequence[float], softness: float) -> list[float]:
    """Probability with which soft best-of-n answers by each sample of a prompt.

        q_i = exp(s_i / lambda) / sum_j exp(s_j / lambda)

    lambda to 0 is best-of-n, lambda to infinity the sampling policy.

    Source: soft best-of-n sampling, Verdun et al. 2025 (arXiv:2505.03156).

    Args:
        scores: [n] finite.
        softness: lambda > 0, in the scores' unit.

    Returns:
        [n], sums to 1.

    Raises:
        ValueError: if there are no scores, or ``softness`` is not above 0.

    Padding contract: there is none.
    """
    if not len(scores) or not softness > 0:
        raise ValueError(f"soft best of n needs n of 1 or more and a softness above 0, got {len(scores)} and {softness}")
    top = max(scores)
    weights = [math.exp((score - top) / softness) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def pick_softly(scores: Sequence[float], num_samples: int, softness: float, seed: int) -> tuple[int, ...]:
    """One sample of the n of each prompt, drawn with ``soft_weights``.

    Source: as ``soft_weights``.

    Args:
        scores: [P * n], prompt by prompt.
        num_samples: n.
        softness: lambda > 0.
        seed: of the draw.

    Returns:
        [P] indices into ``scores``.

    Raises:
        ValueError: if the scores are not a whole number of prompts' n, or ``softness`` is not above 0.

    Padding contract: there is none.
    """
    rng = Random(seed)
    return tuple(
        rng.choices(range(start, start + num_samples), soft_weights(scores[start : start + num_samples], softness))[0]
        for start in _prompts(scores, num_samples)
    )


def soft_best_of_n_kl(scores: Sequence[float], num_samples: int, softness: float) -> float:
    """A bound on KL(soft best-of-n || the policy that was sampled) per response.

        KL <= E[KL(q || uniform)] = mean over prompts of log n + sum_i q_i log q_i

    since which sample is taken says all that there is to know of the answer beside the samples, and a uniform choice among them
    is the sampling policy. For small lambda it goes to log n, above ``best_of_n_kl``: it is a looser bound.

    Source: the data-processing inequality.

    Args:
        scores: [P * n], prompt by prompt.
        num_samples: n.
        softness: lambda > 0.

    Returns:
        The bound, nats.

    Raises:
        ValueError: as ``pick_softly``.

    Padding contract: there is none.
    """
    starts = _prompts(scores, num_samples)
    found = [soft_weights(scores[start : start + num_samples], softness) for start in starts]
    inside = math.fsum(q * math.log(q) for weights in found for q in weights if q > 0)
    return math.log(num_samples) + inside / len(found)


def _prompts(scores: Sequence[float], num_samples: int) -> range:
    """Where each prompt's samples begin."""
    if num_samples < 1 or len(scores) % num_samples:
        raise ValueError(f"{len(scores)} scores are not n = {num_samples} for each of some prompts")
    return range(0, len(scores), num_samples)


def best_of_n_kl(num_samples: int) -> float:
    """KL(best-of-n || the policy that was sampled) per response.

        KL <= log n - (n - 1) / n

    with equality where no two samples are alike; where a policy often repeats itself the true KL is smaller.

    Source: Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3; Beirami et al. 2024 (arXiv:2401.01879), that it is a bound.

    Args:
        num_samples: n.

    Returns:
        The bound, nats.

    Raises:
        ValueError: if n is below 1.

    Padding contract: there is none.
    """
    if num_samples < 1:
        raise ValueError(f"best of n needs n of 1 or more, got {num_samples}")
    return math.log(num_samples) - (num_samples - 1) / num_samples
