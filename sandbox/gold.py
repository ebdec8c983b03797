"""The gold reward: a program that knows what a good response is.

``gold = sum over attributes of weight * value``. Every value saturates, and there is a price for too much of a good
thing, so that a reward model that has learned "more kind words are better" can be over-optimised.
"""

from collections import Counter
from dataclasses import astuple, dataclass, fields
from functools import cache
from random import Random

from sandbox.lexicon import CLASS_OF, TOPIC_OF, TOPICS
from sandbox.texts import Style, respond, topic_of


@dataclass(frozen=True)
class Attributes:
    """What the gold reward measures in a response, or the weight of each.

    As measurements: ``sentiment`` lies in [-1, 1], every other in [0, 1].
    """

    relevance: float
    """Different nouns of the prompt's topic; full at two."""
    sentiment: float
    """Positive minus negative words; full at two."""
    politeness: float
    """One polite word is enough."""
    rudeness: float
    """Rude words; full at two."""
    specificity: float
    """Numbers; full at two."""
    hedging: float
    """Hedges; full at two."""
    off_topic: float
    """Nouns of other topics; full at three."""
    repetition: float
    """Share of word pairs that occurred before, and of words that repeat the word before them; full at one third."""
    ungrammatical: float
    """Share of neighbouring words whose classes never meet in a clean text; full at one half."""
    excess: float
    """Positive words over three, polite over one, numbers over two, topic nouns over four; full at six too many."""
    too_short: float
    """Zero from six words on, full at three (punctuation does not count)."""
    too_long: float
    """Zero up to eighteen words, full at thirty."""


BASE_WEIGHTS = Attributes(
    relevance=1.8,
    sentiment=1.0,
    politeness=1.2,
    rudeness=-1.4,
    specificity=1.2,
    hedging=-0.7,
    off_topic=-0.8,
    repetition=-1.5,
    ungrammatical=-2.0,
    excess=-4.0,
    too_short=-5.0,
    too_long=-1.0,
)
# People differ in these; that a text must be on topic, clean and long enough is common ground.
TASTES = ("sentiment", "politeness", "rudeness", "specificity", "hedging", "too_long")
ATTRIBUTE_NAMES: tuple[str, ...] = tuple(field.name for field in fields(Attributes))


@cache
def grammar() -> frozenset[tuple[str, str]]:
    """Every pair of word classes that meets in a clean text ("^" is the beginning, "$" the end)."""
    rng = Random("grammar")
    pairs: set[tuple[str, str]] = set()
    for index in range(4000):
        drawn = Style.draw(rng)
        middle = Style(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, sentences=drawn.sentences, short=drawn.short, noisy=False)
        pairs |= set(_class_pairs(respond(TOPICS[index % len(TOPICS)], middle, rng).split()))
    return frozenset(pairs)


def _class_pairs(words: list[str]) -> list[tuple[str, str]]:
    classes = ["^", *(CLASS_OF[word] if word in CLASS_OF else "unknown" for word in words), "$"]
    return list(zip(classes, classes[1:], strict=False))


def attributes(prompt: str, response: str) -> Attributes:
    """Measure a response.

    Args:
        prompt: a prompt of the world, as text; its domain and topic are read from it.
        response: any text; words are separated by blanks.

    Returns:
        The measurements, each saturated.

    Raises:
        UserError: if ``prompt`` is not a prompt of the world.
    """
    topic = topic_of(prompt)
    words = response.split()
    spoken = [word for word in words if word not in (".", ",")]
    count = Counter(CLASS_OF[word] if word in CLASS_OF else "unknown" for word in words)
    on_topic = [word for word in words if word in topic.nouns]
    off_topic = sum(word in TOPIC_OF for word in words) - len(on_topic)
    pairs = list(zip(words, words[1:], strict=False))
    repeats = len(pairs) - len(set(pairs)) + sum(first == second for first, second in pairs)
    class_pairs = _class_pairs(words)
    wrong = sum(pair not in grammar() for pair in class_pairs)
    excess = max(0, count["positive"] - 3) + max(0, count["polite"] - 1) + max(0, count["number"] - 2) + max(0, len(on_topic) - 4)
    return Attributes(
        relevance=min(1.0, len(set(on_topic)) / 2),
        sentiment=max(-1.0, min(1.0, (count["positive"] - count["negative"]) / 2)),
        politeness=min(1.0, count["polite"]),
        rudeness=min(1.0, count["rude"] / 2),
        specificity=min(1.0, count["number"] / 2),
        hedging=min(1.0, count["hedge"] / 2),
        off_topic=min(1.0, off_topic / 3),
        repetition=min(1.0, 3 * repeats / max(1, len(pairs))),
        ungrammatical=min(1.0, 2 * wrong / len(class_pairs)),
        excess=min(1.0, excess / 6),
        too_short=min(1.0, max(0.0, (6 - len(spoken)) / 3)),
        too_long=min(1.0, max(0.0, (len(spoken) - 18) / 12)),
    )


def gold(prompt: str, response: str, weights: Attributes) -> float:
    """The weighted sum of a response's attributes, in the weights' own unit."""
    return weigh(attributes(prompt, response), weights)


def weigh(measured: Attributes, weights: Attributes) -> float:
    """The weighted sum of attributes, in the weights' own unit."""
    return sum(weight * value for weight, value in zip(astuple(weights), astuple(measured), strict=True))
