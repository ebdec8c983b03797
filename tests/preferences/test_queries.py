"""Scored responses from files: three formats, what is refused, and the split by prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from preferences.config import DataConfig
from preferences.queries import (
    DSP_PROMPT,
    QuerySet,
    TextQuery,
    chosen_queries,
    encode_queries,
    load_queries,
    split_queries,
)
from sandbox.tokenizer import make_tokenizer
from tokens.errors import UserError


def written(tmp_path: Path, *rows: dict[str, Any]) -> DataConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(preferences=str(path))


def dsp(number: int, **responses: str) -> dict[str, Any]:
    return {"query": f"question {number}?", "responses": responses}


def test_dsp_prefers_the_domains_own_response(tmp_path: Path) -> None:
    data = written(tmp_path, dsp(1, law="a", trade="b", normal="c"), dsp(2, law="d", trade="d", normal="e"))
    found = load_queries("law", data)
    assert [query.responses for query in found.queries] == [("a", "b", "c"), ("d", "e")]  # an equal response is no comparison
    assert found.queries[0].scores == (1.0, 0.0, 0.0) and found.queries[0].prompt == DSP_PROMPT.format(query="question 1?")
    assert load_queries("trade", data).queries[0].responses == ("b", "a", "c")


def test_scored_rows_keep_their_scores_and_ties_are_counted(tmp_path: Path) -> None:
    data = written(
        tmp_path,
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 3]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [2, 2]},
    )
    found = load_queries("law", data)
    assert [query.scores for query in found.queries] == [(1.0, 3.0, 3.0)]
    assert [row.reason for row in found.dropped] == ["all scores are tied"]


def test_pairs_become_queries_of_two(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    found = load_queries("general", written(tmp_path, *rows))
    assert (found.queries[0].prompt, found.queries[0].responses, found.queries[0].scores) == ("p0", ("a", "b"), (1.0, 0.0))
    hh = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    assert load_queries("hh", written(tmp_path, hh, hh)).queries[0].prompt == "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([dsp(1, trade="a", normal="b")], "no response of the domain 'law'; domains found: normal, trade"),
        ([{"query": " ", "responses": {"law": "a", "trade": "b"}}], "query is missing or empty"),
        ([dsp(1, law="a")], "no response beside that of 'law'"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [1]}], "a score for each: '2 and 1'"),
        ([{"prompt": "p", "responses": ["a"], "scores": [1]}], "two responses or more"),
        ([{"prompt": "p", "responses": ["a", ""], "scores": [1, 2]}], "responses is not a list of texts"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "neither a query .* nor a prompt and scores"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}], "the scores of all 1 queries are tied"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_queries("law", written(tmp_path, *rows))


def test_a_domain_without_pairs_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path, dsp(1, trade="a", normal="b")).model_copy(update={"drop_bad": True})
    with pytest.raises(UserError, match=r"law .*: it has no pairs \(first row left out: line 1: no response of the domain"):
        load_queries("law", data)


def made(*prompts: str) -> QuerySet:
    queries = tuple(TextQuery(str(i), prompt, ("good day", "day"), (1.0, 0.0)) for i, prompt in enumerate(prompts))
    return QuerySet("law", "file", queries)


def test_one_query_cannot_be_split() -> None:
    with pytest.raises(UserError, match="2 usable rows share one query"):
        split_queries(made("p", "p"), 0.1, 0)


def test_pairs_of_one_prompt_stay_together() -> None:
    train, test = split_queries(made(*(f"p{i % 10}" for i in range(40))), 0.3, 1)
    assert len(train) == 28 and len(test) == 12
    assert not {q.prompt for q in train} & {q.prompt for q in test}
    assert split_queries(made(*(f"p{i % 10}" for i in range(40))), 0.3, 2)[1] != test


def test_the_queries_that_are_taken_do_not_go_by_the_file() -> None:
    queries = made(*(f"p{i}" for i in range(40))).queries
    taken = chosen_queries(queries, 10, 0)
    assert len(taken) == 10 and set(taken) == set(chosen_queries(queries[::-1], 10, 0))
    assert list(taken) == [query for query in queries if query in taken] != list(queries[:10])
    assert set(taken) < set(chosen_queries(queries, 20, 0)) and set(taken) != set(chosen_queries(queries, 10, 1))
    assert chosen_queries(queries, None, 0) == queries == chosen_queries(queries, 40, 0)


def test_what_is_too_long_is_an_error_or_left_out() -> None:
    tokenizer = make_tokenizer(["good", "day", "hello"])
    given = QuerySet(
        "law",
        "file",
        (
            TextQuery("1", "hello", ("good", "day", "good good good"), (1.0, 0.0, 2.0)),
            TextQuery("2", "hello hello hello", ("good", "day"), (1.0, 0.0)),
            TextQuery("3", "hello", ("good good good", "day"), (1.0, 0.0)),
        ),
    )
    limits = DataConfig(max_prompt_tokens=3, max_response_tokens=3)
    with pytest.raises(UserError, match="3 of 3 rows cannot be used"):
        encode_queries(given, given.queries, tokenizer, limits)
    fitting, bad = encode_queries(given, given.queries, tokenizer, limits.model_copy(update={"drop_bad": True}))
    assert [(query.id, query.scores, query.domain) for query in fitting] == [("1", (1.0, 0.0), "law")]
    assert [row.reason for row in bad] == ["response too long", "prompt too long", "response too long"]
    with pytest.raises(UserError, match="no query is left of 1"):
        encode_queries(given, given.queries[2:], tokenizer, limits.model_copy(update={"drop_bad": True}))
