"""People of the sandbox who disagree, and the texts that they judge: what ``benchmarks.experiments.people`` is measured on.

Letters: T texts, U users, N pairs, K responses to a prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import expit

from benchmarks.experiments.common import Lab
from cluster.seeds import derive
from rm.batches import Encoded
from sandbox.candidates import sample_responses
from sandbox.world import Split, World
from tokens.durable import write_file
from tokens.records import Pair

BLOCK = 280
"""Users of a seed: raters and held-out people. Seed s has users s * BLOCK and on, so that no two seeds share anybody."""
POOL = 8 * BLOCK
LOW, HIGH = 0.5, 0.9
"""Agreement with the common taste: most disagreement, and hardly any."""
PICKED_AFTER = 30
"""Answers after which a person's own best of n is taken."""
TRAIN_PROMPTS, TRAIN_RESPONSES = 800, 4
TEST_PROMPTS, TEST_RESPONSES = 96, 16
CHOICE_PROMPTS, CHOICE_RESPONSES = 96, 4
"""Of the validation prompts, on which learning rates and penalties are chosen."""
MAX_TOKENS = 32
ANSWERS = (0, 3, 10, 30, 50)
"""How many answers a new person has given."""
MANY = 600
"""Pairs, labelled without error, that the oracle's weights are fitted to."""


@dataclass(frozen=True)
class Texts:
    """Responses of the SFT policy, K in a row to each prompt; training prompts come first.

    Args:
        prompts: [T] of each text.
        responses: [T].
        domains: [T].
        start: of the first text of each split, and how many responses its prompts have.
        encoded: [T] ids.
        attributes: [T, 12] as the sandbox measures them.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    domains: np.ndarray
    start: Mapping[Split, tuple[int, int, int]]
    encoded: tuple[Encoded, ...]
    attributes: np.ndarray

    def pairs(self, split: Split, number: int, rng: random.Random) -> np.ndarray:
        """[N, 2] int, two different texts to one prompt, in random order."""
        first, last, responses = self.start[split]
        num_prompts = (last - first) // responses
        rows: list[tuple[int, int]] = []
        while len(rows) < number:
            prompt = first + rng.randrange(num_prompts) * responses
            one, other = (prompt + i for i in rng.sample(range(responses), 2))
            if self.responses[one] != self.responses[other]:
                rows.append((one, other))
        return np.array(rows)

    def split(self, split: Split) -> np.ndarray:
        """[P, K] int, the texts of each prompt of a split."""
        first, last, responses = self.start[split]
        return np.arange(first, last).reshape(-1, responses)

    def pair(self, chosen: int, rejected: int, name: str) -> Pair:
        """A pair as a reward model sees it."""
        prompt, response = self.encoded[chosen]
        return Pair(name, prompt, response, self.encoded[rejected][1], str(self.domains[chosen]))


def draw_texts(lab: Lab) -> Texts:
    """The texts of the lab's SFT policy, sampled once and kept beside its world."""
    from preferences.encode import encode_prompt, encode_response

    sizes: dict[Split, tuple[int, int]] = {
        "train": (TRAIN_PROMPTS, TRAIN_RESPONSES),
        "validation": (CHOICE_PROMPTS, CHOICE_RESPONSES),
        "test": (TEST_PROMPTS, TEST_RESPONSES),
    }
    prompts: list[str] = []
    domains: list[str] = []
    start: dict[Split, tuple[int, int, int]] = {}
    for split, (number, responses) in sizes.items():
        rows = [row for row in lab.world.prompts(split) if row.domain in lab.world.train_domains][:number]
        start[split] = (len(prompts), len(prompts) + len(rows) * responses, responses)
        prompts += [row.text for row in rows for _ in range(responses)]
        domains += [row.domain for row in rows for _ in range(responses)]
    path = lab.cache / "people-texts.json"
    if not path.is_file():
        seed = derive(lab.config.seed, "people")
        texts = sample_responses(lab.files.sft_dir, prompts, 1.0, MAX_TOKENS, seed, lambda done, total: None)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(texts))
    responses = json.loads(path.read_text())
    if len(responses) != len(prompts):
        raise ValueError(f"{path} has {len(responses)} texts, expected {len(prompts)}: remove it")
    encoded = tuple(
        (encode_prompt(lab.tokenizer, p), encode_response(lab.tokenizer, r)) for p, r in zip(prompts, responses, strict=True)
    )
    attributes = np.array([astuple(lab.world.attributes(p, r)) for p, r in zip(prompts, responses, strict=True)])
    return Texts(tuple(prompts), tuple(responses), np.array(domains), start, encoded, attributes)


