"""Where leave-domains-out is played: ten domains of the sandbox that differ in taste, and ten kinds of reviews."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.real import pretrain_decoder
from cluster.config import RunConfig
from cluster.generalize_data import sandbox_texts
from cluster.seeds import derive
from cluster.storage import storage_root
from preferences.encode import encode_prompt, encode_response
from preferences.sets import PreferenceSet
from tokens.queries import Query
from tokens.shape import ModelShape

if TYPE_CHECKING:
    from sandbox.world import World

Labelled = Sequence[tuple[str, bool]]
Example = tuple[tuple[int, ...], tuple[int, ...]]
REVIEW_TOKENS = 96
"""Longest review that is kept, in tokens; longer ones are left out, so that every text is whole."""
REVIEWS_SHAPE = ModelShape(vocab_size=2048, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, context_length=128)


@dataclass(frozen=True)
class Place:
    """One domain.

    Args:
        name: of it.
        train: labelled queries, for when it is not left out.
        test: held-out ones.
        texts: its fine-tuning texts, unlabelled.
        prompts: that best-of-n is played on.
        gold: of a response to a prompt, as ids.
    """

    name: str
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    texts: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    gold: Callable[[Sequence[int], Sequence[int]], float]


@dataclass(frozen=True)
class Setting:
    """All domains, and the model that everything starts from.

    Args:
        base: directory of a language model.
        tokenizer: its own.
        places: the domains.
        authors: by id of a query, the domain whose text each of its responses is; a query that is not in it has nobody else's.
    """

    base: Path
    tokenizer: Any
    places: tuple[Place, ...]
    authors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def sandbox_setting(config: RunConfig) -> Setting:
    """Ten domains; number i is judged by user i, and its texts are the half of its corpus that this user likes.

    Args:
        config: the recipe; its world is built here, or found.
    """
    from transformers import AutoTokenizer

    from policy.sft import fit_language_model
    from sandbox.build import build
    from sandbox.world import World

    files = build(config.world, config.sft, storage_root(config) / "cache", fit_language_model, lambda phase, done, total: None)
    world, tokenizer = World(config.world), AutoTokenizer.from_pretrained(files.sft_dir)

    def queries(split: str, domain: str, user: str) -> tuple[Query, ...]:
        by_prompt: dict[str, dict[str, None]] = {}
        for pair in files.pairs(split):
            if pair.domain == domain:
                by_prompt.setdefault(pair.prompt, {}).update({pair.chosen: None, pair.rejected: None})
        found = []
        for number, (prompt, texts) in enumerate(by_prompt.items()):
            scores = tuple(world.gold(prompt, text, user=user) for text in texts)
            ids = tuple(encode_response(tokenizer, text) for text in texts)
            if len(set(scores)) > 1:
                found.append(Query(f"{domain}-{split}-{number}", encode_prompt(tokenizer, prompt), ids, scores, domain))
        return tuple(found)

    return Setting(
        files.sft_dir,
        tokenizer,
        tuple(_sandbox_place(config, world, tokenizer, queries, i) for i in range(len(world.domains))),
    )


def _sandbox_place(
    config: RunConfig,
    world: World,
    tokenizer: Any,
    queries: Callable[[str, str, str], tuple[Query, ...]],
    number: int,
) -> Place:
    domain, user = world.domains[number], world.users[number]
    liked = sandbox_texts(world, domain)
    prompts = [p.text for p in world.prompts("test") if p.domain == domain][: config.generalize.num_prompts]

    def gold(prompt: Sequence[int], response: Sequence[int]) -> float:
        read = (tokenizer.decode(list(ids), skip_special_tokens=True) for ids in (prompt, response))
        return world.gold(*read, user=user)

    return Place(
        domain,
        queries("train", domain, user),
        queries("validation", domain, user),
        tuple((encode_prompt(tokenizer, p), encode_response(tokenizer, r)) for p, r in liked),
        tuple(encode_prompt(tokenizer, prompt) for prompt in prompts),
        gold,
    )


def reviews_setting(folder: Path, cache: Path, num_pairs: int, num_prompts: int, seed: int) -> Setting:
    """Ten kinds of reviews; a positive one is preferred to a negative one of its kind, paired at random.

    A small decoder is pre-trained here on the training texts of all kinds, without labels; a kind's reference policy goes on with
    those of its own that are in no training pair, also unlabelled. Texts longer than ``REVIEW_TOKENS`` are left out. What it
    writes is judged by a classifier of words and pairs of words, fitted to those test texts of all kinds that no pair is of.

    Args:
        folder: KIND.train.tsv and KIND.test.tsv, lines of label (1 positive, 0 or -1 negative), tab, text.
        cache: where the decoder is kept.
        num_pairs: of a kind, to train on; and half as many to measure on.
        num_prompts: reviews that best of n is asked for.
        seed: of the pairing.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    kinds = sorted(path.name.removesuffix(".train.tsv") for path in folder.glob("*.train.tsv"))
    texts = {(kind, split): _reviews(folder / f"{kind}.{split}.tsv") for kind in kinds for split in ("train", "test")}
    rows = [
        {"id": f"{kind}-{number}", "prompt": "review :", "chosen": text, "rejected": "", "domain": kind}
        for kind in kinds
        for number, (_, text) in enumerate(texts[kind, "train"])
        if len(text.split()) <= REVIEW_TOKENS
    ]
    decoder = pretrain_decoder(PreferenceSet(Dataset.from_list(rows), "reviews", "explicit"), cache / "decoder", REVIEWS_SHAPE)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    prompt = encode_prompt(tokenizer, "review :")

    def encoded(kind: str, split: str) -> dict[bool, list[tuple[int, ...]]]:
        found: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for positive, text in texts[kind, split]:
            ids = encode_response(tokenizer, text)
            if len(ids) <= REVIEW_TOKENS:
                found[positive].append(ids)
        return found

    def shared_out(kind: str, split: str, number: int) -> tuple[tuple[Query, ...], dict[bool, list[tuple[int, ...]]]]:
        sides = encoded(kind, split)
        rng = random.Random(derive(seed, f"reviews {kind} {split}"))
        for ids in sides.values():
            rng.shuffle(ids)
        number = min(number, *map(len, sides.values()))
        pairs = enumerate(zip(sides[True][:number], sides[False][:number], strict=True))
        queries = tuple(Query(f"{kind}-{split}-{i}", prompt, pair, (1.0, 0.0), kind) for i, pair in pairs)
        return queries, {positive: ids[number:] for positive, ids in sides.items()}

    tested = {kind: shared_out(kind, "test", num_pairs // 2) for kind in kinds}

    def read(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    rest = [(read(ids), positive) for _, left in tested.values() for positive, side in left.items() for ids in side]
    held_out = [(read(text), not i) for queries, _ in tested.values() for q in queries for i, text in enumerate(q.responses)]
    gold = judge(rest, held_out, read)

    def place(kind: str) -> Place:
        train, left = shared_out(kind, "train", num_pairs)
        own = tuple((prompt, ids) for side in left.values() for ids in side)
        return Place(kind, train, tested[kind][0], own, (prompt,) * num_prompts, gold)

    return Setting(decoder, tokenizer, tuple(map(place, kinds)))


def judge(
    known: Labelled, held_out: Labelled, read: Callable[[Sequence[int]], str]
) -> Callable[[Sequence[int], Sequence[int]], float]:
    """A classifier of words and pairs of words as a judge: log odds that a response is one of those asked for.

    Args:
        known: texts that it is fitted to, and whether each is one.
        held_out: others; it is said how well it tells them apart.
        read: ids as text.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit(*zip(*known, strict=True))
    texts, answers = zip(*held_out, strict=True)
    ordered = roc_auc_score(answers, classifier.decision_function(texts))
    print(f"the judge saw {len(known)} texts; of {len(held_out)} others its area under the curve is {ordered:.3f}")

    def gold(prompt: Sequence[int], response: Sequence[int]) -> float:
        return float(classifier.decision_function([read(response)])[0])

    return gold


def _reviews(path: Path) -> list[tuple[bool, str]]:
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        label, _, text = line.partition("\t")
        if text.strip():
            found.append((label.strip() == "1", text.strip()))
    return found
