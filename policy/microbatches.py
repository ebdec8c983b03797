"""Which rows of a batch each rank computes, and in which portions.

Letters: B rows in all, s = ceil(B / number of ranks) rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.experience import chunks
from tokens.packing import token_groups
from tokens.ranks import Ranks


@dataclass(frozen=True)
class Division:
    """This rank's part of the rows that were asked for, in portions.

    Args:
        order: [B] int64, permutation of the rows asked for; the ranks take from it in turn.
        own: [s] int64, this rank's rows, in that order.
        portions: of one forward pass each: positions in ``own``, every one once.
        ranks: among which the rows are divided.
    """

    order: Tensor
    own: Tensor
    portions: tuple[Tensor, ...]
    ranks: Ranks

    def rows(self) -> list[Tensor]:
        """[..] int64 each: the rows of every portion, like lengths together."""
        return [self.own[portion] for portion in self.portions]

    def whole(self, x: Tensor) -> Tensor:
        """What all ranks found, in the order in which the rows were asked for; communicates.

        Args:
            x: [s, ...], a result for each row of ``rows``, portion after portion.

        Returns:
            [B, ...], equal on all ranks, without gradient where there are several.
        """
        back, order = torch.cat(self.portions).argsort().to(x.device), self.order.argsort().to(x.device)
        return self.ranks.gather(x[back], len(self.order))[order]


def divide(lengths: Tensor, index: Tensor, ranks: Ranks, rows: int, tokens: int | None, packed: bool) -> Division:
    """Divide rows among the ranks and each rank's into portions; equally many on all ranks, as FSDP2 needs, and without talking.

    By rows, each rank takes every so-manieth row and cuts its own, sorted by length, into portions of ``rows``. By tokens, the
    rows are sorted before they are dealt out, so that the ranks have about equally many tokens; portions hold as many rows as
    ``tokens`` admits, and a rank that would need fewer portions than another halves its largest ones.

    Args:
        lengths: [..] int64, real tokens of every row of the batch.
        index: [B] int64, the rows asked for.
        ranks: that share the model.
        rows: of a portion, where ``tokens`` is None.
        tokens: most tokens of a portion; a longer row is a portion by itself.
        packed: whether only real tokens take room; False counts padding too.

    Returns:
        The division.

    Padding contract: padding is counted where it is computed, which is up to the longest row of a portion.
    """
    if tokens is None:
        own = ranks.share(index)
        portions = chunks(lengths[own].argsort(stable=True), rows)
        return Division(torch.arange(len(index), device=index.device), own, tuple(portions), ranks)
    order = lengths[index].argsort(stable=True)
    shares = [replace(ranks, rank=rank).share(index[order]) for rank in range(ranks.size)]
    each: list[list[int]] = [lengths[share].tolist() for share in shares]
    most = max(len(token_groups(share, tokens, padded=not packed)) for share in each)
    groups = token_groups(each[ranks.rank], tokens, at_least=most, padded=not packed)
    return Division(order, shares[ranks.rank], tuple(torch.tensor(group, device=index.device) for group in groups), ranks)
