"""The contrastive losses against other libraries, closed forms and finite differences; batches that are too small; collapse."""

import importlib.util
import logging
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss
from scipy.optimize import linprog
from torch import Tensor
from torch.nn import functional

from rm import contrastive, contrastive_term
from rm.config import ContrastiveConfig, RewardConfig
from rm.contrastive import contrasted, prototype_scores, prototype_usage, simcse_loss, sinkhorn, swav_loss
from rm.contrastive_term import ContrastiveSettings, ContrastiveTerm, check_contrastive, rows_needed
from tokens.errors import UserError


def views(n: int, features: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    first = torch.randn(n, features, dtype=torch.float64)
    return first, first + noise * torch.randn(n, features, dtype=torch.float64)


@pytest.fixture(scope="module")
def lightly_swav() -> ModuleType:
    """Lightly's loss file alone: its package imports torchvision."""
    package = importlib.util.find_spec("lightly")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("lightly_swav_loss", Path(package.origin).parent / "loss" / "swav_loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# SimCSE


def test_simcse_by_hand() -> None:
    # cosines [[1, 0.6], [0, 0.8]] at tau 0.5: -log(e^2 / (e^2 + e^1.2)), -log(e^1.6 / (1 + e^1.6))
    first = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    second = torch.tensor([[3.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    expected = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    assert float(simcse_loss(first, second, 0.5)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [2, 7, 32])
def test_simcse_equals_ntxent_of_another_library(n: int) -> None:
    """Its queries are the rows of one view, its references those of the other: a positive each, the others negatives.

    Were both labels one tensor, it would take both sets for one, and no row for its own positive.
    """
    first, second = views(n, 8)
    labels = torch.arange(n)
    reference = NTXentLoss(temperature=0.05)(first, labels, ref_emb=second, ref_labels=labels.clone())
    torch.testing.assert_close(simcse_loss(first, second, 0.05), reference, rtol=1e-9, atol=1e-9)


def test_simcse_gradient_is_that_of_finite_differences() -> None:
    first, second = (view.requires_grad_() for view in views(4, 3))
    assert torch.autograd.gradcheck(lambda s, t: simcse_loss(s, t, 0.3), (first, second))


def test_simcse_where_all_rows_are_alike_where_none_are_and_alone() -> None:
    ones = torch.ones(6, 3, dtype=torch.float64)
    assert float(simcse_loss(ones, 2 * ones, 0.05)) == pytest.approx(math.log(6), abs=1e-12)
    basis = torch.eye(6, dtype=torch.float64)
    assert float(simcse_loss(basis, basis, 0.05)) == pytest.approx(math.log(1 + 5 * math.exp(-20)), abs=1e-12)
    assert float(simcse_loss(*views(1, 4), 0.05)) == 0.0


def test_simcse_knows_neither_the_order_nor_the_length_of_rows_but_which_views_belong_together() -> None:
    first, second = views(9, 5)
    base, order = simcse_loss(first, second, 0.1), torch.randperm(9)
    torch.testing.assert_close(simcse_loss(first[order], second[order], 0.1), base, rtol=0, atol=1e-12)
    torch.testing.assert_close(simcse_loss(7 * first, second * torch.rand(9, 1).double(), 0.1), base, rtol=0, atol=1e-12)
    assert float(simcse_loss(first, second.roll(1, 0), 0.1)) > float(base) + 1


# Sinkhorn


@pytest.mark.parametrize(("n", "k"), [(32, 50), (16, 20), (40, 5), (1, 3)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_lightlys(lightly_swav: ModuleType, n: int, k: int, iterations: int) -> None:
    scores = torch.rand(n, k, dtype=torch.float64) * 2 - 1
    reference = lightly_swav.sinkhorn(scores.clone(), iterations=iterations, epsilon=0.05)
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), reference, rtol=1e-9, atol=1e-12)


def test_sinkhorn_gives_every_row_1_and_every_prototype_its_share_in_the_limit() -> None:
    scores = torch.rand(12, 8, dtype=torch.float64) * 2 - 1
    rows, shares = (sinkhorn(scores, 0.1, 3).sum(dim) for dim in (1, 0))
    torch.testing.assert_close(rows, torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((shares - 12 / 8).abs().max()) > 1e-3
    torch.testing.assert_close(sinkhorn(scores, 0.1, 1000).sum(0), torch.full((8,), 1.5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_sinkhorn_with_little_regularisation_is_optimal_transport() -> None:
    """The linear programme: largest sum of scores over plans whose rows sum to 1 and whose columns sum to N / K."""
    n, k = 6, 3
    scores = torch.rand(n, k, dtype=torch.float64)
    rows = np.kron(np.eye(n), np.ones(k))
    columns = np.kron(np.ones(n), np.eye(k))
    best = linprog(-scores.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=[1.0] * n + [n / k] * k)
    codes = sinkhorn(scores, 0.002, 5000)
    torch.testing.assert_close(codes, torch.from_numpy(best.x).view(n, k), rtol=0, atol=1e-3)


def test_sinkhorn_survives_what_overflows_and_has_no_gradient() -> None:
    scores = (torch.randn(5, 4) * 1000).requires_grad_()
    codes = sinkhorn(scores, 0.001, 3)
    assert bool(torch.isfinite(codes).all()) and not codes.requires_grad
    torch.testing.assert_close(codes.sum(1), torch.ones(5))


# SwAV


@pytest.mark.parametrize(("n", "k"), [(32, 50), (16, 20), (6, 4)])
def test_swav_is_the_sum_of_which_lightly_takes_the_mean(lightly_swav: ModuleType, n: int, k: int) -> None:
    first, second = views(n, 8)
    prototypes = torch.randn(k, 8, dtype=torch.float64)
    unit = functional.normalize(prototypes, dim=-1)
    scores = [functional.normalize(view, dim=-1) @ unit.T for view in (first, second)]
    reference = lightly_swav.SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)(scores, [])
    torch.testing.assert_close(swav_loss(first, second, prototypes, 0.1, 0.05, 3), 2 * reference[0], rtol=1e-9, atol=1e-9)


def test_swav_gradient_is_that_of_finite_differences_with_the_codes_held(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (view.requires_grad_() for view in views(4, 3))
    prototypes = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (first, second, prototypes)

    def loss(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return swav_loss(s, t, c, 0.3, 0.1, 3)

    free = torch.autograd.grad(loss(*inputs), inputs)
    codes = [sinkhorn(prototype_scores(view, prototypes), 0.1, 3) for view in (first, second)]
    queue: list[Tensor] = []

    def held(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
        queue[:] = queue or codes
        return queue.pop(0)

    monkeypatch.setattr(contrastive, "sinkhorn", held)
    assert torch.autograd.gradcheck(loss, inputs)
    for left, right in zip(free, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_swav_knows_neither_order_nor_length_nor_which_view_is_first() -> None:
    first, second = views(9, 5)
    prototypes, order = torch.randn(6, 5, dtype=torch.float64), torch.randperm(9)
    base = swav_loss(first, second, prototypes, 0.1, 0.05, 3)
    for other in (
        swav_loss(first[order], second[order], prototypes, 0.1, 0.05, 3),
        swav_loss(second, first, prototypes, 0.1, 0.05, 3),
        swav_loss(2 * first, second, 3 * prototypes[torch.randperm(6)], 0.1, 0.05, 3),
    ):
        torch.testing.assert_close(other, base, rtol=0, atol=1e-12)
    assert float(swav_loss(first, second.roll(1, 0), prototypes, 0.1, 0.05, 3)) > float(base) + 0.1


def test_swav_of_equal_prototypes_is_2_log_k_and_of_well_placed_ones_near_0() -> None:
    first, second = views(8, 5)
    equal = torch.ones(6, 5, dtype=torch.float64)
    assert float(swav_loss(first, second, equal, 0.1, 0.05, 3)) == pytest.approx(2 * math.log(6), abs=1e-9)
    basis = torch.eye(5, dtype=torch.float64)
    assert float(swav_loss(basis, basis, basis, 0.1, 0.05, 3)) < 1e-2


# Bad input


@pytest.mark.parametrize(("first", "second"), [((3, 4), (2, 4)), ((0, 4), (0, 4)), ((4,), (4,)), ((3, 4), (3, 5))])
def test_views_of_wrong_shape_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two views"):
        simcse_loss(torch.zeros(first), torch.zeros(second), 0.1)
    with pytest.raises(ValueError, match="two views"):
        swav_loss(torch.zeros(first), torch.zeros(second), torch.zeros(3, 4), 0.1, 0.1, 3)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_out_of_range_are_refused(value: float) -> None:
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match="temperature"):
        simcse_loss(rows, rows, value)
    with pytest.raises(ValueError, match="temperature"):
        swav_loss(rows, rows, rows, value, 0.05, 3)
    with pytest.raises(ValueError, match="temperature"):
        prototype_usage(rows, value)
    with pytest.raises(ValueError, match="epsilon"):
        swav_loss(rows, rows, rows, 0.1, value, 3)


def test_no_iterations_no_scores_and_prototypes_of_another_width_are_refused() -> None:
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match="at least 1 iteration"):
        sinkhorn(rows, 0.1, 0)
    with pytest.raises(ValueError, match="N, K >= 1"):
        sinkhorn(torch.zeros(0, 3), 0.1, 3)
    with pytest.raises(ValueError, match="N, K >= 1"):
        prototype_usage(torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="prototypes"):
        swav_loss(rows, rows, torch.randn(3, 5), 0.1, 0.05, 3)


# What is contrasted, and how much it takes


def test_pairs_give_both_responses_and_differences_one_sign() -> None:
    chosen, rejected = torch.randn(2, 3, 4)
    assert contrasted(chosen, rejected, "pairs").equal(torch.cat([chosen, rejected]))
    assert contrasted(chosen, rejected, "differences").equal(chosen - rejected)


def test_what_is_left_null_is_the_papers() -> None:
    def settings(**given: object) -> ContrastiveSettings:
        return ContrastiveSettings.of(ContrastiveConfig.model_validate(given))

    assert settings(method="simcse") == ContrastiveSettings(1.0, 0.05, 0)
    assert settings(method="simcse", on="differences") == ContrastiveSettings(1.0, 0.05, 0)
    assert settings(method="swav") == ContrastiveSettings(0.1, 0.1, 50)
    assert settings(method="swav", on="differences") == ContrastiveSettings(0.5, 0.1, 20)
    given = {"beta": 0.3, "temperature": 0.2, "num_prototypes": 7}
    assert settings(method="swav", on="differences", **given) == ContrastiveSettings(0.3, 0.2, 7)


@pytest.mark.parametrize(
    ("method", "on", "num_prototypes", "fewest"),
    [
        ("none", "pairs", None, 0),
        ("simcse", "pairs", None, 1),
        ("simcse", "differences", None, 2),
        ("swav", "pairs", None, 13),  # 26 rows for 50 prototypes
        ("swav", "differences", None, 11),
        ("swav", "differences", 9, 5),
        ("swav", "pairs", 2, 1),
        ("swav", "differences", 2, 2),
    ],
)
def test_fewest_pairs_of_a_batch(method: str, on: str, num_prototypes: int | None, fewest: int) -> None:
    config = ContrastiveConfig.model_validate({"method": method, "on": on, "num_prototypes": num_prototypes})
    check_contrastive(RewardConfig(contrastive=config, batch_size=fewest or 1), 100, 1)
    check_contrastive(RewardConfig(contrastive=config, batch_size=100), fewest, 1)
    if fewest:
        with pytest.raises(UserError, match=f"reward.batch_size to at least {fewest}"):
            check_contrastive(RewardConfig(contrastive=config, batch_size=100), fewest - 1, 1)
    if fewest > 1:
        with pytest.raises(UserError, match=f"reward.batch_size to at least {fewest}"):
            check_contrastive(RewardConfig(contrastive=config, batch_size=fewest - 1), 100, 1)


def test_too_few_rows_name_both_remedies_and_each_of_them_helps() -> None:
    said = r"8 pairs .* 16 rows for swav on pairs.*num_prototypes=50.* at least 13, .* at most 31\."
    config = ContrastiveConfig(method="swav")
    with pytest.raises(UserError, match=said):
        check_contrastive(RewardConfig(contrastive=config, batch_size=8), 100, 1)
    check_contrastive(RewardConfig(contrastive=config, batch_size=13), 100, 1)
    fewer = ContrastiveConfig(method="swav", num_prototypes=31)
    check_contrastive(RewardConfig(contrastive=fewer, batch_size=8), 100, 1)


def test_several_processes_and_two_rates_of_dropout_are_refused() -> None:
    simcse = ContrastiveConfig(method="simcse")
    with pytest.raises(UserError, match="2 processes"):
        check_contrastive(RewardConfig(contrastive=simcse), 100, 2)
    with pytest.raises(UserError, match=r"reward\.dropout is 0\.1, .*contrastive\.dropout=0\.05"):
        check_contrastive(RewardConfig(contrastive=simcse, dropout=0.1), 100, 1)
    check_contrastive(RewardConfig(dropout=0.1), 100, 2)


@pytest.mark.parametrize(("n", "k"), [(26, 50), (25, 50)])
def test_with_too_few_rows_no_code_can_lean_to_one_prototype(n: int, k: int) -> None:
    """What the rule rests on: perfectly told apart, a row gives its favourite N / K at most."""
    scores = torch.full((n, k), -1.0, dtype=torch.float64)
    scores[torch.arange(n), torch.arange(n)] = 1.0
    largest = float(sinkhorn(scores, 0.05, 2000).max())
    assert largest == pytest.approx(n / k, abs=2e-3)
    assert (largest > 0.5 + 1e-6) == (n >= rows_needed(ContrastiveConfig(method="swav", num_prototypes=k)))


# The term


def features(n: int, spread: float = 1.0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    base = torch.ones(2 * n, 16) + spread * torch.randn(2 * n, 16)
    first, second = (base + 0.1 * spread * torch.randn(2 * n, 16) for _ in range(2))
    return (first[:n], first[n:]), (second[:n], second[n:])


def term(method: str, on: str = "pairs", num_prototypes: int | None = None, seed: int = 3) -> ContrastiveTerm:
    config = ContrastiveConfig.model_validate({"method": method, "on": on, "num_prototypes": num_prototypes})
    return ContrastiveTerm(config, 16, seed, torch.device("cpu"))


def test_the_term_is_the_loss_on_its_rows_and_reports_it() -> None:
    first, second = features(16)
    simcse = term("simcse", "differences")
    expected = simcse_loss(first[0] - first[1], second[0] - second[1], 0.05)
    assert simcse(first, second).equal(expected)
    assert simcse.prototypes is None
    assert simcse.parts["reward/contrastive"] == float(expected)
    cosines = functional.cosine_similarity(first[0] - first[1], second[0] - second[1])
    assert simcse.parts["reward/view_cos"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    swav = term("swav")
    assert swav.prototypes is not None and swav.prototypes.shape == (50, 16) and swav.prototypes.requires_grad
    assert swav(first, second).equal(swav_loss(torch.cat(first), torch.cat(second), swav.prototypes, 0.1, 0.05, 3))
    assert set(swav.parts) == {
        "reward/contrastive", "reward/view_cos", "reward/prototypes_effective", "reward/prototypes_used"
    }  # fmt: skip


def test_prototypes_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (term("swav", seed=seed).prototypes for seed in (3, 3, 4))
    assert one is not None and again is not None and other is not None
    assert torch.get_rng_state().equal(before)
    assert one.equal(again) and not one.equal(other)
    torch.testing.assert_close(one.detach().norm(dim=-1), torch.ones(50))


def test_a_last_batch_too_small_says_nothing() -> None:
    swav = term("swav", "differences")
    swav(*features(16))
    assert swav.parts
    first, second = features(10)
    first[0].requires_grad_()
    loss = swav(first, second)
    assert float(loss.detach()) == 0 and swav.parts == {}
    loss.backward()
    assert first[0].grad is not None and not bool(first[0].grad.any())


# Collapse


def test_usage_counts_the_prototypes_that_rows_are_told_apart_by() -> None:
    apart = torch.eye(5, 8)[[0, 0, 1, 1, 2, 2]] * 2 - 1  # three prototypes, two rows each
    usage = prototype_usage(apart, 0.05)
    assert usage.effective == pytest.approx(3, abs=1e-9)
    assert usage.share == 3 / 8


@pytest.mark.parametrize("collapse", ["all rows at one", "features alike", "prototypes alike"])
def test_usage_of_every_kind_of_collapse_is_1(collapse: str) -> None:
    rows, prototypes = torch.randn(12, 6), torch.randn(5, 6)
    if collapse == "all rows at one":
        rows = prototypes[2] + 0.01 * rows
    elif collapse == "features alike":
        rows = torch.ones(12, 6) + 1e-4 * rows
    else:
        prototypes = torch.ones(5, 6) + 1e-4 * prototypes
    assert 1 <= prototype_usage(prototype_scores(rows, prototypes), 0.1).effective < 1.01
    healthy = prototype_usage(prototype_scores(torch.randn(12, 6), torch.randn(5, 6)), 0.1)
    assert healthy.effective > 2


def test_a_lasting_collapse_is_said_once_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    swav = term("swav", num_prototypes=10)
    alike, apart = features(16, spread=1e-3), features(16)
    with caplog.at_level(logging.WARNING):
        for _ in range(contrastive_term.COLLAPSE_STEPS - 1):
            swav(*alike)
        swav(*apart)  # it was passing
        for _ in range(contrastive_term.COLLAPSE_STEPS - 1):
            swav(*alike)
        assert not caplog.records
        for _ in range(20):
            swav(*alike)
    assert len(caplog.records) == 1
    assert "1.00 of 10 prototypes" in caplog.text and "reward.contrastive.num_prototypes" in caplog.text
    assert swav.parts["reward/prototypes_effective"] < contrastive_term.COLLAPSED


def test_training_the_term_spreads_rows_over_prototypes() -> None:
    swav = term("swav", num_prototypes=8)
    assert swav.prototypes is not None
    map_ = torch.nn.Linear(16, 16)
    first, second = features(16, spread=0.2)
    optimizer = torch.optim.Adam([swav.prototypes, *map_.parameters()], lr=1e-2)
    before = None
    for _ in range(100):
        loss = swav((map_(first[0]), map_(first[1])), (map_(second[0]), map_(second[1])))
        before = before or (float(loss.detach()), swav.parts["reward/prototypes_effective"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before is not None
    assert swav.parts["reward/contrastive"] < before[0] / 2
    assert swav.parts["reward/prototypes_effective"] > max(4, before[1])
