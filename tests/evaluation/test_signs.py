"""Length, repetition, sameness and cuts, and whether the reward goes by them."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.signs import correlation, ranked_right, repetition, self_bleu, signs_of

TEXTS = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join), min_size=2, max_size=6)


def bleu_by_hand(text: list[str], others: list[list[str]]) -> float:
    """Papineni's BLEU, written down without a thought for speed."""
    logs = []
    for n in (1, 2, 3, 4):
        own = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        if not own:
            continue
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
        logs.append(math.log(((own & most).total() or 0.1) / own.total()))
    nearest = min(map(len, others), key=lambda length: (abs(length - len(text)), length))
    return min(1.0, math.exp(1 - nearest / len(text))) * math.exp(sum(logs) / len(logs))


@given(TEXTS)
def test_self_bleu_is_that_of_each_text_against_all_others(texts: list[str]) -> None:
    words = [text.split() for text in texts]
    expected = np.mean([bleu_by_hand(w, words[:i] + words[i + 1 :]) for i, w in enumerate(words)])
    assert self_bleu(texts) == pytest.approx(float(expected), abs=1e-12)


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    # 2 of 3 words and 1 of 2 pairs are in the other text, no triple is: 0.1 of 1
    assert self_bleu(["a b c", "a b d"]) == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    assert self_bleu(["a b"]) is None and self_bleu(["a", " "]) is None


def test_repetition_by_hand() -> None:
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("a b") == 0.0 and repetition("") == 0.0 and repetition("a a a a") == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=20))
def test_correlation_is_numpys(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert correlation(x, y) is None
    else:
        assert correlation(x, y) == pytest.approx(float(np.corrcoef(x, y)[0, 1]), abs=1e-9)


def test_ranked_right_by_hand() -> None:
    rewards = [(1.0, 0.0), (1.0, 0.0), (0.5, 0.5), (2.0, 1.0)]
    golds = [(3.0, 2.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]  # right, wrong, a tie of the rewards, one of the truth
    assert ranked_right(rewards, golds) == pytest.approx(1.5 / 3)
    assert ranked_right([(1.0, 0.0)], [(2.0, 2.0)]) is None and ranked_right([], []) is None


def test_the_signs_together() -> None:
    signs = signs_of(["a b c", "a b c a b c", "x"], [4, 7, 2], [True, False, True], [1.0, 2.0, 0.0])
    assert signs.truncated == pytest.approx(1 / 3) and signs.repetition == pytest.approx((1 / 4) / 3)
    assert signs.length_correlation == pytest.approx(float(np.corrcoef([4, 7, 2], [1, 2, 0])[0, 1]))
    assert signs.repetition_correlation == pytest.approx(float(np.corrcoef([0, 0.25, 0], [1, 2, 0])[0, 1]))


@pytest.mark.parametrize(("texts", "rewards"), [([], []), (["a"], [1.0, 2.0])])
def test_bad_input(texts: list[str], rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="equally many"):
        signs_of(texts, [1] * len(texts), [True] * len(texts), rewards)
    with pytest.raises(ValueError, match="needs pairs, got 1 and 2"):
        correlation([1.0], [1.0, 2.0])
