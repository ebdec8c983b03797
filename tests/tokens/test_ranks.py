"""Who does which rows. The exchanges themselves are tested where models are shared: tests/policy and tests/rm."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokens.ranks import ALONE, Ranks, clip_gradients, full, shard_like


@dataclass(frozen=True)
class Mesh:
    """Only its size is asked for here."""

    number: int

    def size(self) -> int:
        return self.number


def among(rank: int, size: int) -> Ranks:
    mesh: Any = Mesh(size)
    return Ranks(rank, size, mesh)


def test_shares_of_seven_rows_among_three() -> None:
    index = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    shares = [among(rank, 3).share(index).tolist() for rank in range(3)]
    assert shares == [[10, 13, 16], [11, 14, 16], [12, 15, 16]]  # the last row stands in for two that are not there
    assert [among(rank, 3).num_own(7) for rank in range(3)] == [3, 2, 2]
    assert [among(rank, 3).num_own(1) for rank in range(3)] == [1, 0, 0]
    assert among(2, 3).share(index[:1]).tolist() == [10]


@given(st.integers(1, 40), st.integers(1, 6))
def test_every_row_belongs_to_one_rank_and_all_have_as_many(num_rows: int, size: int) -> None:
    index = torch.randperm(num_rows)
    ranks = [among(rank, size) for rank in range(size)]
    shares = [rank.share(index) for rank in ranks]
    assert {len(share) for share in shares} == {-(-num_rows // size)}
    own = [row for rank, share in zip(ranks, shares, strict=True) for row in share[: rank.num_own(num_rows)].tolist()]
    assert sorted(own) == list(range(num_rows))
    assert torch.stack(shares, 1).flatten()[:num_rows].equal(index), "the order that gather puts them back in"


def test_alone_everything_is_itself() -> None:
    x, model = torch.randn(4, 3), nn.Linear(3, 2)
    index = torch.arange(4)
    assert ALONE.share(index) is index and ALONE.num_own(4) == 4
    assert ALONE.gather(x, 4) is x and ALONE.sum(x) is x and ALONE.max(x) is x and full(x) is x and shard_like(x, x) is x
    ALONE.shard(model)
    assert type(model) is nn.Linear
    assert {name: tensor.data_ptr() for name, tensor in ALONE.full_state(model).items()} == {
        name: tensor.data_ptr() for name, tensor in model.named_parameters()
    }


def test_clipping_is_torch_s_own() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours.parameters(), 0.5)
    assert norm == float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)) > 0.5
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and mine.grad.equal(other.grad)


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        among(2, 2)
    with pytest.raises(ValueError, match="need a mesh of 2"):
        Ranks(0, 2)
