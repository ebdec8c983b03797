"""What the responses look like as texts: long or short, finished or cut, varied or all the same.

Letters: N responses.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextStats:
    """Numbers about N responses to N different prompts.

    Args:
        num: N.
        mean_tokens: mean length, tokens.
        finished: share that ended by itself, in [0, 1].
        distinct_2: distinct word pairs / all word pairs, in [0, 1].
        most_common_share: share of responses that are the single most frequent text, 1/N when all differ.
        most_common: that text; the first of equals.
    """

    num: int
    mean_tokens: float
    finished: float
    distinct_2: float
    most_common_share: float
    most_common: str


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of the n-grams of words, over all texts together, that are distinct.

    distinct_n = |set of n-grams| / |list of n-grams|; words are what blanks separate; no n-gram crosses two texts.
    It falls with the number of texts: compare equal numbers only.

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.2; divided here by the number of n-grams, not of words.

    Args:
        texts: N texts.
        n: words per n-gram, >= 1.

    Returns:
        In [0, 1]; 0 where no text has n words.

    Raises:
        ValueError: if there are no texts, or n < 1.

    Padding contract: texts carry no padding and no special tokens; a text of fewer than n words adds nothing.
    """
    if not texts:
        raise ValueError("distinct_n needs at least one text, got none")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def text_stats(texts: Sequence[str], num_tokens: Sequence[int], finished: Sequence[bool]) -> TextStats:
    """Length, share finished, variety, and whether the policy has collapsed onto one answer.

    most_common_share = (count of the most frequent text, outer blanks removed) / N

    Source: distinct-2 as in ``distinct_n``; the others are counts.

    Args:
        texts: N responses, special tokens left out.
        num_tokens: [N] int, tokens of each.
        finished: [N] bool, True = ended with EOS.

    Returns:
        The numbers.

    Raises:
        ValueError: if there are no responses, or the three differ in number.

    Padding contract: ``num_tokens`` counts real tokens only.
    """
    if not texts or not len(texts) == len(num_tokens) == len(finished):
        raise ValueError(
            f"need equally many texts, lengths and flags and at least one, got {len(texts)}, {len(num_tokens)}, {len(finished)}"
        )
    most_common, count = Counter(text.strip() for text in texts).most_common(1)[0]
    return TextStats(
        num=len(texts),
        mean_tokens=sum(num_tokens) / len(texts),
        finished=sum(finished) / len(texts),
        distinct_2=distinct_n(texts, 2),
        most_common_share=count / len(texts),
        most_common=most_common,
    )