@dataclass(frozen=True)
class People:
    """The people of one seed, and the truth about what each likes.

    Args:
        texts: that they judge.
        names: [U] the training raters, then those held out.
        num_raters: of the former.
        gold: [U, T] each one's gold reward of each text, in standard deviations of the corpus.
        common: [T] the common taste's.
        beta: of the labels, as the sandbox's annotator.
        seed: of all draws.
    """

    texts: Texts
    names: tuple[str, ...]
    num_raters: int
    gold: np.ndarray
    common: np.ndarray
    beta: float
    seed: int

    @property
    def held_out(self) -> range:
        """Indices of the people whom no training label is of."""
        return range(self.num_raters, len(self.names))

    def labelled(self, user: int, pairs: np.ndarray, clean: bool = False) -> np.ndarray:
        """[N, 2] int, pairs as a user orders them: the preferred text first.

        Args:
            user: index.
            pairs: [N, 2].
            clean: by the gold reward, without pairs that are all one to the user; else a Bradley-Terry answer, which may err.
        """
        gap = self.gold[user, pairs[:, 0]] - self.gold[user, pairs[:, 1]]
        if clean:
            pairs, gap = pairs[gap != 0], gap[gap != 0]
            turned = gap < 0
        else:
            rng = np.random.default_rng(derive(self.seed, "errors", self.names[user], len(pairs)))
            turned = rng.random(len(pairs)) >= expit(self.beta * gap)
        return np.where(turned[:, None], pairs[:, ::-1], pairs)

    def training(self, labels: int) -> tuple[list[Pair], list[str], np.ndarray]:
        """Every rater's labels of pairs of their own.

        Args:
            labels: of each rater.

        Returns:
            N pairs, the rater of each, and [N, 2] indices of the texts.
        """
        rows, raters = [], []
        for user in range(self.num_raters):
            drawn = self.texts.pairs("train", labels, random.Random(derive(self.seed, "pairs", self.names[user])))
            rows.append(self.labelled(user, drawn))
            raters += [self.names[user]] * labels
        found = np.concatenate(rows)
        return [self.texts.pair(int(a), int(b), str(i)) for i, (a, b) in enumerate(found)], raters, found

    def answers(self, user: int) -> np.ndarray:
        """[50, 2] what a held-out user answers, about training prompts."""
        return self.labelled(
            user, self.texts.pairs("train", max(ANSWERS), random.Random(derive(self.seed, "asked", self.names[user])))
        )

    def many(self, user: int) -> np.ndarray:
        """[MANY, 2] what the oracle knows of a user: labels without error, about training prompts."""
        return self.labelled(
            user, self.texts.pairs("train", MANY, random.Random(derive(self.seed, "many", self.names[user]))), clean=True
        )

    def judged(self, user: int, number: int = 300, split: Split = "test") -> np.ndarray:
        """[number, 2] the pairs that accuracy is measured on, of held-out prompts, without error; the same for every user."""
        drawn = self.texts.pairs(split, number, random.Random(derive(self.seed, "judged", split)))
        return self.labelled(user, drawn, clean=True)

    @cached_property
    def disagreement(self) -> float:
        """Share of the judged pairs that two different held-out users order differently, over all of them."""
        pairs = self.texts.pairs("test", 300, random.Random(derive(self.seed, "judged", "test")))
        first = (self.gold[:, pairs[:, 0]] > self.gold[:, pairs[:, 1]])[list(self.held_out)]
        share, number = first.mean(0), len(first)
        return float((2 * share * (1 - share)).mean() * number / (number - 1))


def draw_people(lab: Lab, texts: Texts, agreement: float, num_raters: int, num_held_out: int, seed: int) -> People:
    """Raters and held-out users of a seed.

    The held-out ones are the same for every number of raters, with the same answers, so that sizes can be compared; none of the
    people of a seed is one of another's.

    Args:
        lab: the world.
        texts: that they judge.
        agreement: probability that a user likes what the common taste likes, in one matter of taste.
        num_raters: to train with.
        num_held_out: whom nothing is known of.
        seed: of the choice.
    """
    world = World(lab.config.world.model_copy(update={"user_agreement": agreement, "num_users": POOL}))
    if num_held_out + num_raters > BLOCK or not 0 <= seed < POOL // BLOCK:
        raise ValueError(
            f"a seed of 0 to {POOL // BLOCK - 1} has {BLOCK} people, asked for {num_held_out + num_raters} of {seed}"
        )
    drawn = list(world.users[seed * BLOCK : (seed + 1) * BLOCK])
    random.Random(derive(seed, "users")).shuffle(drawn)
    names = [*drawn[num_held_out:][:num_raters], *drawn[:num_held_out]]
    folder = lab.cache / f"people-gold-{agreement:g}"
    folder.mkdir(parents=True, exist_ok=True)
    gold = np.stack([_gold(world, texts, name, folder) for name in names])
    common = _gold(world, texts, None, folder)
    return People(texts, tuple(names), num_raters, gold, common, lab.config.world.annotator_beta, seed)


def _gold(world: World, texts: Texts, user: str | None, folder: Path) -> np.ndarray:
    """[T] a user's gold reward, equal to ``World.gold`` of each text; kept in a folder."""
    path = folder / f"{user or 'common'}.npy"
    if path.is_file():
        return np.asarray(np.load(path))
    found = np.empty(len(texts.prompts))
    for domain in np.unique(texts.domains):
        judge, rows = world.judge(str(domain), user), texts.domains == domain
        found[rows] = (texts.attributes[rows] @ np.array(astuple(judge.weights)) - judge.mean) / judge.unit
    partial = path.with_name(f".{path.name}")
    np.save(partial, found)
    partial.rename(path)
    return found
