"""The world: prompts, a corpus, and the gold reward, all from one seed."""

import math
from dataclasses import dataclass, fields
from random import Random
from typing import Literal

from sandbox.config import WorldConfig
from sandbox.gold import ATTRIBUTE_NAMES, BASE_WEIGHTS, TASTES, Attributes, attributes, gold, weigh
from sandbox.lexicon import DOMAINS, TOPICS, VOCABULARY
from sandbox.texts import Style, prompt_texts, respond, topic_of
from tokens.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DOMAIN_SPREAD = 0.25
"""Standard deviation of the log of a weight over domains, and over users."""
REFERENCE_TEXTS = 2000
"""Texts over which the gold reward's mean and unit are measured."""


@dataclass(frozen=True)
class WorldPrompt:
    """A prompt of the world. ``topic`` is the place of its topic in ``sandbox.lexicon.TOPICS``."""

    id: str
    text: str
    domain: str
    topic: int


@dataclass(frozen=True)
class Judge:
    """What a text's attributes are worth to somebody in one domain.

    Args:
        weights: of the attributes.
        mean: of the weighted sum over the reference texts.
        unit: its standard deviation there.
    """

    weights: Attributes
    mean: float
    unit: float


class World:
    """Everything that is known about a world before any model is trained.

    Args:
        config: the recipe; equal recipes make equal worlds.

    Raises:
        UserError: if more prompts are asked for than there are.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.domains: tuple[str, ...] = tuple(DOMAINS)
        self.train_domains: tuple[str, ...] = self.domains[: len(DOMAINS) - config.held_out_domains]
        self.held_out_domains: tuple[str, ...] = self.domains[len(DOMAINS) - config.held_out_domains :]
        self.vocabulary: list[str] = list(VOCABULARY)
        self.users: tuple[str, ...] = tuple(f"user-{index:03d}" for index in range(config.num_users))
        self._prompts = self._split_prompts()
        texts = self._write(REFERENCE_TEXTS, "reference")
        self._reference = [(topic_of(prompt).domain, attributes(prompt, response)) for prompt, response in texts]
        self._domain_scale = {domain: self._scale(f"domain {domain}") for domain in self.domains}
        self._judges: dict[str | None, dict[str, Judge]] = {None: self._make_judges(BASE_WEIGHTS)}

    def prompts(self, split: Split) -> list[WorldPrompt]:
        """The prompts of a split; no text stands in two splits."""
        return list(self._prompts[split])

    def corpus(self) -> list[tuple[str, str]]:
        """(prompt, response) texts to pre-train on, over the training prompts of all domains."""
        return self._write(self.config.num_texts, "corpus")

    def attributes(self, prompt: str, response: str) -> Attributes:
        """What the gold reward measures in ``response``."""
        return attributes(prompt, response)

    def gold(self, prompt: str, response: str, *, user: str | None = None) -> float:
        """The true reward, in standard deviations over the corpus: its texts have mean 0 and standard deviation 1.

        Args:
            prompt: a prompt's text; the domain, whose weights count, is read from it.
            response: any text.
            user: one of ``users``, who judges by a taste of their own; None = the common taste.

        Raises:
            UserError: if the prompt is not of this world, or the user is unknown.
        """
        judge = self.judge(topic_of(prompt).domain, user)
        return (gold(prompt, response, judge.weights) - judge.mean) / judge.unit

    def judge(self, domain: str, user: str | None) -> Judge:
        """What ``gold`` computes with: (<weights, attributes> - mean) / unit.

        Args:
            domain: one of ``domains``.
            user: one of ``users``; None = the common taste.

        Raises:
            UserError: if the user is unknown.
        """
        if user not in self._judges:
            self._judges[user] = self._make_judges(self.user_weights(user))
        return self._judges[user][domain]

    def user_weights(self, user: str | None) -> Attributes:
        """A user's weights before the domain has its say.

        In each matter of taste a user agrees with the common sign with probability ``user_agreement``; sizes are lognormal.

        Raises:
            UserError: if the user is unknown.
        """
        if user not in self.users:
            raise UserError(f"no such user: got {user!r}, expected one of {self.users[0]} ... {self.users[-1]}")
        rng = self._rng(f"taste of {user}")
        signs = {name: 1.0 if rng.random() < self.config.user_agreement else -1.0 for name in TASTES}
        scale = self._scale(f"size {user}")
        return Attributes(
            **{
                name: weight * value * (signs[name] if name in signs else 1.0)
                for name, weight, value in _zip(BASE_WEIGHTS, scale)
            }
        )

    def _rng(self, stream: str) -> Random:
        """A generator of its own for each purpose, so that changing one leaves the others alone."""
        return Random(f"{self.config.seed} {stream}")

    def _scale(self, stream: str) -> Attributes:
        rng = self._rng(stream)
        return Attributes(**{name: math.exp(rng.gauss(0.0, DOMAIN_SPREAD)) for name in ATTRIBUTE_NAMES})

    def _make_judges(self, weights: Attributes) -> dict[str, Judge]:
        """One judge per domain; all share a mean and a unit, so that domains are comparable."""
        per_domain = {
            domain: Attributes(**{name: weight * value for name, weight, value in _zip(weights, scale)})
            for domain, scale in self._domain_scale.items()
        }
        values = [weigh(measured, per_domain[domain]) for domain, measured in self._reference]
        mean = math.fsum(values) / len(values)
        unit = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return {domain: Judge(weights, mean, unit) for domain, weights in per_domain.items()}

    def _split_prompts(self) -> dict[Split, tuple[WorldPrompt, ...]]:
        sizes = (self.config.num_prompts, self.config.num_eval_prompts, self.config.num_eval_prompts)
        by_topic = [list(prompt_texts(topic)) for topic in TOPICS]
        for index, texts in enumerate(by_topic):
            self._rng(f"prompts {index}").shuffle(texts)
        room = sum(map(len, by_topic))
        if sum(sizes) > room:
            raise UserError(
                f"world.num_prompts + 2 * world.num_eval_prompts must be at most {room} (the world has no more), got {sum(sizes)}"
            )
        dealt = [(index % len(TOPICS), by_topic[index % len(TOPICS)][index // len(TOPICS)]) for index in range(sum(sizes))]
        splits: dict[Split, tuple[WorldPrompt, ...]] = {}
        for split, size in zip(SPLITS, sizes, strict=True):
            start = sum(map(len, splits.values()))
            splits[split] = tuple(
                WorldPrompt(f"{split}-{number:05d}", text, TOPICS[topic].domain, topic)
                for number, (topic, text) in enumerate(dealt[start : start + size])
            )
        return splits

    def _write(self, number: int, stream: str) -> list[tuple[str, str]]:
        rng = self._rng(stream)
        texts = []
        for _ in range(number):
            prompt = rng.choice(self._prompts["train"])
            texts.append((prompt.text, respond(TOPICS[prompt.topic], Style.draw(rng), rng)))
        return texts


def _zip(first: Attributes, second: Attributes) -> list[tuple[str, float, float]]:
    values = vars(first), vars(second)
    return [(field.name, values[0][field.name], values[1][field.name]) for field in fields(Attributes)]
