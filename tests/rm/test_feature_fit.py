"""Joint learning of features and raters' weights: the loss, where it begins, and that raters who disagree are told apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rm.config import RewardConfig
from rm.feature_check import cross_validated, new_rater, ranked_right, trained_raters
from rm.feature_fit import FeatureStep, Judged, feature_loss, fit_features, in_units_of_raters, label_weights
from rm.feature_start import decompose, label_matrix, start_features
from rm.features import FeatureModel, scores
from rm.features_config import FeaturesConfig
from rm.resume import Saves
from tests.rm.conftest import PAD, MakeModel
from tests.rm.toy import toy_pairs
from tokens.errors import UserError
from tokens.records import Pair
from tokens.saved_state import SavedState, latest_state, save_state

NAMES = tuple(f"r{i}" for i in range(6))
REWARD = RewardConfig(lr=3e-3, batch_size=16, epochs=4)


def turned(pair: Pair) -> Pair:
    return Pair(pair.id, pair.prompt_ids, pair.rejected_ids, pair.chosen_ids)


def disagreeing(n: int = 32, seed: int = 0) -> Judged:
    """Raters with even numbers like good words, the others bad ones; all judge the same pairs."""
    pairs = toy_pairs(n, seed)
    rows = [(pair if rater % 2 == 0 else turned(pair), rater) for pair in pairs for rater in range(len(NAMES))]
    return Judged(tuple(pair for pair, _ in rows), tuple(rater for _, rater in rows))


def learnt(
    make_model: MakeModel, features: FeaturesConfig, judged: Judged, saves: Saves | None = None
) -> tuple[FeatureModel, list[FeatureStep]]:
    steps: list[FeatureStep] = []
    model = start_features(make_model("mean"), NAMES, judged, features, 3, 16, PAD)
    fit_features(model, judged, features, REWARD, 3, PAD, steps.append, saves=saves)
    return model, steps


def test_the_loss_by_hand_and_its_gradient() -> None:
    differences = torch.tensor([[math.log(3), 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 5.0], [3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1.5, 0.5], dtype=torch.float64)
    wanted = (1.5 * math.log(4 / 3) + 0.5 * math.log(2)) / 2  # sigma(log 3) = 3/4, sigma(0) = 1/2
    assert float(feature_loss(differences, weights, counts).detach()) == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(lambda d, w: feature_loss(d, w, counts), (differences, weights))


def test_on_fixed_features_it_is_each_raters_logistic_regression() -> None:
    """With features fixed, the least over all weights is that of scikit-learn for each rater alone."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    raters = torch.arange(80) % 2
    rows = torch.where((torch.rand(80, generator=generator) < 0.25)[:, None], -rows, rows)
    weights = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = feature_loss(rows, weights[raters], torch.ones(80, dtype=torch.float64))
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    for rater in (0, 1):
        own = rows[raters == rater].numpy()
        signs = np.where(np.arange(len(own)) % 2, 1, -1)
        reference = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(own * signs[:, None], signs)
        np.testing.assert_allclose(weights[rater].detach().numpy(), reference.coef_[0], rtol=1e-3, atol=1e-4)


def test_averages_over_examples_or_raters() -> None:
    raters = (0, 0, 0, 1)
    assert label_weights(raters, "examples").tolist() == [1, 1, 1, 1]
    weights = label_weights(raters, "raters")
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2]) and float(weights.mean()) == pytest.approx(1)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert float((weights * losses).mean()) == pytest.approx((2 + 10) / 2)  # the mean over raters of their means


@pytest.mark.parametrize("init", ["random", "svd"])
def test_raters_who_disagree_are_told_apart(make_model: MakeModel, init: str) -> None:
    model, steps = learnt(make_model, FeaturesConfig.model_validate({"d": 2, "init": init, "lr": 0.05}), disagreeing())
    tests = disagreeing(8, seed=9)
    found = trained_raters(model, disagreeing(), tests, 16, PAD)
    assert [row.rater for row in found] == list(NAMES) and {row.num_labels for row in found} == {32}
    assert min(row.accuracy for row in found) > 0.85 and steps[-1].loss < 0.3
    assert np.mean([row.mean_accuracy for row in found]) == pytest.approx(0.5)  # half of them want the opposite


def test_one_reward_for_all_serves_nobody_who_disagrees_and_learns_where_all_agree(make_model: MakeModel) -> None:
    shared = FeaturesConfig(d=1, shared=True)
    model, steps = learnt(make_model, shared, disagreeing())
    assert float((model.weights.detach() - 1).abs().max()) == 0 and steps[-1].loss > 0.6
    pairs = toy_pairs(48)
    agreed = Judged(tuple(pairs), tuple(i % len(NAMES) for i in range(48)))
    model, _ = learnt(make_model, shared, agreed)
    assert np.mean([row.accuracy for row in trained_raters(model, agreed, agreed, 16, PAD)]) > 0.9


def test_a_new_rater_is_served_after_a_few_answers(make_model: MakeModel) -> None:
    model, _ = learnt(make_model, FeaturesConfig(d=2, lr=0.05), disagreeing())
    new = [turned(pair) for pair in toy_pairs(30, seed=21)]
    rows = model.differences(new, 16, PAD)
    mean = model.mean_weights
    found = new_rater("new", rows[:10], rows[10:], (0, 3, 10, 30), 1.0, mean, mean)
    assert [row.num_labels for row in found] == [0, 3, 10] and found[-1].accuracy > 0.85
    assert found[0].accuracy == found[0].mean_accuracy
    sure = cross_validated(rows, 1.0, mean)
    assert sure is not None and sure > 0.85 and cross_validated(rows[:4], 1.0, mean) is None


