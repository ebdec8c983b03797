"""The spread that inflation cannot raise, beside J, which it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.losses import difference_loss
from rm.spread import Separation, scale_free_spread


def test_by_hand() -> None:
    scores = torch.tensor(
        [[0.0, 2.0], [4.0, 4.0]]
    )  # stds 1 and 0 within; mean 2.5, variance (6.25 + 0.25 + 2 * 2.25) / 4 overall
    assert scale_free_spread(scores) == pytest.approx(0.5 / 2.75**0.5)


def test_its_ends() -> None:
    assert scale_free_spread(torch.tensor([[1.0, 1.0], [5.0, 5.0]])) == 0.0
    assert scale_free_spread(torch.tensor([[1.0, 5.0], [5.0, 1.0], [1.0, 5.0]])) == pytest.approx(1.0)
    assert scale_free_spread(torch.full((3, 2), 0.1)) == 0.0  # all alike: no variation to have a share of


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 5),
    st.integers(2, 5),
    st.floats(-20, 20).filter(lambda a: abs(a) > 1e-2),
    st.floats(-50, 50),
    st.integers(0, 999),
)
def test_it_does_not_know_the_scores_unit_or_origin(m: int, k: int, a: float, b: float, seed: int) -> None:
    scores = torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = scale_free_spread(scores)
    assert 0 <= spread <= 1 + 1e-12
    assert scale_free_spread(a * scores + b) == pytest.approx(spread, rel=1e-9)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    assert scale_free_spread(scores[:, order]) == pytest.approx(spread, rel=1e-9)


def test_inflation_raises_j_alone_and_telling_apart_raises_both() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]], dtype=torch.float64)
    plain, inflated, apart = (Separation.of(x) for x in (scores, 3 * scores, scores * torch.tensor([1.0, 2.0, 3.0])))
    assert plain.difference == pytest.approx(float(difference_loss(scores)))
    assert inflated.difference > plain.difference and inflated.spread == pytest.approx(plain.spread)
    assert apart.difference > plain.difference and apart.spread > plain.spread


@pytest.mark.parametrize("shape", [(3,), (0, 2), (3, 1)])
def test_bad_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="spread needs scores"):
        scale_free_spread(torch.zeros(shape))
