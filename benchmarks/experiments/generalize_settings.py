"""Where leave-domains-out is played: ten domains of the sandbox that differ in taste, and ten kinds of reviews."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        prompts: that best-of-n is played on; none where there is no gold reward.
        gold: of a response to a prompt, as ids; None where nobody knows.
    """

    name: str
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    texts: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    gold: Callable[[Sequence[int], Sequence[int]], float] | None


@dataclass(frozen=True)
class Setting:
    """All domains, and the model that everything starts from.

    Args:
        base: directory of a language model.
        tokenizer: its own.
        places: the domains.
    """

    base: Path
    tokenizer: Any
    places: tuple[Place, ...]


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


def reviews_setting(folder: Path, cache: Path, num_pairs: int, seed: int) -> Setting:
    """Ten kinds of reviews; a positive one is preferred to a negative one of its kind, paired at random.

    A small decoder is pre-trained here on the training texts of all kinds, without labels; a kind's reference policy goes on with
    its own, also unlabelled. Texts longer than ``REVIEW_TOKENS`` are left out.

    Args:
        folder: KIND.train.tsv and KIND.test.tsv, lines of label (1 positive, 0 or -1 negative), tab, text.
        cache: where the decoder is kept.
        num_pairs: of a kind, to train on; and half as many to measure on.
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

    def queries(kind: str, split: str, number: int) -> tuple[Query, ...]:
        sides = encoded(kind, split)
        rng = random.Random(derive(seed, f"reviews {kind} {split}"))
        for ids in sides.values():
            rng.shuffle(ids)
        pairs = zip(sides[True][:number], sides[False][:number], strict=False)
        return tuple(Query(f"{kind}-{split}-{i}", prompt, pair, (1.0, 0.0), kind) for i, pair in enumerate(pairs))

    def place(kind: str) -> Place:
        own = tuple((prompt, ids) for side in encoded(kind, "train").values() for ids in side)
        return Place(kind, queries(kind, "train", num_pairs), queries(kind, "test", num_pairs // 2), own, (), None)

    return Setting(decoder, tokenizer, tuple(map(place, kinds)))


def _reviews(path: Path) -> list[tuple[bool, str]]:
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        label, _, text = line.partition("\t")
        if text.strip():
            found.append((label.strip() == "1", text.strip()))
    return found
