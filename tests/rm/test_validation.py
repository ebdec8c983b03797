"""Several validation sets of one model: scores, and the numbers that are written down."""

from __future__ import annotations

import math

import pytest
import torch

from rm.batches import score_sequences
from rm.validation import SetScores, measure, score_sets
from tests.rm.conftest import PAD, MakeModel
from tokens.records import Pair


def pair(name: str, prompt: int, chosen: int, rejected: int) -> Pair:
    return Pair(name, (1, prompt), (chosen, chosen, 2), (rejected, 2))


PAIRS = [pair(f"p{i}", 5 + i % 3, 10 + i, 20 + i) for i in range(7)]
TURNED = [Pair(p.id, p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in PAIRS[:4]]


def test_each_set_is_scored_as_it_would_be_alone_and_a_shared_sequence_once(make_model: MakeModel) -> None:
    model = make_model()
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = score_sets(model, {"original": PAIRS, "turned": TURNED}, 4, PAD)
    hook.remove()
    assert sum(seen) == 14, "the turned pairs' sequences are among those of the original ones"
    assert found["original"].ids == tuple(p.id for p in PAIRS)
    row = measure(found)
    for name, pairs in (("original", PAIRS), ("turned", TURNED)):
        chosen = score_sequences(model, [(p.prompt_ids, p.chosen_ids) for p in pairs], 2, PAD).double()
        rejected = score_sequences(model, [(p.prompt_ids, p.rejected_ids) for p in pairs], 2, PAD).double()
        assert row[f"validation/{name}/accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))
        assert row[f"validation/{name}/loss"] == pytest.approx(float(torch.log1p(torch.exp(rejected - chosen)).mean()), abs=1e-6)
    assert torch.equal(found["turned"].chosen, found["original"].rejected[:4])


def test_numbers_by_hand() -> None:
    scores = SetScores(("a", "b"), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    row = measure({"original": scores})
    assert row["validation/original/accuracy"] == 0.75
    assert row["validation/original/loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    # one pair judged with 0.731 and rightly; one with 0.5 and a half
    assert row["validation/original/ece"] == pytest.approx((1 - 1 / (1 + math.exp(-1))) / 2, abs=1e-6)
    assert row["scores/chosen_mean"] == 0.5 and row["scores/rejected_mean"] == 0.0
    assert row["scores/std"] == pytest.approx(math.sqrt(3) / 4)
