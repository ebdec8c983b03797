"""Best of n: the pick, and its distance by formula and by enumeration."""

import math
from collections import Counter
from itertools import product

import pytest

from evaluation.best_of_n import best_of_n_kl, pick_best


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
