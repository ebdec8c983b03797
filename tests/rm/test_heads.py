"""M heads on one backbone: against other optimisers, and what keeps them apart."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from rm import heads as heads_module
from rm.batches import pair_sequences, score_sequences
from rm.checkpoints import HEAD_SCALE
from rm.heads import (
    BOOTSTRAP_SEED_OFFSET,
    bootstrap_counts,
    feature_differences,
    fit_heads,
    fresh_heads,
    head_objective,
    sequence_features,
)
from tests.rm.conftest import EOS, PAD, MakeModel
from tokens.errors import UserError
from tokens.pair_store import PairStore
from tokens.records import Pair

N, H = 120, 6


@pytest.fixture
def differences() -> torch.Tensor:
    """Pairs that a true direction explains in part."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(N, H, generator=generator, dtype=torch.float64) * 3
    direction = torch.tensor([0.5, -0.3, 0.0, 0.2, 0.0, 0.1], dtype=torch.float64)
    prefers = torch.rand(N, generator=generator, dtype=torch.float64) < torch.sigmoid(features @ direction)
    return torch.where(prefers[:, None], features, -features)


def test_the_objective_by_hand() -> None:
    head, anchor = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    rows = torch.tensor([[math.log(3), 7.0], [-math.log(3), 7.0]], dtype=torch.float64)
    counts = torch.tensor([2.0, 0.0], dtype=torch.float64)
    wanted = (2 * math.log(4 / 3) + 0.5 * (2 / 0.09) * (1 + 4)) / 2  # sigma(log 3) = 3/4; |w - w0|^2 = 5
    assert float(head_objective(head, rows, counts, anchor)) == pytest.approx(wanted, rel=1e-12)


def test_the_gradient_by_finite_differences(differences: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(H, generator=generator, dtype=torch.float64).requires_grad_(True)
    anchor = torch.randn(H, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: head_objective(w, differences, bootstrap_counts(N, 3), anchor), (head,))


def test_without_an_anchor_it_is_logistic_regression(differences: torch.Tensor) -> None:
    counts = bootstrap_counts(N, 11)
    signs = np.where(np.arange(N) % 2, 1, -1)  # scikit-learn wants two classes; a pair turned round is the same pair
    reference = LogisticRegression(C=HEAD_SCALE**2 / H, fit_intercept=False, tol=1e-12, max_iter=10_000)
    reference.fit(differences.numpy() * signs[:, None], signs, sample_weight=counts.numpy())
    found = torch.tensor(reference.coef_[0], dtype=torch.float64).requires_grad_(True)
    torch.autograd.backward(head_objective(found, differences, counts, torch.zeros(H, dtype=torch.float64)))
    assert found.grad is not None and float(found.grad.abs().max()) < 1e-6


def test_each_head_is_the_minimum_that_another_optimiser_finds(differences: torch.Tensor) -> None:
    seeds = (3, 4)
    rows = differences.numpy()
    heads = fit_heads(differences, seeds)
    for head, seed, anchor in zip(heads, seeds, fresh_heads(2, H, seeds).numpy(), strict=True):
        counts = bootstrap_counts(N, seed + BOOTSTRAP_SEED_OFFSET).numpy()

        def objective(w: np.ndarray, counts: np.ndarray = counts, anchor: np.ndarray = anchor) -> float:
            return float(counts @ np.logaddexp(0, -rows @ w) + 0.5 * H / HEAD_SCALE**2 * ((w - anchor) ** 2).sum())

        best = minimize(objective, np.zeros(H), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 20_000})
        np.testing.assert_allclose(head.numpy(), best.x, atol=2e-5)


def test_a_head_depends_on_its_own_seed_only(differences: torch.Tensor) -> None:
    together, alone = fit_heads(differences, (1, 2, 3)), fit_heads(differences, (2,))
    assert torch.equal(together[1], alone[0])
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_heads_agree_where_pairs_speak_and_keep_their_start_where_none_does(differences: torch.Tensor) -> None:
    silent = differences.clone()
    silent[:, 2] = 0  # no pair says anything of the third feature
    seeds = tuple(range(20))
    heads = fit_heads(silent, seeds).double()
    torch.testing.assert_close(heads[:, 2], fresh_heads(20, H, seeds)[:, 2], atol=1e-5, rtol=0)
    many = fit_heads(silent.repeat(50, 1), seeds)
    assert float(many[:, 0].std()) < 0.3 * float(heads[:, 0].std()), "more pairs leave less to disagree on"


def test_bootstrap_counts_are_of_a_sample_with_replacement() -> None:
    counts = bootstrap_counts(10_000, 0)
    assert float(counts.sum()) == 10_000
    assert float((counts == 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.02)
    assert not torch.equal(counts, bootstrap_counts(10_000, 1))


def test_features_give_the_model_s_scores_in_any_batch(make_model: MakeModel) -> None:
    model = make_model(pooling="mean")
    sequences = [((1, *range(5, 7 + i)), (*range(20, 22 + 3 * i), EOS)) for i in range(5)]
    features = sequence_features(model, sequences, 2, PAD)
    assert features.shape == (5, 32)
    torch.testing.assert_close(model.score(features), score_sequences(model, sequences, 8, PAD), atol=1e-6, rtol=0)
    torch.testing.assert_close(features, sequence_features(model, sequences, 5, PAD), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sequence_features(model, sequences, 0, PAD)


def test_bad_differences_are_refused(differences: torch.Tensor) -> None:
    broken = differences.clone()
    broken[7, 1] = math.nan
    with pytest.raises(UserError, match=r"pair 7 are not finite.*Lower reward.lr"):
        fit_heads(broken, (0,))
    with pytest.raises(ValueError, match=r"\[N, H\] with N >= 1, got \(0, 6\)"):
        fit_heads(differences[:0], (0,))
    with pytest.raises(ValueError, match="a seed for each of 3 heads, got 2"):
        fresh_heads(3, H, (1, 2))


def test_differences_are_those_of_all_features_at_once_and_equal_sequences_are_computed_once(make_model: MakeModel) -> None:
    model = make_model(pooling="last")
    pairs = [Pair(str(i), (1, *range(5, 6 + i % 3)), (20 + i % 4, EOS), (*range(30, 31 + i % 5), EOS)) for i in range(30)]
    sequences = pair_sequences(pairs)
    distinct = list(dict.fromkeys(sequences))
    features = sequence_features(model, distinct, 4, PAD)
    chosen, rejected = (torch.tensor([distinct.index(s) for s in side]) for side in (sequences[:30], sequences[30:]))
    passes: list[int] = []
    found = feature_differences(model, PairStore.of(pairs), 4, PAD, lambda: passes.append(1))
    assert torch.equal(found, features[chosen] - features[rejected])
    assert len(passes) == math.ceil(len(distinct) / 4) < 60 / 4
    with pytest.raises(ValueError, match="at least 1 each; got 4 and 0"):
        feature_differences(model, [], 4, PAD)


def test_a_sum_over_the_pairs_may_be_taken_in_parts(differences: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    whole = fit_heads(differences, (1, 2), lambda: looks.append(1))
    assert len(looks) >= 4
    monkeypatch.setattr(heads_module, "ROWS", 50)
    torch.testing.assert_close(fit_heads(differences, (1, 2)), whole, atol=1e-6, rtol=0)
    broken = differences.clone()
    broken[77, 1] = math.inf
    with pytest.raises(UserError, match="pair 77 are not finite"):
        fit_heads(broken, (0,))
