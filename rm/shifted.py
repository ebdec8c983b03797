"""S_k, the shifted samples of one round: what MetaRM ascends on, and what is kept back to measure on.

Letters: m prompts of one batch, k responses per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rm.batches import Encoded, by_length, draw_groups, score_sequences, scores_of, share_rows
from rm.config import HELDOUT_SHARE, RewardConfig
from rm.losses import difference_loss
from rm.model import RewardModel
from rm.spread import Separation
from tokens.errors import UserError
from tokens.ranks import Ranks

Group = Sequence[Encoded]
"""One prompt's k responses, each with the prompt's ids."""

ORDER_SEED_OFFSET = 7_919_027
"""Keeps the generator of S_k's order apart from the one of the pairs' order."""

HELDOUT_SEED_OFFSET = 15_485_867
"""Keeps the generator that chooses the prompts kept back apart from both."""


class ShiftedSamples:
    """The samples of S_k beside the model that scores them.

    Responses that repeat one of their prompt cost nothing: each distinct sequence is scored once and its score stands for all,
    which gives the same J and gradient. J has gradient 0 between equal scores, so they teach nothing either; they are counted.

    Args:
        groups: S_k, an inner sequence per prompt: its k responses, each with the prompt's ids.
        model: on its device, cut up already where there are several ranks.
        reward: how sequences are put into batches.
        prompts_per_step: m.
        seed: of the prompts that are kept back, and of the order of the others.
        pad_id: id written at padding.
        ranks: that share the model; all hold all samples.

    Raises:
        UserError: if there are no prompts, or they are ragged, mixed, or have k < 2.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        model: RewardModel,
        reward: RewardConfig,
        prompts_per_step: int,
        seed: int,
        pad_id: int,
        ranks: Ranks,
    ) -> None:
        _check(groups)
        self.model, self.reward, self.pad_id, self.ranks = model, reward, pad_id, ranks
        self.prompts_per_step = prompts_per_step
        self.duplicate_share = num_duplicates(groups) / sum(len(group) for group in groups)
        back = kept_back(len(groups), seed)
        self.heldout = [group for place, group in enumerate(groups) if place in back]
        self.groups = [group for place, group in enumerate(groups) if place not in back]
        self.batches = draw_groups(self.groups, prompts_per_step, seed + ORDER_SEED_OFFSET)

    def difference(self, groups: Sequence[Group], denominator: int | None = None) -> Tensor:
        """This rank's part of J on some prompts, with gradient; the sum over the ranks is J.

        Source: Secrets of RLHF Part II, Eq 11.

        Args:
            groups: m prompts, the same on every rank.
            denominator: prompts that J is the mean over; None = m.

        Returns:
            A scalar.
        """
        own = share_rows(groups, self.ranks)
        distinct, index = _distinct(own)
        longest = max(len(_distinct(share_rows(groups, replace(self.ranks, rank=r)))[0]) for r in range(self.ranks.size))
        distinct += distinct[-1:] * (longest - len(distinct))  # FSDP2 wants equally many forward passes on all ranks
        size, packing, share = self.reward.microbatch_size, self.reward.packing, self.ranks.size == 1
        scores = scores_of(self.model, distinct, self.pad_id, size, packing, share)
        num_own = self.ranks.num_own(len(groups))
        if not num_own:
            return 0 * scores.sum()
        return difference_loss(scores[index.to(scores.device)][:num_own], denominator or len(groups))

    def terms(self, groups: Sequence[Group]) -> list[Callable[[], Tensor]]:
        """J on some prompts as terms that sum to it, of ``reward.backward_size`` sequences each; one where that is null.

        Args:
            groups: m prompts, the same on every rank.

        Returns:
            Functions to be called one after another.
        """
        return self._terms(groups, len(groups))

    def _terms(self, groups: Sequence[Group], denominator: int) -> list[Callable[[], Tensor]]:
        most, parts = self.reward.backward_size, [list(groups)]
        if most is not None:
            parts = by_length(groups, _longest, max(1, most // len(groups[0])) * self.ranks.size)
        return [partial(self.difference, part, denominator) for part in parts]

    def parts(self) -> Iterator[Callable[[], Tensor]]:
        """J over all prompts that may be ascended on, as terms of m prompts each or fewer; their sum is J.

        Returns:
            Functions to be called one after another.
        """
        for start in range(0, len(self.groups), self.prompts_per_step):
            yield from self._terms(self.groups[start : start + self.prompts_per_step], len(self.groups))

    def measure(self) -> Separation:
        """J and the scale-free spread of the prompts kept back, without gradient; communicates where there are several ranks.

        Returns:
            Both, equal on all ranks.
        """
        distinct, index = _distinct(self.heldout)
        size, packing = self.reward.microbatch_size, self.reward.packing
        scores = score_sequences(self.model, distinct, size, self.pad_id, self.ranks, packing)
        return Separation.of(scores[index])


def kept_back(num_prompts: int, seed: int) -> frozenset[int]:
    """The prompts of S_k that no ascent sees: the validation set of the meta dataset.

    Source: Secrets of RLHF Part II, the text at Figure 16, which shows score differences on one; the share is ours.

    Args:
        num_prompts: of S_k.
        seed: of the fit.

    Returns:
        Their places, in the order in which the fit was given the prompts; none where there is one prompt.
    """
    if num_prompts < 2:
        return frozenset()
    order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed + HELDOUT_SEED_OFFSET)).tolist()
    return frozenset(order[: max(1, int(HELDOUT_SHARE * num_prompts))])


def num_duplicates(groups: Sequence[Group]) -> int:
    """Responses that repeat an earlier one of their prompt.

    Args:
        groups: an inner sequence per prompt.

    Returns:
        How many, over all prompts.
    """
    return sum(len(group) - len(set(group)) for group in groups)


def _longest(group: Group) -> int:
    return max(len(prompt) + len(response) for prompt, response in group)


def _distinct(groups: Sequence[Group]) -> tuple[list[Encoded], Tensor]:
    """Each distinct sequence once, in first-seen order, and [m, k] int64: where each response's sequence stands among them."""
    places: dict[Encoded, int] = {}
    index = [[places.setdefault(sequence, len(places)) for sequence in group] for group in groups]
    return list(places), torch.tensor(index)


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise UserError("MetaRM got no prompts in S_k: expected at least 1. Raise meta.num_prompts or set meta.enabled to false.")
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1 or sizes[0] < 2:
        raise UserError(
            f"MetaRM needs the same number k >= 2 of responses for every prompt of S_k, got {sizes}. Set meta.samples_per_prompt."
        )
    for index, group in enumerate(groups):
        if len({prompt for prompt, _ in group}) > 1:
            raise UserError(f"entry {index} of S_k mixes responses to different prompts: expected one prompt's k responses.")
