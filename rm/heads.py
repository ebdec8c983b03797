"""M heads on one trained backbone: an ensemble that costs little more than one reward model.

Letters: B sequences, N pairs, M heads, H hidden size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rm.batches import Encoded, features_of
from rm.checkpoints import HEAD_SCALE
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.records import Pair

BOOTSTRAP_SEED_OFFSET = 5_915_587
"""Keeps the generator of a head's bootstrap sample apart from the one of its first weights."""
TOLERANCE = 1e-7
"""Largest entry of the objective's gradient, per pair, at which a head counts as fitted."""
MAX_ITERATIONS = 500
"""Of L-BFGS, per head."""
ROWS = 4096
"""Pairs whose differences are float64 at a time."""


def _go_on() -> None:
    """Nobody wants to know that work goes on."""


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
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    order, parts = zip(*_feature_batches(model, lengths, sequences.__getitem__, batch_size, pad_id), strict=True)
    return torch.cat(parts)[torch.tensor([index for indices in order for index in indices]).argsort()]


def _feature_batches(
    model: RewardModel, lengths: Sequence[int], sequence: Callable[[int], Encoded], batch_size: int, pad_id: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and [b, H] float32 features of b sequences at a time, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        taken = order[start : start + batch_size]
        with torch.no_grad():
            features = features_of(model, [sequence(i) for i in taken], pad_id, batch_size).float().cpu()
        yield taken, features


def feature_differences(
    model: RewardModel, pairs: Sequence[Pair], batch_size: int, pad_id: int, on_progress: Callable[[], None] = _go_on
) -> Tensor:
    """D_i = features of the preferred response - features of the other, without gradient; equal sequences are computed once.

    Features are added where they belong as they are computed, so that beside the answer there is one batch of them at a time.

    Args:
        model: on its device.
        pairs: N; may be no more than a view that makes a pair when asked.
        batch_size: sequences per forward pass, >= 1.
        pad_id: id written at padding.
        on_progress: called after each forward pass.

    Returns:
        [N, H] float32 on the CPU.

    Raises:
        ValueError: if ``batch_size`` is below 1, or there are no pairs.

    Padding contract: as ``sequence_features``.
    """
    if batch_size < 1 or not pairs:
        raise ValueError(f"differences need a batch_size and pairs, at least 1 each; got {batch_size} and {len(pairs)}")
    keys, lengths = _keys_and_lengths(pairs)
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    place, first = rank[place], np.sort(first)  # distinct sequences in the order in which they first come up
    occurrences = np.argsort(place, kind="stable")
    edges = np.searchsorted(place[occurrences], np.arange(len(first) + 1))

    def sequence(index: int) -> Encoded:
        row = int(first[index])
        pair = pairs[row % len(pairs)]
        return pair.prompt_ids, pair.chosen_ids if row < len(pairs) else pair.rejected_ids

    differences = torch.zeros(0, 0)
    for taken, features in _feature_batches(model, lengths[first].tolist(), sequence, batch_size, pad_id):
        if not len(differences):
            differences = torch.zeros(len(pairs), features.shape[1])
        rows = np.concatenate([occurrences[edges[i] : edges[i + 1]] for i in taken])
        source = np.repeat(np.arange(len(taken)), [edges[i + 1] - edges[i] for i in taken])
        for own, shift, sign in ((rows < len(pairs), 0, 1.0), (rows >= len(pairs), len(pairs), -1.0)):
            differences.index_add_(0, torch.from_numpy(rows[own] - shift), features[torch.from_numpy(source[own])], alpha=sign)
        on_progress()
    return differences


def _keys_and_lengths(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Of all chosen, then all rejected sequences: 16 bytes that equal ones share, and the number of tokens."""
    keys, lengths = np.empty(2 * len(pairs), dtype="V16"), np.empty(2 * len(pairs), dtype=np.int64)
    for row, pair in enumerate(pairs):
        for place, response in ((row, pair.chosen_ids), (row + len(pairs), pair.rejected_ids)):
            ids = np.array([len(pair.prompt_ids), *pair.prompt_ids, *response], dtype=np.int64)
            keys[place] = np.void(hashlib.blake2b(ids.tobytes(), digest_size=16).digest())
            lengths[place] = len(pair.prompt_ids) + len(response)
    return keys, lengths


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
    return (_pair_loss(head, differences, counts) + _pull(head, anchor)) / differences.shape[0]


def _pair_loss(head: Tensor, differences: Tensor, counts: Tensor) -> Tensor:
    return -(counts * functional.logsigmoid(differences @ head)).sum()


def _pull(head: Tensor, anchor: Tensor) -> Tensor:
    return 0.5 * (head.shape[0] / HEAD_SCALE**2) * (head - anchor).square().sum()


def fit_heads(differences: Tensor, seeds: Sequence[int], on_progress: Callable[[], None] = _go_on) -> Tensor:
    """M heads, each the least of ``head_objective`` for a fresh w0 and a bootstrap sample of its own.

    On fixed features the loss is convex: heads that see the same pairs in another order end in one point, and their spread would
    be 0. Two things keep them apart instead, as in an approximate posterior sample: the bootstrap says how far the pairs
    determine the head, and the anchor keeps each head's own start in the directions that the pairs say nothing of. The backbone
    is one, and so are its errors: the spread is that of the last layer only, smaller than that of whole models.

    Args:
        differences: [N, H] float, D_i = features of the preferred response - features of the other; finite.
        seeds: M of them; a seed's head does not depend on the others.
        on_progress: called after each look at all pairs.

    Returns:
        [M, H] float32.

    Raises:
        ValueError: if ``differences`` is not [N, H] with N >= 1.
        UserError: if it is not finite, or a head does not converge.
    """
    if differences.dim() != 2 or differences.shape[0] < 1:
        raise ValueError(f"heads need differences [N, H] with N >= 1, got {tuple(differences.shape)}")
    for start in range(0, len(differences), ROWS):
        finite = torch.isfinite(differences[start : start + ROWS]).all(-1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise UserError(f"the backbone's features of pair {row} are not finite: its training diverged. Lower reward.lr.")
    anchors = fresh_heads(len(seeds), differences.shape[1], seeds)
    heads = [
        _fit(differences, bootstrap_counts(len(differences), seed + BOOTSTRAP_SEED_OFFSET), anchor, on_progress)
        for seed, anchor in zip(seeds, anchors.unbind(), strict=True)
    ]
    return torch.stack(heads).float()


def _fit(differences: Tensor, counts: Tensor, anchor: Tensor, on_progress: Callable[[], None]) -> Tensor:
    """The least of ``head_objective``, whose sum over the pairs is taken ``ROWS`` of them at a time."""
    head, num_pairs = anchor.clone().requires_grad_(True), len(differences)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=MAX_ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = _pull(head, anchor) / num_pairs
        torch.autograd.backward(value)
        total = value.detach()
        for start in range(0, num_pairs, ROWS):
            rows = slice(start, start + ROWS)
            value = _pair_loss(head, differences[rows].double(), counts[rows]) / num_pairs
            torch.autograd.backward(value)
            total += value.detach()
        on_progress()
        return total

    optimizer.step(closure)
    closure()
    largest = float(head.grad.abs().max()) if head.grad is not None else math.nan
    if not largest <= 100 * TOLERANCE:
        raise UserError(
            f"a head on the shared backbone did not converge in {MAX_ITERATIONS} iterations (largest gradient {largest:.2g}): "
            "the backbone's features are badly scaled. Lower reward.lr, or set strength.members to full"
        )
    return head.detach()
