"""Best-of-n sampling: which sample is picked, and how far from the sampling policy that is.

Letters: P prompts, n samples of each.
"""

import math
from collections.abc import Sequence


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
    if num_samples < 1 or len(scores) % num_samples:
        raise ValueError(f"{len(scores)} scores are not n = {num_samples} for each of some prompts")
    return tuple(max(range(i, i + num_samples), key=scores.__getitem__) for i in range(0, len(scores), num_samples))


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
