"""Who shares a forward pass changes the cost, never a score."""

from collections.abc import Callable

import pytest
import torch

from rm.batches import Encoded, features_of, pair_batches, score_sequences, scores_and_features_of, scores_of
from rm.config import Pooling
from rm.model import Batch, RewardModel
from rm.packing import PackedBatch
from tokens.records import Pair

Start = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2


def sequences(number: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (number,), generator=generator).tolist()
    return [((BOS, 5 + i % 7), (*torch.randint(5, 50, (n,), generator=generator).tolist(), EOS)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_and_features_do_not_depend_on_the_batching(start: Start, pooling: Pooling, packing: bool) -> None:
    model, rows = start("llama", pooling), sequences(17)
    alone = torch.cat([scores_of(model, [row], PAD, 1) for row in rows])
    for microbatch in (1, 3, 5, 17, 40):
        scores, features = scores_and_features_of(model, rows, PAD, microbatch, packing)
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores_of(model, rows, PAD, microbatch, packing), scores, rtol=0, atol=0)
        torch.testing.assert_close(features_of(model, rows, PAD, microbatch, packing), features, rtol=0, atol=0)
        torch.testing.assert_close(score_sequences(model, rows, microbatch, PAD, packing=packing), alone, rtol=0, atol=1e-5)
    assert features.shape == (17, 32) and features.requires_grad
    torch.testing.assert_close(model.score(features), scores, rtol=0, atol=1e-6)
    assert score_sequences(model, [], 3, PAD, packing=packing).shape == (0,)


def passes(model: RewardModel, rows: list[Encoded], microbatch: int, packing: bool) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, args: tuple[Batch, ...]) -> None:
        batch = args[0]
        seen.append(tuple(batch.input_ids.shape))
        assert isinstance(batch, PackedBatch) == packing

    hook = model.register_forward_pre_hook(note)
    scores_of(model, rows, PAD, microbatch, packing)
    hook.remove()
    return seen


def test_like_lengths_share_a_pass_and_packing_takes_fewer_rows(start: Start) -> None:
    model, rows = start("llama"), sequences(24)
    tokens = sum(len(prompt) + len(response) for prompt, response in rows)
    apart, grouped, packed = (sum(r * w for r, w in passes(model, rows, *how)) for how in ((24, False), (6, False), (24, True)))
    assert tokens <= packed < grouped < apart
    assert packed < 1.1 * tokens


@pytest.mark.parametrize("packing", [False, True])
def test_the_number_of_passes_depends_on_the_number_of_sequences_only(start: Start, packing: bool) -> None:
    """Ranks with equally many rows must make equally many passes, however long theirs are."""
    model = start("llama")
    short = [((BOS, 5), (6,))] * 10
    long = [((BOS, 5), tuple([6] * 20))] * 10
    for rows in (short, long, short[:5] + long[:5]):
        assert len(passes(model, rows, 4, packing)) == 3


def test_pair_batches_shuffle_by_seed_and_show_every_pair_once_an_epoch() -> None:
    pairs = [Pair(str(i), (BOS,), (5,), (6,)) for i in range(7)]
    batches = list(pair_batches(pairs, 3, 2, seed=4))
    assert [len(batch) for batch in batches] == [3, 3, 1] * 2
    ids = [[pair.id for batch in batches[3 * epoch : 3 * epoch + 3] for pair in batch] for epoch in range(2)]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in ids) and ids[0] != ids[1]
    assert ids[0] == [str(i) for i in torch.randperm(7, generator=torch.Generator().manual_seed(4)).tolist()]
    assert [[p.id for p in b] for b in pair_batches(pairs, 3, 2, seed=4)] == [[p.id for p in b] for b in batches]
