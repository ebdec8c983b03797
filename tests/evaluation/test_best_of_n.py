"""Best of n: the pick, and its distance by formula and by enumeration."""

import math
from collections import Counter
from itertools import product

import pytest

from evaluation.best_of_n import best_of_n_kl, pick_best, pick_softly, soft_best_of_n_kl, soft_weights


def test_the_best_of_each_prompt_is_picked_and_the_first_of_equals() -> None:
    assert pick_best([1.0, 3.0, 2.0, 5.0, 4.0, 5.0], 3) == (1, 3)
    assert pick_best([1.0, 2.0], 1) == (0, 1)
    with pytest.raises(ValueError, match="n = 4"):
        pick_best([1.0] * 6, 4)


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_kl_is_what_counting_gives_for_a_policy_of_many_answers(num: int) -> None:
    """Best of n from 24 equally likely answers, all n-tuples counted: below the bound, and near it for n small against 24."""
    answers = 24 if num < 4 else 12
    picked = Counter(max(draw) for draw in product(range(answers), repeat=num))
    total = answers**num
    exact = sum(count / total * math.log(count / total * answers) for count in picked.values())
    assert exact <= best_of_n_kl(num) + 1e-12
    assert best_of_n_kl(num) == pytest.approx(exact, abs=0.12)
    assert best_of_n_kl(1) == 0


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        best_of_n_kl(0)


def test_soft_best_of_n_goes_from_the_best_to_any() -> None:
    scores = [1.0, 3.0, 2.0, 5.0, 4.0, 5.5]
    assert soft_weights([0.0, math.log(3.0)], 1.0) == pytest.approx([0.25, 0.75])
    assert soft_weights([1e6, -1e6], 0.1) == [1.0, 0.0]  # nothing overflows
    assert pick_softly(scores, 3, 1e-3, 7) == pick_best(scores, 3)
    drawn = Counter(pick_softly(scores[:3], 3, 1.0, seed)[0] for seed in range(3000))
    for place, share in enumerate(soft_weights(scores[:3], 1.0)):
        assert drawn[place] / 3000 == pytest.approx(share, abs=0.03)
    assert pick_softly(scores, 3, 1.0, 7) == pick_softly(scores, 3, 1.0, 7)


def test_the_soft_bound_holds_by_enumeration_and_vanishes_for_a_large_lambda() -> None:
    """Ten equally likely answers whose score is their number, two samples: the exact KL lies below the mean of the bound."""
    picked, bounds = [0.0] * 10, []
    for draw in product(range(10), repeat=2):
        bounds.append(soft_best_of_n_kl([float(x) for x in draw], 2, 2.0))
        for answer, share in zip(draw, soft_weights([float(x) for x in draw], 2.0), strict=True):
            picked[answer] += share / 100
    exact = sum(share * math.log(share * 10) for share in picked)
    assert 0 < exact <= sum(bounds) / len(bounds) <= math.log(2)
    assert soft_best_of_n_kl([1.0, 2.0, 3.0, 4.0], 2, 1e9) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("softness", [0.0, -1.0, math.nan])
def test_no_softness_is_refused(softness: float) -> None:
    with pytest.raises(ValueError, match="softness above 0"):
        soft_weights([1.0], softness)
