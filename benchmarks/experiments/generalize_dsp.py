"""Where leave-domains-out is played on real answers: the four domains of DSP, each of which answers the same queries its way."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.generalize_settings import Place, Setting, judge
from benchmarks.experiments.real import pretrain_decoder
from cluster.seeds import derive
from preferences.encode import encode_prompt, encode_response
from preferences.queries import DSP_PROMPT
from preferences.sets import PreferenceSet
from tokens.queries import Query
from tokens.shape import ModelShape

DOMAINS = ("academy", "business", "entertainment", "literature")
OPENING = 64
"""Tokens of an answer that are kept. Domain answers are twice as long as plain ones: of openings, length says nothing."""
PROMPT = 48
"""Tokens of the longest query that is kept."""
SHARES = {"train": 0.4, "test": 0.2, "texts": 0.2, "judge": 0.2}
"""Of the queries: to train on, to measure on, whose domain answers are texts, and that the judge is fitted to."""
SHAPE = ModelShape(vocab_size=2048, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, context_length=128)


def dsp_setting(file: Path, cache: Path, num_prompts: int, seed: int, seen: bool = False) -> Setting:
    """Four domains; a domain's own answer to a query is preferred to each of the others.

    A small decoder is pre-trained here on the answers to all queries that are neither measured on nor the judge's. A domain's
    reference policy goes on with its own answers to queries of which there are no preferences. A response is judged by whether it
    reads as one of the domain: a classifier of words and pairs of words, the domain's openings against the others'.

    Args:
        file: responses.jsonl.
        cache: where the decoder is kept, by seed.
        num_prompts: queries that best of n answers.
        seed: of the split by query.
        seen: whether a left-out domain's answers stay among those that other domains' answers are preferred to.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    rows = [row for row in rows if all(row["responses"].values()) and set(DOMAINS) <= set(row["responses"])]
    random.Random(derive(seed, "dsp split")).shuffle(rows)
    parts, start = {}, 0
    for name, share in SHARES.items():
        end = start + round(share * len(rows))
        parts[name], start = rows[start:end], end
    texts = [
        {"id": f"{i}-{kind}", "prompt": DSP_PROMPT.format(query=row["query"]), "chosen": text, "rejected": "", "domain": kind}
        for i, row in enumerate([*parts["train"], *parts["texts"]])
        for kind, text in row["responses"].items()
    ]
    for each in texts:
        each["chosen"] = " ".join(each["chosen"].split(" ")[:OPENING])
    decoder = pretrain_decoder(PreferenceSet(Dataset.from_list(texts), "dsp", "explicit"), cache / f"decoder-{seed}", SHAPE)
    tokenizer = AutoTokenizer.from_pretrained(decoder)

    def read(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def opening(text: str) -> tuple[int, ...]:
        return encode_response(tokenizer, text)[:OPENING]

    def asked(part: str) -> list[tuple[tuple[int, ...], dict[str, str]]]:
        found = [(encode_prompt(tokenizer, DSP_PROMPT.format(query=row["query"])), row["responses"]) for row in parts[part]]
        return [(prompt, responses) for prompt, responses in found if len(prompt) <= PROMPT]

    authors: dict[str, tuple[str, ...]] = {}

    def queries(part: str, domain: str) -> tuple[Query, ...]:
        found = []
        for number, (prompt, responses) in enumerate(asked(part)):
            names = (domain, *(name for name in responses if name != domain))
            ids = tuple(opening(responses[name]) for name in names)
            authors[f"{domain}-{part}-{number}"] = names
            found.append(Query(f"{domain}-{part}-{number}", prompt, ids, (1.0, *(0.0,) * (len(ids) - 1)), domain))
        return tuple(found)

    def place(domain: str) -> Place:
        def labelled(part: str) -> list[tuple[str, bool]]:
            return [(read(opening(text)), name == domain) for _, own in asked(part) for name, text in own.items()]

        gold = judge(labelled("judge"), labelled("test"), read)
        prompts = tuple(prompt for prompt, _ in asked("test"))[:num_prompts]
        own = tuple((prompt, opening(responses[domain])) for prompt, responses in asked("texts"))
        return Place(domain, queries("train", domain), queries("test", domain), own, prompts, gold)

    places = tuple(map(place, DOMAINS))
    return Setting(decoder, tokenizer, places, {} if seen else authors)
