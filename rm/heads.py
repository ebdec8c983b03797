"""M heads on one trained backbone: an ensemble that costs little more than one reward model.

Letters: B sequences, N pairs, M heads, H hidden size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rm.batches import Encoded, features_of
from rm.checkpoints import HEAD_SCALE
from rm.model import RewardModel
from tokens.errors import UserError

BOOTSTRAP_SEED_OFFSET = 5_915_587
"""Keeps the generator of a head's bootstrap sample apart from the one of its first weights."""
TOLERANCE = 1e-7
"""Largest entry of the objective's gradient, per pair, at which a head counts as fitted."""
MAX_ITERATIONS = 500
"""Of L-BFGS, per head."""


def sequence_features(model: RewardModel, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
    """What the head reads of each sequence, without gradient; like lengths share a forward pass.

    Args:
        model: on its device.
        sequences: B of (prompt ids, response ids); may be none.
        batch_size: sequences per forward pass, >= 1.
        pad_id: id written at padding.

    Returns:
        [B, H] float32 on the CPU, in the order given.

    Raises:
        ValueError: if ``batch_size`` is below 1.

    Padding contract: a sequence's features do not depend on those beside it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not sequences:
        return torch.zeros(0, 0)
    order = sorted(range(len(sequences)), key=lambda i: -(len(sequences[i][0]) + len(sequences[i][1])))
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = [sequences[i] for i in order[start : start + batch_size]]
            parts.append(features_of(model, rows, pad_id, batch_size).float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def bootstrap_counts(num_pairs: int, seed: int) -> Tensor:
    """How often each pair is drawn when N pairs are drawn from N with replacement.

    Args:
        num_pairs: N.
        seed: of the draw.

    Returns:
        [N] float64, whole numbers that sum to N.
    """
    drawn = torch.randint(num_pairs, (num_pairs,), generator=torch.Generator().manual_seed(seed))
    return torch.bincount(drawn, minlength=num_pairs).double()


def fresh_heads(num_heads: int, hidden: int, seeds: Sequence[int]) -> Tensor:
    """Heads as a reward model's fresh one: w ~ N(0, s^2) with s = HEAD_SCALE / sqrt(H), each from a generator of its own.

    Args:
        num_heads: M.
        hidden: H.
        seeds: M of them.

    Returns:
        [M, H] float64.

    Raises:
        ValueError: if there are not M seeds.
    """
    if len(seeds) != num_heads:
        raise ValueError(f"need a seed for each of {num_heads} heads, got {len(seeds)}")
    draws = [torch.randn(hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(draws) * (HEAD_SCALE / math.sqrt(hidden))


def head_objective(head: Tensor, differences: Tensor, counts: Tensor, anchor: Tensor) -> Tensor:
    """What one head minimises: the preference loss of its pairs, and a pull towards where it began.

    E(w) = (1/N) [ -sum_i c_i log sigma(w . D_i) + |w - w0|^2 / (2 s^2) ],  s = HEAD_SCALE / sqrt(H)

    It is the negative log posterior under the prior that fresh heads are drawn from, with the prior's mean moved to the head's
    own draw w0 and each pair counted as often as its bootstrap sample holds it. E is strictly convex.

    Source: Secrets of RLHF Part II, Eq 2, for the loss; Pearce et al. 2020, "Uncertainty in neural networks: approximately
    Bayesian ensembling", for the anchor.

    Args:
        head: [H] float64, w.
        differences: [N, H] float64, D_i = features of the preferred response - features of the other.
        counts: [N] float64, c.
        anchor: [H] float64, w0.

    Returns:
        A scalar, nats per pair.
    """
    precision = head.shape[0] / HEAD_SCALE**2
    loss = -(counts * functional.logsigmoid(differences @ head)).sum()
    return (loss + 0.5 * precision * (head - anchor).square().sum()) / differences.shape[0]


def fit_heads(differences: Tensor, seeds: Sequence[int]) -> Tensor:
    """M heads, each the least of ``head_objective`` for a fresh w0 and a bootstrap sample of its own.

    On fixed features the loss is convex: heads that see the same pairs in another order end in one point, and their spread would
    be 0. Two things keep them apart instead, as in an approximate posterior sample: the bootstrap says how far the pairs
    determine the head, and the anchor keeps each head's own start in the directions that the pairs say nothing of. The backbone
    is one, and so are its errors: the spread is that of the last layer only, smaller than that of whole models.

    Args:
        differences: [N, H] float, D_i = features of the preferred response - features of the other; finite.
        seeds: M of them; a seed's head does not depend on the others.

    Returns:
        [M, H] float32.

    Raises:
        ValueError: if ``differences`` is not [N, H] with N >= 1.
        UserError: if it is not finite, or a head does not converge.
    """
    if differences.dim() != 2 or differences.shape[0] < 1:
        raise ValueError(f"heads need differences [N, H] with N >= 1, got {tuple(differences.shape)}")
    if not bool(torch.isfinite(differences).all()):
        row = int((~torch.isfinite(differences).all(-1)).nonzero()[0])
        raise UserError(f"the backbone's features of pair {row} are not finite: its training diverged. Lower reward.lr.")
    wide = differences.double()
    anchors = fresh_heads(len(seeds), wide.shape[1], seeds)
    heads = [
        _fit(wide, bootstrap_counts(len(wide), seed + BOOTSTRAP_SEED_OFFSET), anchor)
        for seed, anchor in zip(seeds, anchors.unbind(), strict=True)
    ]
    return torch.stack(heads).float()


def _fit(differences: Tensor, counts: Tensor, anchor: Tensor) -> Tensor:
    head = anchor.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=MAX_ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = head_objective(head, differences, counts, anchor)
        torch.autograd.backward(value)
        return value

    optimizer.step(closure)
    closure()
    largest = float(head.grad.abs().max()) if head.grad is not None else math.nan
    if not largest <= 100 * TOLERANCE:
        raise UserError(
            f"a head on the shared backbone did not converge in {MAX_ITERATIONS} iterations (largest gradient {largest:.2g}): "
            "the backbone's features are badly scaled. Lower reward.lr, or set strength.members to full"
        )
    return head.detach()
