"""L, the preference loss of one batch of pairs.

Letters: N pairs of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rm.batches import pair_sequences, scores_of, share_rows
from rm.config import RewardConfig
from rm.losses import bradley_terry_loss, pair_accuracy
from rm.model import RewardModel
from tokens.ranks import Ranks
from tokens.records import Pair


class PreferenceObjective:
    """What a fit descends, as a function of a batch; it keeps what the fit reports beside the loss.

    Args:
        model: on its device, cut up already where there are several ranks.
        reward: microbatch size.
        pad_id: id written at padding.
        ranks: that share the model.
    """

    def __init__(self, model: RewardModel, reward: RewardConfig, pad_id: int, ranks: Ranks) -> None:
        self.model, self.reward, self.pad_id, self.ranks = model, reward, pad_id, ranks
        self.accuracy: Tensor = torch.zeros(())
        """This rank's part of the share of the last batch's pairs that were ranked as labelled."""

    def __call__(self, batch: Sequence[Pair]) -> Tensor:
        """This rank's part of L, with gradient; the sum over the ranks is L.

        A rank without rows of its own scores one that stands in, and multiplies it by 0.

        Args:
            batch: N pairs, the same on every rank.

        Returns:
            A scalar, nats per pair.
        """
        scores = scores_of(self.model, pair_sequences(share_rows(batch, self.ranks)), self.pad_id, self.reward.microbatch_size)
        own = self.ranks.num_own(len(batch))
        if not own:
            self.accuracy = torch.zeros((), device=scores.device)
            return 0 * scores.sum()
        chosen, rejected = (half[:own] for half in scores.chunk(2))  # [own] each
        self.accuracy = pair_accuracy(chosen, rejected) * (own / len(batch))
        return bradley_terry_loss(chosen, rejected, len(batch))
