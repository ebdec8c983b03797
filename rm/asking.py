"""Which pair to show a person next, so that few answers tell much about their taste.

Letters: N pairs of the pool, d reward features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rm.features_config import WAYS, By
from rm.person import Person, fit_person


def information(differences: Tensor, person: Person, weights: Tensor) -> Tensor:
    """What an answer about each pair would add to what is known of a person, to first order.

    g_i = sigma'(u_i) D_i^T S D_i,  u_i = <D_i, w>,  sigma'(u) = sigma(u) sigma(-u)

    An answer adds sigma'(u_i) D_i D_i^T to the precision S^-1, whatever it is, and so multiplies its determinant by 1 + g_i: the
    pair with the largest g is the D-optimal one.

    Source: Chaloner and Verdinelli 1995, "Bayesian experimental design: a review", and the matrix determinant lemma.

    Args:
        differences: [N, d] float, D_i = features of one response - features of the other.
        person: S.
        weights: [d] float64, w: where answers are foretold from, the person's or a draw of them.

    Returns:
        [N] float64, >= 0; 0 for a pair of equal features.

    Padding contract: there is none.
    """
    rewards = differences.double() @ weights
    return torch.sigmoid(rewards) * torch.sigmoid(-rewards) * person.deviations(differences).square()


def expected_accuracy(differences: Tensor, person: Person) -> float:
    """The share of a person's answers that the profile expects to foretell: the mean over the pairs of max(p_i, 1 - p_i).

    Source: ``Person.preferred`` for p.

    Args:
        differences: [N, d] float, N >= 1.
        person: what is known of them.

    Returns:
        In [0.5, 1]. It is the profile's own opinion, right where answers follow the features.

    Padding contract: there is none.
    """
    first = person.preferred(differences)
    return float(torch.maximum(first, 1 - first).mean())


def choose(differences: Tensor, asked: Tensor, person: Person, by: By, generator: torch.Generator) -> int:
    """The next pair to ask about.

    ``information`` takes the D-optimal pair at the person's weights; ``thompson`` the D-optimal one at a draw of their
    distribution; ``random`` any.

    Source: Thompson 1933 for the draw; ``information`` for the rest.

    Args:
        differences: [N, d] float.
        asked: [N] bool, the pairs that must not come again.
        person: what is known so far.
        by: the way to choose.
        generator: of the draws; ``information`` draws nothing.

    Returns:
        The pair's place; of equally good ones the first.

    Raises:
        ValueError: if the way is unknown, every pair was asked, or the shapes do not fit.

    Padding contract: further pairs at the end that were asked already change nothing.
    """
    if by not in WAYS:
        raise ValueError(f"unknown way to choose a pair {by!r}: expected one of {', '.join(WAYS)}")
    if asked.shape != differences.shape[:1] or person.weights.shape != differences.shape[1:]:
        raise ValueError(
            f"differences {tuple(differences.shape)} need as many marks and weights, got {tuple(asked.shape)} marks and "
            f"{tuple(person.weights.shape)} weights"
        )
    left = (~asked).nonzero().squeeze(-1)
    if not len(left):
        raise ValueError("every pair of the pool was asked")
    if by == "random":
        return int(left[torch.randint(len(left), (), generator=generator)])
    weights = drawn(person, generator) if by == "thompson" else person.weights
    return int(left[information(differences[left], person, weights).argmax()])


def drawn(person: Person, generator: torch.Generator) -> Tensor:
    """A draw of a person's weights, w ~ N(weights, covariance).

    Source: Cholesky's factor of the covariance, times standard normal noise.

    Args:
        person: the distribution.
        generator: of the draw.

    Returns:
        [d] float64.

    Padding contract: there is none.
    """
    noise = torch.randn(person.d, generator=generator, dtype=torch.float64)
    root: Tensor = torch.linalg.cholesky(person.covariance)
    return person.weights + root @ noise


def updated(prior: Person, differences: Tensor) -> Person:
    """What is known of a person after further answers, where the earlier ones were not kept.

    The earlier distribution N(w0, S) is the prior: with S = L L^T, u = L^-1 w has the prior N(L^-1 w0, I), for which
    ``fit_person`` with l2 = 1 fits the answers on the features L^T D. Where N(w0, S) is itself a prior, I / l2 around w0, this is
    ``fit_person``.

    Source: Bayes' rule with Laplace's approximation in place of the earlier posterior.

    Args:
        prior: before the answers.
        differences: [n, d] float, D_i = features of the preferred response - features of the other.

    Returns:
        The person after them.

    Padding contract: there is none.
    """
    root = torch.linalg.cholesky(prior.covariance)
    towards = torch.linalg.solve_triangular(root, prior.weights[:, None], upper=False)[:, 0]
    fitted = fit_person(differences.double() @ root, 1.0, towards)
    covariance = root @ fitted.covariance @ root.T
    return Person(root @ fitted.weights, (covariance + covariance.T) / 2)
