"""Scored responses: several to a prompt, each with a score; read from three kinds of files.

DSP      {"query": text, "responses": {domain: text, ...}}                 a domain's own response scores 1, the others 0
scored   {"prompt": text or messages, "responses": [text, ...], "scores": [number, ...]}
pairs    any format of docs/data.md                                        chosen scores 1, rejected 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from preferences.config import DataConfig
from preferences.encode import encode_prompt, encode_response
from preferences.formats import BadRowError, read_prompt
from preferences.load import chat_template, load_preferences, refuse_long
from preferences.sets import DroppedRow, held_out, place_of, prompt_id, refuse
from preferences.sources import Source, open_source
from tokens.errors import UserError
from tokens.queries import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QueryFormat = Literal["dsp", "scored", "pairs"]
DSP_PROMPT = "## Human:\n{query}\n\n## Assistant:\n"
"""What DSP's code puts around a query."""


@dataclass(frozen=True)
class TextQuery:
    """A prompt and scored responses as text.

    Args:
        id: unique in its data set.
        prompt: what the model reads before a response.
        responses: k of them.
        scores: of each.
    """

    id: str
    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def tied(self) -> bool:
        """Whether no response is scored above another."""
        return len(set(self.scores)) < 2


@dataclass(frozen=True)
class QuerySet:
    """Scored responses of one data set.

    Args:
        name: of the domain or of the general set.
        source: where they came from.
        queries: those with a comparison.
        templated: True if the prompts were rendered with a chat template.
        dropped: rows that were left out, those whose scores are all tied among them.
    """

    name: str
    source: str
    queries: tuple[TextQuery, ...]
    templated: bool = False
    dropped: tuple[DroppedRow, ...] = ()


