"""The ranking loss against the official code's matrix form, a naive loop and hand-computed cases."""

import math

import pytest
import torch
from torch.nn import functional

from rm.losses import bradley_terry_loss
from rm.ranked import length_accuracy, measure_sets, score_responses
from rm.ranking import comparisons, ranking_accuracy, ranking_loss
from tests.rm.conftest import MakeModel
from tokens.queries import Query

PAD, BOS, EOS = 0, 1, 2


def query(*scores: float, name: str = "q", lengths: tuple[int, ...] = ()) -> Query:
    sizes = lengths or tuple(range(1, len(scores) + 1))
    return Query(name, (BOS, 5), tuple((*range(10, 10 + size), EOS) for size in sizes), scores)


def test_by_hand() -> None:
    # scores 2, 1, 1: two comparisons; the tie is none. sigma(1) = 0.7310586, sigma(-1) = 0.2689414
    compared = comparisons([query(2, 1, 1)])
    assert compared.tolist() == [[0, 0], [1, 2]]
    loss = ranking_loss(torch.tensor([1.0, 0.0, 2.0]), compared, 2)
    assert float(loss) == pytest.approx((0.3132617 + 1.3132617) / 2, abs=1e-6)
    assert float(ranking_accuracy(torch.tensor([1.0, 0.0, 2.0]), compared)) == 0.5


def test_it_equals_the_matrix_form_that_counts_both_directions() -> None:
    """[Q, k] scores; every ordered pair with different labels once from each side, divided by their number."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (6, 5), generator=generator).double()
    scores = (torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    sign = torch.sign(labels[:, :, None] - labels[:, None, :])  # [Q, k, k]
    gaps = scores[:, :, None] - scores[:, None, :]
    matrix = -(functional.logsigmoid(sign * gaps) * (sign != 0)).sum() / (sign != 0).sum()
    compared = comparisons([query(*row) for row in labels.tolist()])
    ours = ranking_loss(scores.flatten(), compared, compared.shape[1])
    torch.testing.assert_close(ours, matrix, rtol=0, atol=1e-12)
    expected, got = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (matrix, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_it_adds_up_over_microbatches_and_is_bradley_terry_for_pairs() -> None:
    queries = [query(3, 1, 2), query(1, 1), query(0, 5, 5, 2)]
    scores = torch.randn(9, dtype=torch.float64)
    whole = comparisons(queries)
    assert whole.shape == (2, 3 + 0 + 5)
    one, rest = comparisons(queries[:1]), comparisons(queries[1:])
    parts = ranking_loss(scores[:3], one, 8) + ranking_loss(scores[3:], rest, 8)
    torch.testing.assert_close(parts, ranking_loss(scores, whole, 8), rtol=0, atol=1e-12)
    pairs = [Query(str(i), (BOS,), ((5,), (6,)), (1.0, 0.0)) for i in range(4)]
    of_pairs = scores[:8]
    expected = bradley_terry_loss(of_pairs[0::2], of_pairs[1::2], 4)
    assert ranking_loss(of_pairs, comparisons(pairs), 4).equal(expected)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="all scores are tied"):
        ranking_loss(torch.zeros(2), comparisons([query(1, 1)]), 1)


@pytest.mark.parametrize(
    ("scores", "message"), [((1.0,), "at least 2 responses"), ((1.0, math.nan), "not finite")], ids=["one", "nan"]
)
def test_queries_check_themselves(scores: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query(*scores)
    with pytest.raises(ValueError, match="must all have tokens"):
        Query("q", (BOS,), ((5,), ()), (1.0, 0.0))


@pytest.mark.parametrize(
    ("scores", "preferred"),
    [
        ((1, 0), (0,)),
        ((9, 8, 7, 3), (0, 1)),  # 1, 0.889, 0.778: above 0.85
        ((0, 0), ()),  # 0 / (0 + 1e-5): nobody is preferred
        ((5, 5, 4), (0, 1)),
        ((-1, -3), (0,)),  # moved up to 2 and 0
    ],
)
def test_what_is_imitated(scores: tuple[float, ...], preferred: tuple[int, ...]) -> None:
    assert query(*scores).preferred == preferred


def test_sets_are_measured_like_a_loop(make_model: MakeModel) -> None:
    model = make_model("last")
    sets = {"a": [query(2, 1, 1), query(0, 1)], "b": [query(1, 2, 3)]}
    found = measure_sets(model, sets, 2, PAD)
    for name, queries in sets.items():
        with torch.no_grad():
            rows = [score_responses(model, [each], PAD, 8) for each in queries]
        wins, losses = [], []
        for row, each in zip(rows, queries, strict=True):
            for j in range(len(row)):
                for k in range(len(row)):
                    if each.scores[j] > each.scores[k]:
                        wins.append(float(row[j] > row[k]))
                        losses.append(-math.log(1 / (1 + math.exp(float(row[k] - row[j])))))
        assert found[name].accuracy == pytest.approx(sum(wins) / len(wins))
        assert found[name].loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_length_alone_goes_the_way_that_training_shows() -> None:
    longer = [query(0, 1), query(0, 1), query(1, 0)]  # the second response is the longer one
    assert length_accuracy(longer, [query(0, 1)]) == 1.0
    assert length_accuracy([query(1, 0)], [query(0, 1)]) == 0.0
    assert length_accuracy(longer, [query(0, 1, lengths=(3, 3))]) == 0.5
