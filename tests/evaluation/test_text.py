import pytest

from evaluation.text import distinct_n, text_stats


def test_distinct_by_hand() -> None:
    texts = ["a b a b", "b a"]  # pairs: ab ba ab | ba -> 2 distinct of 4
    assert distinct_n(texts, 2) == 0.5
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(["a", ""], 2) == 0.0


def test_a_pair_does_not_cross_two_texts() -> None:
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert distinct_n(["x a", "b", "a b"], 2) == 1.0  # "a b" is there once; across texts it would be there twice


def test_collapse_is_seen() -> None:
    stats = text_stats(["thanks .", "thanks . ", "the kettle boils at noon", "thanks ."], [3, 3, 6, 3], [True, True, False, True])
    assert (stats.num, stats.mean_tokens, stats.finished) == (4, 3.75, 0.75)
    assert (stats.most_common, stats.most_common_share) == ("thanks .", 0.75)
    assert stats.distinct_2 == pytest.approx(5 / 7)


@pytest.mark.parametrize(("texts", "lengths", "flags"), [([], [], []), (["a"], [1, 2], [True]), (["a"], [1], [])])
def test_bad_input(texts: list[str], lengths: list[int], flags: list[bool]) -> None:
    with pytest.raises(ValueError, match="equally many"):
        text_stats(texts, lengths, flags)


def test_bad_n() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)
    with pytest.raises(ValueError, match="at least one text"):
        distinct_n([], 2)