def load_queries(name: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> QuerySet:
    """The scored responses that ``data.preferences`` names; queries whose scores are all tied are left out and counted.

    Args:
        name: of the domain or general set; in a file of DSP the response that is preferred.
        data: ``preferences`` is the path here.
        tokenizer: whose chat template renders conversational prompts.

    Raises:
        UserError: naming file and line; also if no query has a comparison, and for a domain that a file of DSP does not know.
    """
    source = open_source(data.preferences, data.split, data.allow_hub)
    columns = set(source.rows.column_names)
    if {"query", "responses"} <= columns:
        return _checked(name, source, data, *_rows(source, data, lambda row: _read_dsp(row, name)))
    if {"prompt", "responses", "scores"} <= columns:
        conversational = not isinstance(source.rows[0]["prompt"], str)
        template = chat_template(source, tokenizer) if conversational else None
        read = _rows(source, data, lambda row: (read_prompt(row["prompt"], template), *_read_scored(row)))
        return _checked(name, source, data, *read, templated=conversational)
    if "responses" in columns:
        raise UserError(
            f"{source.name}: has responses and neither a query (a file of DSP) nor a prompt and scores beside them; "
            f"columns found: {', '.join(source.rows.column_names)}. See docs/domains.md"
        )
    pairs = load_preferences(data, tokenizer)
    found = [
        TextQuery(row["id"], row["prompt"], (row["chosen"], row["rejected"]), (1.0, 0.0))
        for row in pairs.rows.select_columns(["id", "prompt", "chosen", "rejected"])
    ]
    return QuerySet(name, pairs.source, tuple(found), pairs.templated, pairs.dropped)


def split_queries(given: QuerySet, fraction: float, seed: int) -> tuple[tuple[TextQuery, ...], tuple[TextQuery, ...]]:
    """Training and held-out queries; those of one prompt stay together, whatever responses they have.

    Args:
        given: the set.
        fraction: share of the distinct prompts that is held out.
        seed: another seed holds out other prompts.

    Raises:
        UserError: if there is only one prompt.
    """
    prompts = [query.prompt for query in given.queries]
    if len(set(prompts)) < 2:
        raise UserError(
            f"{given.name} ({given.source}): {len(given.queries)} usable rows share one query, and accuracy is measured on "
            "queries that are not trained on: expected at least 2. Add queries"
        )
    out = held_out(prompts, fraction, seed)
    train, test = (tuple(query for query in given.queries if (query.prompt in out) == side) for side in (False, True))
    return train, test


def chosen_queries(queries: Sequence[TextQuery], limit: int | None, seed: int) -> tuple[TextQuery, ...]:
    """At most so many queries: those whose prompts come first by ``place_of``, whatever the order of the file.

    Args:
        queries: to choose from.
        limit: at most so many; None = all.
        seed: another seed chooses others.

    Returns:
        In the order given.
    """
    order = sorted(range(len(queries)), key=lambda i: place_of(queries[i].prompt, seed))
    return tuple(queries[i] for i in sorted(order[:limit]))


def encode_queries(
    given: QuerySet, queries: Sequence[TextQuery], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> tuple[tuple[Query, ...], tuple[DroppedRow, ...]]:
    """Queries as token ids.

    Args:
        given: the set that they are of.
        queries: some of its queries.
        tokenizer: the model's.
        data: longest prompt and response; with ``drop_bad`` what does not fit is left out and listed.

    Returns:
        Those that fit, and what was left out: a response that is too long leaves its query, which is listed, and kept while
        it has a comparison; a query that loses its last one, or whose prompt is too long, leaves the set.

    Raises:
        UserError: if something does not fit and ``data.drop_bad`` is false, or nothing is left.
    """
    fitting: list[Query] = []
    bad: list[DroppedRow] = []
    for query in queries:
        where = f"query {query.id}"
        prompt = encode_prompt(tokenizer, query.prompt, given.templated)
        if len(prompt) > data.max_prompt_tokens:
            bad.append(DroppedRow(where, "prompt too long", f"{len(prompt)} tokens, limit {data.max_prompt_tokens}"))
            continue
        encoded = [(encode_response(tokenizer, text), score) for text, score in zip(query.responses, query.scores, strict=True)]
        kept = [(ids, score) for ids, score in encoded if len(ids) <= data.max_response_tokens]
        if len(kept) < len(encoded):
            longest = max(len(ids) for ids, _ in encoded)
            bad.append(DroppedRow(where, "response too long", f"{longest} tokens, limit {data.max_response_tokens}"))
        if len({score for _, score in kept}) > 1:
            responses, scores = zip(*kept, strict=True)
            fitting.append(Query(query.id, prompt, tuple(responses), tuple(scores), given.name))
    if bad and not data.drop_bad:
        raise refuse(given.source, bad, len(queries), ("prompt", "responses", "scores"))
    if not fitting:
        raise UserError(
            f"{given.name} ({given.source}): no query is left of {len(queries)}"
            + (f"; first: {bad[0].where}: {bad[0].reason}: {bad[0].detail}" if bad else "")
            + ". Raise data.max_prompt_tokens or data.max_response_tokens"
        )
    return tuple(fitting), tuple(bad)


_Read = tuple[str, tuple[str, ...], tuple[float, ...]]


def _rows(
    source: Source, data: DataConfig, read: Callable[[Mapping[str, Any]], _Read]
) -> tuple[list[TextQuery], list[DroppedRow]]:
    found: list[TextQuery] = []
    bad: list[DroppedRow] = []
    limit = len(source.rows) if data.max_pairs is None else min(data.max_pairs, len(source.rows))
    for number, row in enumerate(source.rows.select(range(limit))):
        try:
            prompt, responses, scores = read(row)
            refuse_long({"prompt": prompt} | {f"response {i + 1}": text for i, text in enumerate(responses)})
        except BadRowError as error:
            bad.append(DroppedRow(source.where(number), error.reason, error.detail))
            continue
        found.append(TextQuery(f"{number + 1}-{prompt_id(prompt)}", prompt, responses, scores))
    if bad and not data.drop_bad:
        raise refuse(source.name, bad, limit, source.rows.column_names)
    return found, bad


def _checked(
    name: str, source: Source, data: DataConfig, found: list[TextQuery], bad: list[DroppedRow], templated: bool = False
) -> QuerySet:
    """Without the queries that say nothing; an error where all say nothing."""
    told = [query for query in found if not query.tied]
    if not told:
        why = f"the scores of all {len(found)} queries are tied" if found else "it has no pairs"
        first = f" (first row left out: {bad[0].where}: {bad[0].reason})" if bad else ""
        raise UserError(
            f"{name} ({source.name}): {why}{first}, so nothing says which response is better. Expected queries with at least two "
            "different scores; see docs/domains.md"
        )
    tied = [DroppedRow(f"query {query.id}", "all scores are tied") for query in found if query.tied]
    return QuerySet(name, source.name, tuple(told), templated, (*bad, *tied))


def _read_dsp(row: Mapping[str, Any], domain: str) -> _Read:
    """The domain's own response against each other domain's."""
    query, responses = row["query"], row["responses"]
    if not isinstance(query, str) or not query.strip():
        raise BadRowError("query is missing or empty", query)
    if not isinstance(responses, Mapping):
        raise BadRowError("responses is not an object of texts by domain", responses)
    there = {name: text for name, text in responses.items() if isinstance(text, str) and text.strip()}
    if domain not in there:
        raise BadRowError(f"no response of the domain {domain!r}; domains found: {', '.join(sorted(there)) or 'none'}")
    others = [text for name, text in there.items() if name != domain and text != there[domain]]
    if not others:
        raise BadRowError(f"no response beside that of {domain!r}")
    return DSP_PROMPT.format(query=query), (there[domain], *others), (1.0, *(0.0 for _ in others))


def _read_scored(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    responses, scores = row["responses"], row["scores"]
    if not isinstance(responses, list) or not all(isinstance(text, str) and text.strip() for text in responses):
        raise BadRowError("responses is not a list of texts", responses)
    if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise BadRowError("scores is not a list of finite numbers", scores)
    if len(responses) != len(scores) or len(responses) < 2:
        raise BadRowError("needs two responses or more, and a score for each", f"{len(responses)} and {len(scores)}")
    return tuple(responses), tuple(float(score) for score in scores)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
