"""What verdicts come to, by hand and against scikit-learn."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import cohen_kappa_score

from evaluation.judgements import (
    CHOICES,
    Choice,
    Verdict,
    agreement,
    bootstrap_mean,
    cohen_kappa,
    length_effect,
    order_effect,
    outcome,
)

A, B, TIE = Verdict("a", "a"), Verdict("b", "b"), Verdict("tie", "tie")
FIRST, SECOND = Verdict("a", "b"), Verdict("b", "a")
SILENT = Verdict(None, "a", why="no reply")


def person(choice: Choice, a_first: bool) -> Verdict:
    return Verdict(choice, None, 1) if a_first else Verdict(None, choice, 1)


@pytest.mark.parametrize(
    ("a_first", "b_first", "choice"),
    [
        ("a", "a", "a"), ("b", "b", "b"), ("tie", "tie", "tie"), ("a", "b", "tie"), ("b", "a", "tie"), ("a", "tie", "tie"),
        ("tie", "b", "tie"), ("a", None, None), (None, None, None),
    ],
)  # fmt: skip
def test_a_model_wins_in_both_orders_or_not_at_all(a_first: Choice | None, b_first: Choice | None, choice: Choice | None) -> None:
    assert Verdict(a_first, b_first).choice == choice


def test_a_person_is_asked_once() -> None:
    assert [person(choice, first).choice for choice, first in product(CHOICES, (True, False))] == ["a"] * 2 + ["tie"] * 2 + [
        "b"
    ] * 2
    with pytest.raises(ValueError, match="got 1 with 2 verdicts"):
        Verdict("a", "a", 1)


def test_what_has_no_verdict_is_no_data() -> None:
    found = outcome([A, A, TIE, FIRST, B, SILENT])
    assert found is not None and (found.num, found.win, found.tie, found.lose) == (5, 0.4, 0.4, 0.2)
    assert found == outcome([A, A, TIE, FIRST, B])
    assert outcome([SILENT]) is None and order_effect([SILENT]) is None and agreement([SILENT], [A]) is None


def test_whether_the_order_decides() -> None:
    found = order_effect([A, B, TIE, FIRST, FIRST, SECOND, SILENT])
    assert found is not None
    assert found.num == 6 and found.consistent == 0.5
    assert found.bias.value == pytest.approx((2 - 1) / 6)
    assert found.bias.low < 0 < found.bias.high
    half = order_effect([Verdict("a", "tie")])  # first preferred in one order, nothing in the other
    assert half is not None and half.bias.value == 0.5
    always = order_effect([FIRST] * 9)
    assert always is not None and (always.consistent, always.bias.value, always.bias.low) == (0, 1, 1)
    people = order_effect([person("a", True), person("b", False), person("b", True), person("tie", True)])
    assert people is not None and people.consistent is None and people.bias.value == 0.25


def test_agreement_is_cohen_s() -> None:
    rng = np.random.default_rng(1)
    kinds = {"a": A, "b": B, "tie": TIE}
    one = [CHOICES[i] for i in rng.integers(0, 3, 200)]
    other = [c if rng.random() < 0.6 else CHOICES[rng.integers(0, 3)] for c in one]
    found = agreement([*(kinds[c] for c in one), SILENT, A], [*(kinds[c] for c in other), A, SILENT])
    assert found is not None and found.kappa is not None
    assert found.num == 200
    assert found.same.value == pytest.approx(np.mean([x == y for x, y in zip(one, other, strict=True)]))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(one, other))
    assert found.opposed == pytest.approx(np.mean([{x, y} == {"a", "b"} for x, y in zip(one, other, strict=True)]))
    pairs = np.array([[CHOICES.index(x), CHOICES.index(y)] for x, y in zip(one, other, strict=True)])
    drawn = [cohen_kappa_score(*pairs[np.random.default_rng(i).integers(0, 200, 200)].T) for i in range(400)]
    assert (found.kappa.low, found.kappa.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_agreement_by_hand_and_where_chance_explains_it_all() -> None:
    found = agreement([A, A, B, B], [A, B, B, B])
    assert found is not None and found.kappa is not None
    assert (found.same.value, found.kappa.value, found.opposed) == (0.75, 0.5, 0.25)
    same = agreement([A, A], [A, A])
    assert same is not None and same.kappa is None and same.same.value == 1
    assert np.isnan(cohen_kappa(np.array([[[3.0, 0, 0], [0, 0, 0], [0, 0, 0]]]))[0])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        agreement([A, A], [A])


def test_whether_the_longer_one_wins() -> None:
    found = length_effect([A, A, B, TIE, A, SILENT], [(9, 3), (2, 3), (1, 8), (5, 1), (4, 4), (9, 1)])
    assert found.num == 3 and found.longer is not None and found.longer.value == pytest.approx(2 / 3)
    assert length_effect([TIE], [(1, 2)]).longer is None


def test_the_bootstrap_is_scipy_s() -> None:
    values = np.random.default_rng(3).choice([-1.0, -0.5, 0.0, 1.0], 150)
    found = bootstrap_mean(list(values))
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    with pytest.raises(ValueError, match="got none"):
        bootstrap_mean([])
