"""Springs to the start: by hand, against autograd, and the Fisher information of a model in which it can be written down."""

import torch
from torch import nn

from rm.penalties import QuadraticPenalty, fisher_diagonal
from tests.rm.conftest import MakeModel
from tests.rm.test_ranking import query


def test_by_hand() -> None:
    one, two = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))
    plain = QuadraticPenalty.at([one, two], None, 2.0)
    stiff = QuadraticPenalty.at([one, two], [torch.tensor([1.0, 0.0]), torch.tensor([[10.0]])], 2.0)
    assert plain().item() == stiff().item() == 0
    with torch.no_grad():
        one += torch.tensor([1.0, 5.0])
        two -= 2
    assert plain().item() == 1 + 25 + 4
    assert stiff().item() == 1 + 0 + 40
    stiff().backward()
    assert one.grad is not None and two.grad is not None
    assert one.grad.tolist() == [2.0, 0.0] and two.grad.tolist() == [[-40.0]]  # coef * F * (theta - theta*)


def test_fisher_of_the_head_is_that_of_logistic_regression(make_model: MakeModel) -> None:
    """For w of the head, d/dw log sigma(w . D) = (1 - sigma(w . D)) D with D the difference of the features."""
    model = make_model("mean")
    queries = [query(1, 0), query(0, 1, lengths=(4, 2)), query(2, 1, 0), query(3, 3)]
    fisher = fisher_diagonal(model, queries, [model.head.weight], 0, 8)[0]
    expected = torch.zeros_like(model.head.weight[0])
    from rm.batches import features_of
    from rm.ranked import response_sequences

    for each in queries[:3]:  # the last has nothing to compare, and counts for nothing
        features = features_of(model, response_sequences([each]), 0, 8).detach()
        gradient = torch.zeros_like(expected)
        for better, worse in each.comparisons:
            difference = features[better] - features[worse]
            gradient += (1 - torch.sigmoid(model.head.weight[0].detach() @ difference)) * difference
        expected += gradient.square() / 3
    torch.testing.assert_close(fisher[0], expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_play_no_part_have_none(make_model: MakeModel) -> None:
    model = make_model("last")
    idle = nn.Parameter(torch.ones(3))
    assert fisher_diagonal(model, [query(1, 0)], [idle], 0, 8)[0].tolist() == [0, 0, 0]
