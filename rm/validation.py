"""How a reward model does on sets of held-out pairs: original labels, a second labeller's, other domains.

Letters: N pairs of a set, B sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rm.batches import Encoded, pair_sequences, score_sequences
from rm.losses import bradley_terry_loss, calibration_error, pair_accuracy
from rm.model import RewardModel
from tokens.ranks import ALONE, Ranks
from tokens.records import Pair

CALIBRATION_BINS = 10
"""Of equal width, over the probability that the model gives to the response it prefers: [1/2, 1]."""


@dataclass(frozen=True)
class SetScores:
    """Scores of the pairs of one set.

    Args:
        ids: of the N pairs.
        chosen: [N] float32, on the CPU.
        rejected: [N] float32, on the CPU.
    """

    ids: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor

    @property
    def accuracy(self) -> float:
        """Share ranked as labelled; a tie counts one half."""
        return float(pair_accuracy(self.chosen, self.rejected))

    @property
    def loss(self) -> float:
        """Bradley-Terry loss (Secrets of RLHF Part II, Eq 2), nats per pair."""
        return float(bradley_terry_loss(self.chosen, self.rejected, len(self.ids)))


def score_sets(
    model: RewardModel, sets: Mapping[str, Sequence[Pair]], batch_size: int, pad_id: int, ranks: Ranks = ALONE
) -> dict[str, SetScores]:
    """Score several sets of pairs; a sequence that stands in more than one pair or set is scored once.

    Args:
        model: on its device.
        sets: pairs by the name of their set; none of them empty.
        batch_size: sequences per forward pass.
        pad_id: id written at padding.
        ranks: that share the model; all must call this, with the same sets.

    Returns:
        The scores by the name of the set, pairs in the order given.

    Padding contract: a sequence's score does not depend on those beside it.
    """
    sequences: list[Encoded] = list(dict.fromkeys(chain.from_iterable(pair_sequences(pairs) for pairs in sets.values())))
    place = {sequence: row for row, sequence in enumerate(sequences)}
    scores = score_sequences(model, sequences, batch_size, pad_id, ranks)
    found = {}
    for name, pairs in sets.items():
        rows = torch.tensor([place[sequence] for sequence in pair_sequences(pairs)])
        chosen, rejected = scores[rows].chunk(2)
        found[name] = SetScores(tuple(pair.id for pair in pairs), chosen, rejected)
    return found


def measure(sets: Mapping[str, SetScores]) -> dict[str, float]:
    """Numbers of every set, and how the scores of the first set's responses lie.

    Accuracy, loss (Secrets of RLHF Part II, Eq 2) and expected calibration error of each set; the means of the chosen and of the
    rejected responses' scores and the standard deviation of both together, in which reward inflation shows (its appendix A).

    Args:
        sets: by name, at least one.

    Returns:
        By the name that metrics files have: ``validation/<set>/accuracy``, ``/loss`` in nats per pair, ``/ece``;
        ``scores/chosen_mean``, ``scores/rejected_mean``, ``scores/std`` in units of the score.
    """
    row: dict[str, float] = {}
    for name, scores in sets.items():
        row[f"validation/{name}/accuracy"] = scores.accuracy
        row[f"validation/{name}/loss"] = scores.loss
        row[f"validation/{name}/ece"] = calibration_error(scores.chosen, scores.rejected, CALIBRATION_BINS).expected_error
    first = next(iter(sets.values()))
    row["scores/chosen_mean"] = float(first.chosen.mean())
    row["scores/rejected_mean"] = float(first.rejected.mean())
    row["scores/std"] = float(torch.cat([first.chosen, first.rejected]).std(correction=0))
    return row
