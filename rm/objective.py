"""L, what a fit descends, as a function of one batch of pairs.

Letters: N pairs of the batch, H features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rm.batches import by_length, pair_length, pair_sequences, scores_and_features_of, scores_of, share_rows
from rm.config import RewardConfig
from rm.contrastive_term import ContrastiveTerm, check_contrastive
from rm.losses import pair_accuracy, preference_loss
from rm.model import RewardModel
from tokens.ranks import Ranks
from tokens.records import Pair

DROPOUT_SEED_OFFSET = 6_700_417
"""Keeps the generator of the dropout masks apart from the one of the pairs' order."""
PROTOTYPE_SEED_OFFSET = 5_241_841
"""Keeps the generator of the prototypes apart from both."""


class PreferenceObjective:
    """The preference loss, each pair with its margin and smoothing; with ``reward.contrastive`` also the contrastive loss:

        L = L_rm + beta L_cl

    where both are taken over two dropout views of the batch: L_rm is the mean over the pairs of both, L_cl tells each row's other
    view from the other rows. It keeps what the fit reports beside the loss.

    Masks are drawn from the objective's own seed: the global generators of the CPU and of the devices are left as they were.
    Every call draws new ones. They depend on ``microbatch_size``, ``backward_size``, ``packing`` and the number of ranks; without
    dropout nothing does.

    Source: Secrets of RLHF Part II, Eqs 2, 5, 6 (preferences), 7-9 and section 3.1 (the total).

    Args:
        model: on its device, cut up already where there are several ranks.
        reward: microbatch size, packing, dropout, contrastive.
        pad_id: id written at padding.
        ranks: that share the model.
        seed: of the dropout masks and of the prototypes' first directions.

    Raises:
        UserError: if the contrastive loss cannot work under these settings, see ``check_contrastive``.
    """

    def __init__(self, model: RewardModel, reward: RewardConfig, pad_id: int, ranks: Ranks, seed: int) -> None:
        check_contrastive(reward, reward.batch_size, ranks.size)
        self.model, self.reward, self.pad_id, self.ranks = model, reward, pad_id, ranks
        self.accuracy: Tensor = torch.zeros(())
        """This rank's part of the share of the last batch's pairs that were ranked as labelled."""
        self.parts: dict[str, float] = {}
        """What else the last batch reports, by its name in the metrics; empty without a contrastive loss."""
        self._device = next(model.parameters()).device
        self.masks: torch.Generator = torch.Generator().manual_seed(seed + DROPOUT_SEED_OFFSET)
        self._shares = ranks.size == 1 and not (reward.dropout or reward.lora.dropout)  # else a pair's masks would agree in part
        self._term: ContrastiveTerm | None = None
        if reward.contrastive.method != "none":
            prototype_seed = seed + PROTOTYPE_SEED_OFFSET
            self._term = ContrastiveTerm(reward.contrastive, model.head.in_features, prototype_seed, self._device)

    @property
    def steps_collapsed(self) -> int:
        """Steps in a row in which the prototypes told no rows apart; 0 where there are none."""
        return 0 if self._term is None else self._term.steps_collapsed

    @steps_collapsed.setter
    def steps_collapsed(self, steps: int) -> None:
        if self._term is not None:
            self._term.steps_collapsed = steps

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the model and thrown away with the objective: the prototypes of SwAV."""
        return [] if self._term is None or self._term.prototypes is None else [self._term.prototypes]

    def __call__(self, batch: Sequence[Pair]) -> Tensor:
        """This rank's part of L, with gradient; the sum over the ranks is L.

        A rank without rows of its own scores one that stands in, and multiplies it by 0.

        Args:
            batch: N pairs, the same on every rank.

        Returns:
            A scalar, nats per pair.
        """
        (whole,) = self._terms(batch, None)
        return whole()

    def terms(self, batch: Sequence[Pair]) -> list[Callable[[], Tensor]]:
        """L as terms that sum to it, of ``reward.backward_size`` sequences each; one where that is null.

        Args:
            batch: N pairs, the same on every rank.

        Returns:
            Functions to be called one after another, all of them before the next batch; each gives what a call gives of its term.
        """
        return self._terms(batch, self.reward.backward_size)

    def _terms(self, batch: Sequence[Pair], most: int | None) -> list[Callable[[], Tensor]]:
        self.accuracy = torch.zeros((), device=self._device)
        parts = [list(batch)] if most is None else by_length(batch, pair_length, most // 2 * self.ranks.size)
        return [partial(self._of_part, part, len(batch)) for part in parts]

    def _of_part(self, pairs: Sequence[Pair], denominator: int) -> Tensor:
        with self._own_masks():
            if self._term is None:
                return self._of_scores(pairs, denominator)
            assert denominator == len(pairs), "RewardConfig refuses to divide a batch whose rows are compared"
            return self._of_views(pairs, self._term)

    def _of_scores(self, batch: Sequence[Pair], denominator: int) -> Tensor:
        shared = share_rows(batch, self.ranks)
        with self.model.dropout(self.reward.dropout):
            scores = scores_of(
                self.model, pair_sequences(shared), self.pad_id, self.reward.microbatch_size, self.reward.packing, self._shares
            )
        own = self.ranks.num_own(len(batch))
        if not own:
            return 0 * scores.sum()
        chosen, rejected = (half[:own] for half in scores.chunk(2))  # [own] each
        self.accuracy = self.accuracy + pair_accuracy(chosen, rejected) * (own / denominator)
        return _preference_loss(chosen, rejected, shared[:own], denominator)

    def _of_views(self, batch: Sequence[Pair], term: ContrastiveTerm) -> Tensor:
        sequences, size, packing = pair_sequences(batch), self.reward.microbatch_size, self.reward.packing
        with self.model.dropout(self.reward.contrastive.dropout):
            views = [scores_and_features_of(self.model, sequences, self.pad_id, size, packing) for _ in range(2)]
        first, second = (features.chunk(2) for _, features in views)  # ([N, H], [N, H]) each: chosen, rejected
        chosen, rejected = torch.stack([scores for scores, _ in views]).chunk(2, dim=1)  # [2, N] each
        self.accuracy = pair_accuracy(chosen.flatten(), rejected.flatten())
        preference = _preference_loss(chosen.flatten(), rejected.flatten(), [*batch, *batch], 2 * len(batch))
        contrastive = term((first[0], first[1]), (second[0], second[1]))
        self.parts = {"reward/preference_loss": float(preference.detach()), **term.parts}
        return preference + term.settings.beta * contrastive

    @contextmanager
    def _own_masks(self) -> Iterator[None]:
        devices = [] if self._device.type == "cpu" else list(range(torch.cuda.device_count()))
        drawn = int(torch.randint(2**62, (), generator=self.masks))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(drawn + self.ranks.rank)  # each rank has rows of its own
            yield


def _preference_loss(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair], denominator: int) -> Tensor:
    margin, smoothing = (
        torch.tensor(values, dtype=chosen.dtype, device=chosen.device)
        for values in ([pair.margin for pair in pairs], [pair.smoothing for pair in pairs])
    )
    return preference_loss(chosen, rejected, margin, smoothing, denominator)
