"""Scored responses as sequences: all responses of a batch of queries in one list, query by query.

Letters: Q queries, R responses of all queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rm.batches import Encoded, score_sequences, scores_of
from rm.model import RewardModel
from rm.ranking import comparisons, ranking_accuracy, ranking_loss
from tokens.queries import Query


def response_sequences(queries: Sequence[Query]) -> list[Encoded]:
    """All responses, query by query."""
    return [(query.prompt_ids, response) for query in queries for response in query.responses]


def score_responses(model: RewardModel, queries: Sequence[Query], pad_id: int, microbatch: int) -> Tensor:
    """[R] scores, query by query, with gradient."""
    return scores_of(model, response_sequences(queries), pad_id, microbatch, share=True)


@dataclass(frozen=True)
class SetNumbers:
    """How a set of scored responses is ranked.

    Args:
        accuracy: share of the comparisons ranked as scored; a tie of the model's counts one half.
        loss: nats per comparison.
    """

    accuracy: float
    loss: float


def measure_sets(model: RewardModel, sets: Mapping[str, Sequence[Query]], batch_size: int, pad_id: int) -> dict[str, SetNumbers]:
    """Rank the responses of several sets; a sequence that stands in more than one is scored once.

    Args:
        model: on its device.
        sets: queries by the name of their set, each with a comparison.
        batch_size: sequences per forward pass.
        pad_id: id written at padding.

    Returns:
        Numbers by the name of the set.

    Padding contract: a sequence's score does not depend on those beside it.
    """
    sequences = list(dict.fromkeys(sequence for queries in sets.values() for sequence in response_sequences(queries)))
    place = {sequence: row for row, sequence in enumerate(sequences)}
    scores = score_sequences(model, sequences, batch_size, pad_id)
    found = {}
    for name, queries in sets.items():
        own = scores[torch.tensor([place[sequence] for sequence in response_sequences(queries)])]
        compared = comparisons(queries)
        loss = float(ranking_loss(own, compared, compared.shape[1]))
        found[name] = SetNumbers(float(ranking_accuracy(own, compared)), loss)
    return found


def length_accuracy(train: Sequence[Query], held_out: Sequence[Query]) -> float:
    """What a model reaches that looks at nothing but the number of tokens.

    It prefers the longer response, or the shorter one where that is more often right in training.

    Args:
        train: that decide which.
        held_out: with a comparison.

    Returns:
        Share of the held-out comparisons; equal lengths count one half.
    """
    longer = _longer_wins(train)
    found = _longer_wins(held_out)
    return found if longer >= 0.5 else 1 - found


def _longer_wins(queries: Sequence[Query]) -> float:
    lengths = torch.tensor([float(len(response)) for query in queries for response in query.responses])
    return float(ranking_accuracy(lengths, comparisons(queries)))
