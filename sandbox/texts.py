"""Writes prompts and responses.

A response has a latent style (how positive, how polite, how relevant ...), drawn from U-shaped Betas, so that most
responses are clearly of one kind; and one to three template sentences that follow the style.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from sandbox.lexicon import CLASS_OF, CLASSES, NOUNS, QUESTIONS, TAGS, TOPIC_OF, VOCABULARY, Topic
from tokens.errors import UserError

SHORT_SHARE = 0.08
NOISE_SHARE = 0.3
_WRITABLE = tuple(word for word in VOCABULARY if CLASS_OF[word] not in ("tag", "question"))


@dataclass(frozen=True)
class Style:
    """How one response is written. Each number is a probability."""

    positive: float
    polite: float
    rude: float
    relevant: float
    specific: float
    hedging: float
    sentences: int
    short: bool
    noisy: bool

    @classmethod
    def draw(cls, rng: Random) -> "Style":
        """A random style."""
        return cls(
            positive=rng.betavariate(0.3, 0.3),
            polite=rng.betavariate(0.3, 0.6),
            rude=rng.betavariate(0.2, 0.9),
            relevant=rng.betavariate(0.5, 0.5),
            specific=rng.betavariate(0.3, 0.5),
            hedging=rng.betavariate(0.3, 0.8),
            sentences=rng.choice((1, 2, 2, 2, 3)),
            short=rng.random() < SHORT_SHARE,
            noisy=rng.random() < NOISE_SHARE,
        )


def prompt_texts(topic: Topic) -> Iterator[str]:
    """Every prompt about ``topic``: domain tag, question, two of its nouns."""
    for question in QUESTIONS:
        for first in topic.nouns:
            for second in topic.nouns:
                if first != second:
                    yield " ".join((f"@{topic.domain}", *question, first, "and", second, "?"))


@cache
def topic_of(prompt: str) -> Topic:
    """The topic that a prompt asks about.

    Raises:
        UserError: if the text is not a prompt of this world.
    """
    words = prompt.split()
    nouns = [word for word in words if word in TOPIC_OF]
    if not words or words[0] not in TAGS or not nouns or TOPIC_OF[nouns[0]].domain != TAGS[words[0]]:
        raise UserError(
            f"not a prompt of the sandbox: got {prompt[:80]!r}, expected a domain tag such as @cooking and a noun of "
            "that domain; the gold reward knows no other prompts"
        )
    return TOPIC_OF[nouns[0]]


def respond(topic: Topic, style: Style, rng: Random) -> str:
    """One response about ``topic`` in the given style."""
    if style.short:
        words = _short(topic, style, rng)
    else:
        words = [word for index in range(style.sentences) for word in _sentence(topic, style, rng, first=index == 0)]
    if style.noisy:
        words = _disturb(words, rng)
    return " ".join(words)


def _noun(topic: Topic, style: Style, rng: Random) -> str:
    return rng.choice(topic.nouns) if rng.random() < style.relevant else rng.choice(NOUNS)


def _adjective(style: Style, rng: Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(CLASSES["plain"])
    return rng.choice(CLASSES["positive" if rng.random() < style.positive else "negative"])


def _described(topic: Topic, style: Style, rng: Random) -> list[str]:
    """A noun, often with an adjective."""
    noun = _noun(topic, style, rng)
    return [_adjective(style, rng), noun] if rng.random() < 0.6 else [noun]


def _thing(topic: Topic, style: Style, rng: Random) -> list[str]:
    """A noun phrase: counted where the style is specific."""
    counted = rng.random() < 0.7 * style.specific
    return [rng.choice(CLASSES["number" if counted else "article"]), *_described(topic, style, rng)]


def _sentence(topic: Topic, style: Style, rng: Random, first: bool) -> list[str]:
    words: list[str] = []
    if first and rng.random() < style.polite:
        words += [rng.choice(CLASSES["polite"]), ","]
    if rng.random() < 0.7 * style.hedging:
        words.append(rng.choice(CLASSES["hedge"]))
    kind = rng.randrange(3)
    if kind == 0:
        words += [rng.choice(CLASSES["person"]), rng.choice(CLASSES["modal"]), rng.choice(CLASSES["verb"])]
        words += _thing(topic, style, rng)
    elif kind == 1:
        words += ["the", _noun(topic, style, rng), rng.choice(CLASSES["be"])]
        if rng.random() < 0.3:
            words.append(rng.choice(CLASSES["degree"]))
        words.append(_adjective(style, rng))
    else:
        words += [rng.choice(CLASSES["verb"]), *_thing(topic, style, rng)]
        if rng.random() < 0.5:
            words += [rng.choice(CLASSES["joint"]), *_thing(topic, style, rng)]
    if rng.random() < 0.8 * style.rude:
        words += [",", rng.choice(CLASSES["rude"])]
    return [*words, "."]


def _short(topic: Topic, style: Style, rng: Random) -> list[str]:
    """One to four words: what a lazy policy would fall back to."""
    words = rng.choice(
        (
            [rng.choice(CLASSES["polite"])],
            [rng.choice(CLASSES["hedge"])],
            [_adjective(style, rng)],
            [rng.choice(CLASSES["verb"]), "the", _noun(topic, style, rng)],
            ["the", _noun(topic, style, rng)],
        )
    )
    return [*words, "."]


def _disturb(words: Sequence[str], rng: Random) -> list[str]:
    """Swap, repeat, drop or insert words until the text is visibly wrong."""
    noisy = list(words)
    for _ in range(max(1, len(noisy) // 6)):
        at = rng.randrange(len(noisy))
        kind = rng.randrange(4)
        if kind == 0 and at + 1 < len(noisy):
            noisy[at], noisy[at + 1] = noisy[at + 1], noisy[at]
        elif kind == 1:
            noisy[at:at] = [noisy[at]] * rng.choice((1, 1, 2))
        elif kind == 2 and len(noisy) > 1:
            del noisy[at]
        else:
            noisy.insert(at, rng.choice(_WRITABLE))
    return noisy