def test_units_of_raters_change_weights_and_no_reward(make_model: MakeModel) -> None:
    generator = torch.Generator().manual_seed(4)
    backbone = make_model()
    weights = torch.randn(40, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1]) + 2
    model = FeatureModel(backbone, torch.randn(3, 32, generator=generator), [str(i) for i in range(40)], weights.clone())
    sequences = [((1, 5), (10, 11, 2)), ((1, 7), (12, 2))]
    before = torch.stack([scores(model.features(sequences, 2, PAD), w) for w in model.weights.detach()])
    in_units_of_raters(model, floor=1e-9)
    after = torch.stack([scores(model.features(sequences, 2, PAD), w) for w in model.weights.detach()])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert float((model.weights.detach() - weights).abs().max()) > 0.1
    torch.testing.assert_close(torch.cov(model.weights.detach().T, correction=0), torch.eye(3), rtol=0, atol=1e-3)


def test_equal_seeds_give_equal_models_and_adapters_on_the_backbone_too(make_model: MakeModel) -> None:
    one, _ = learnt(make_model, FeaturesConfig(d=2), disagreeing(6))
    two, _ = learnt(make_model, FeaturesConfig(d=2), disagreeing(6))
    torch.testing.assert_close(one.projection, two.projection, rtol=0, atol=0)
    torch.testing.assert_close(one.weights, two.weights, rtol=0, atol=0)


@pytest.mark.parametrize("features", [FeaturesConfig(d=2, init="svd"), FeaturesConfig(d=1, shared=True)])
def test_a_fit_goes_on_from_a_save_to_the_same_bits(make_model: MakeModel, features: FeaturesConfig, tmp_path: Path) -> None:
    judged, states = disagreeing(6), dict[int, SavedState]()
    whole, steps = learnt(make_model, features, judged, Saves(3, states.__setitem__))
    assert list(states) == [3, 6, 9] and len(steps) == 12  # nothing is saved where all is done
    plain, same_steps = learnt(make_model, features, judged)
    for done in (3, 9):
        save_state(tmp_path / str(done), done, states[done])
        begin = latest_state(tmp_path / str(done))
        later = list[int]()
        again, all_steps = learnt(make_model, features, judged, Saves(1, lambda number, state: later.append(number), begin))  # noqa: B023
        assert all_steps == steps == same_steps and later == list(range(done + 1, 12))
        for mine, theirs, undisturbed in zip(again.parameters(), whole.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs) and torch.equal(mine, undisturbed)


def test_a_frozen_backbone_stays_as_it_is(make_model: MakeModel) -> None:
    backbone, judged = make_model("mean"), disagreeing(6)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    for p in backbone.parameters():
        p.requires_grad_(False)
    model = start_features(backbone, NAMES, judged, FeaturesConfig(d=2), 3, 16, PAD)
    weights = model.weights.detach().clone()
    fit_features(model, judged, FeaturesConfig(d=2), REWARD, 3, PAD, lambda step: None)
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())
    assert not torch.equal(model.weights, weights)


def test_the_matrix_of_pairs_and_raters_by_hand() -> None:
    a, b = toy_pairs(2)
    judged = Judged((a, turned(a), b, b, turned(b)), (0, 1, 2, 0, 0))
    pairs, matrix, known = label_matrix(judged, 3)
    assert [pair.id for pair in pairs] == ["p0", "p1"]
    assert matrix.tolist() == [[1, -1, 0], [0, 0, 1]] and known.tolist() == [[True, True, False], [True, False, True]]


def test_a_decomposition_fills_in_what_is_missing() -> None:
    """Two kinds of raters, a third of the labels missing: the missing ones are foretold."""
    generator = torch.Generator().manual_seed(1)
    kind, taste = torch.randn(40, 2, generator=generator), torch.eye(2)[torch.arange(12) % 2]
    truth = (kind @ taste.T).sign().double()
    known = torch.rand(40, 12, generator=generator) > 0.33
    left, right = decompose(truth * known, known, 2)
    foretold = (left @ right.T).sign() == truth
    assert float(foretold[~known].double().mean()) > 0.95
    torch.testing.assert_close(left.T @ left, right.T @ right, rtol=1e-6, atol=1e-6)  # S is split evenly


def test_bad_input(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="as many raters as pairs and at least one, got 0 and 0"):
        Judged((), ())
    judged = Judged(tuple(toy_pairs(6)), (0, 1, 2, 3, 4, 5))
    with pytest.raises(UserError, match=r"several raters judged, got 1.00 raters a pair and none with two.*init to random"):
        start_features(make_model(), NAMES, judged, FeaturesConfig(d=2, init="svd"), 3, 16, PAD)
    with pytest.raises(UserError, match=r"matrix of 6 pairs and 6 raters: features.d is 7"):
        start_features(make_model(), NAMES, judged, FeaturesConfig(d=7, init="svd"), 3, 16, PAD)
    model = start_features(make_model(), NAMES[:2], judged, FeaturesConfig(d=2), 3, 16, PAD)
    with pytest.raises(ValueError, match="a label is of rater 5, the model has 2"):
        fit_features(model, judged, FeaturesConfig(d=2), REWARD, 3, PAD, lambda step: None)
    with pytest.raises(ValueError, match="shared is true and d is 32"):
        FeaturesConfig(shared=True)
    assert ranked_right(torch.tensor([1.0, 0.0, -1.0])) == 0.5
