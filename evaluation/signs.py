"""Signs that a policy pleases its reward model by other means than better answers: length, repetition, sameness, cuts.

Letters: N responses, n words of an n-gram.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.text import distinct_n

REPEATED = 3
"""Words of the n-grams by whose repetition a response is measured."""
BLEU_ORDERS = (1, 2, 3, 4)
SMOOTHING = 0.1
"""Counted for an n-gram order that has no match."""


@dataclass(frozen=True)
class Signs:
    """Of N responses to N prompts.

    Args:
        repetition: mean over the responses of the share of their word trigrams that stand in them before, in [0, 1].
        self_bleu: mean over the responses of their BLEU with all others as references, in [0, 1]; 1 = all say the same. None for
            a single one.
        truncated: share that was cut by the token limit, in [0, 1].
        length_correlation: Pearson's r of length in tokens and reward, in [-1, 1]; None where one of the two never varies.
        repetition_correlation: likewise of repetition and reward.
    """

    repetition: float
    self_bleu: float | None
    truncated: float
    length_correlation: float | None
    repetition_correlation: float | None


def signs_of(texts: Sequence[str], num_tokens: Sequence[int], finished: Sequence[bool], rewards: Sequence[float]) -> Signs:
    """What to watch in N responses and the reward that they got.

    Source: the measures are those of ``repetition``, ``self_bleu`` and ``correlation``; length and repetition as ways to a reward
    without a better answer: Singhal et al. 2023 (arXiv:2310.03716).

    Args:
        texts: N responses, special tokens left out.
        num_tokens: [N] int, tokens of each.
        finished: [N] bool, True = ended with EOS.
        rewards: [N] float, what they were paid.

    Returns:
        The signs.

    Raises:
        ValueError: if there are no responses, or the four differ in number.

    Padding contract: ``num_tokens`` counts real tokens only.
    """
    if not texts or not len(texts) == len(num_tokens) == len(finished) == len(rewards):
        raise ValueError(
            "need equally many texts, lengths, flags and rewards and at least one, got "
            f"{len(texts)}, {len(num_tokens)}, {len(finished)}, {len(rewards)}"
        )
    repeated = [repetition(text) for text in texts]
    return Signs(
        repetition=sum(repeated) / len(repeated),
        self_bleu=self_bleu(texts),
        truncated=1 - sum(finished) / len(finished),
        length_correlation=correlation([float(number) for number in num_tokens], rewards),
        repetition_correlation=correlation(repeated, rewards),
    )


def repetition(text: str) -> float:
    """Share of a text's word trigrams that stand earlier in it.

    rep = 1 - |set of trigrams| / |list of trigrams|

    Source: Welleck et al. 2020 (arXiv:1908.04319), seq-rep-n; here n = 3, since responses may be short.

    Args:
        text: one response; words are what blanks separate.

    Returns:
        In [0, 1]; 0 for fewer than three words.

    Padding contract: a text carries no padding.
    """
    return 1 - distinct_n([text], REPEATED) if len(text.split()) >= REPEATED else 0.0


def self_bleu(texts: Sequence[str]) -> float | None:
    """How much responses to different prompts say the same.

        mean_i BLEU(text_i; references = all others);  BLEU = min(1, exp(1 - r / c)) exp(mean_n log p_n)

    with p_n the share of the n-grams of text i that the references have too, each counted at most as often as in one of them; c
    the words of text i, r those of the reference nearest in length. Orders that a text is too short for are left out.

    Source: Zhu et al. 2018 (arXiv:1802.01886), self-BLEU; Papineni et al. 2002, BLEU; an order without a match counts as 0.1 of
    one (Chen and Cherry 2014, smoothing 1).

    Args:
        texts: N texts; words are what blanks separate.

    Returns:
        In [0, 1]; None for fewer than two texts with a word in them.

    Padding contract: texts carry no padding; texts without a word are left out.
    """
    words = [text.split() for text in texts if text.split()]
    if len(words) < 2:
        return None
    grams = {n: [Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in words] for n in BLEU_ORDERS}
    tops = {n: _two_highest(counters) for n, counters in grams.items()}
    lengths = sorted(map(len, words))
    return float(np.mean([_bleu(i, w, grams, tops, lengths) for i, w in enumerate(words)]))


Gram = tuple[str, ...]
Tops = dict[Gram, tuple[int, int, int]]
"""Of each n-gram: its highest count in one text, which text that is, and the highest count in any other."""


def _two_highest(counters: "Sequence[Counter[Gram]]") -> Tops:
    tops: Tops = {}
    for index, counter in enumerate(counters):
        for gram, count in counter.items():
            first, holder, second = tops[gram] if gram in tops else (0, -1, 0)
            tops[gram] = (count, index, first) if count > first else (first, holder, max(second, count))
    return tops


def _bleu(
    index: int, words: Sequence[str], grams: "dict[int, list[Counter[Gram]]]", tops: dict[int, Tops], lengths: Sequence[int]
) -> float:
    """BLEU of one text with all others as references."""
    logs = []
    for n in BLEU_ORDERS:
        own = grams[n][index]
        if not own:
            continue
        matched = 0
        for gram, count in own.items():
            first, holder, second = tops[n][gram]
            matched += min(count, second if holder == index else first)
        logs.append(math.log((matched or SMOOTHING) / sum(own.values())))
    others = list(lengths)
    others.remove(len(words))
    nearest = min(others, key=lambda length: (abs(length - len(words)), length))
    return min(1.0, math.exp(1 - nearest / len(words))) * math.exp(sum(logs) / len(logs))


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation.

    r = cov(x, y) / (std x std y)

    Source: none needed.

    Args:
        one: [N] float.
        other: [N] float.

    Returns:
        In [-1, 1]; None where one of the two never varies.

    Raises:
        ValueError: if they differ in number.

    Padding contract: there is none.
    """
    if len(one) != len(other):
        raise ValueError(f"a correlation needs pairs, got {len(one)} and {len(other)} numbers")
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def ranked_right(rewards: Sequence[tuple[float, float]], golds: Sequence[tuple[float, float]]) -> float | None:
    """Share of pairs of responses that a reward model ranks as the truth does.

    Source: none needed; a reward model's accuracy, on samples of the policy of today in place of those that it learnt from.

    Args:
        rewards: [N] of both responses of a pair.
        golds: [N] of the truth, in the same order.

    Returns:
        In [0, 1], equal rewards counting one half; None where the truth tells no pair apart.

    Raises:
        ValueError: if they differ in number.

    Padding contract: pairs that are equal by the truth change nothing.
    """
    told = [(a - b, x - y) for (a, b), (x, y) in zip(rewards, golds, strict=True) if x != y]
    if not told:
        return None
    return sum(0.5 if ours == 0 else float((ours > 0) == (truth > 0)) for ours, truth in told) / len(told)
