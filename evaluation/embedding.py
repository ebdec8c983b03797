"""What the features of chosen and rejected responses look like: a picture in two dimensions, and a number.

Letters: R responses, F features.
"""

import numpy as np

from evaluation.reward_run import Features, Matrix

TSNE_SEED, TSNE_PERPLEXITY = 0, 30.0
FEWEST_FEATURED = 10
"""Responses that make a picture."""


def first_pairs(features: Features, num: int) -> Features:
    """The features of the first pairs, whatever number there are.

    Source: none needed.

    Args:
        features: of the responses, chosen and rejected in any order; the pairs in one order on either side.
        num: of pairs.

    Returns:
        Those of ``num`` chosen and ``num`` rejected responses, or of all.

    Padding contract: there is none.
    """
    rows = np.concatenate([np.flatnonzero(side)[:num] for side in (features.chosen, ~features.chosen)])
    return Features(features.vectors[rows], features.chosen[rows])


def same_side_neighbours(features: Features) -> float:
    """Share of responses whose nearest neighbour in feature space is of the same side; chosen and rejected apart gives 1.

    Features are standardised first. One half says that the two sides cannot be told apart by who lies next to whom.

    Source: none; a number for what Secrets of RLHF Part II, Figure 11 shows as a picture.

    Args:
        features: at least two responses.

    Returns:
        In [0, 1].

    Padding contract: there is none.
    """
    vectors = _standardised(features.vectors)
    squares = (vectors * vectors).sum(1)
    distance = squares[:, None] + squares[None, :] - 2 * vectors @ vectors.T
    np.fill_diagonal(distance, np.inf)
    return float((features.chosen[distance.argmin(1)] == features.chosen).mean())


def embed(vectors: Matrix) -> Matrix:
    """Two dimensions for the eye, by t-SNE from a fixed seed and on one thread, so that the same features give the same picture.

    Source: van der Maaten and Hinton 2008; used by Secrets of RLHF Part II, Figure 11.

    Args:
        vectors: [R, F] float64, at least 5 rows.

    Returns:
        [R, 2] float64.

    Padding contract: there is none.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    scaled = _standardised(vectors)
    perplexity = min(TSNE_PERPLEXITY, (len(vectors) - 1) / 3)
    start = "pca" if min(scaled.shape) >= 2 else "random"
    with threadpool_limits(limits=1):
        return np.asarray(TSNE(2, perplexity=perplexity, init=start, random_state=TSNE_SEED).fit_transform(scaled), np.float64)


def _standardised(vectors: Matrix) -> Matrix:
    """Mean 0 and standard deviation 1 per feature; constant features become 0."""
    spread = vectors.std(0)
    return (vectors - vectors.mean(0)) / np.where(spread == 0, 1.0, spread)
