"""A second labeller is asked in both orders, and no answer is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from cluster.asking import ask_in_both_orders, open_answers
from cluster.console import Console
from cluster.endpoint_judge import EndpointJudge
from cluster.endpoint_options import EndpointOptions
from cluster.judges import FIRST, NONE, SECOND, JudgeFailed, read_verdict
from cluster.load_config import load_config
from cluster.relabel import relabel
from cluster.sandbox_source import WorldRecipe
from preferences.config import DataConfig
from preferences.formats import Texts
from preferences.load import load_preferences
from sandbox.build import WorldFiles
from tests.cluster.command import TINY, Command
from tests.cluster.endpoint import BUSY_TIMES, SLOW_S, Endpoint, serve
from tests.cluster.test_reward import encoder, write_data
from tokens.errors import UserError

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("cluster.endpoint_judge.LONGEST_PAUSE_S", 0.02)
    with serve() as server:
        yield server


def pairs_file(tmp_path: Path, *rules: str) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{rule} {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i, rule in enumerate(rules)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def counts_of(path: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return counts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", FIRST),
        (" b.\n", SECOND),
        ("**B**", SECOND),
        ("Response A", FIRST),
        ("Answer: A", FIRST),
        ("[[B]]", SECOND),
        ("The better response is B.", SECOND),
        ("My answer is (A), as it is kinder than B.", FIRST),
        ("C", NONE),
        ("A and B", NONE),
        ("A better answer would name both.", NONE),
        ("Answer: A\nNo, answer: B", NONE),
        ("Apples", NONE),
        ("I cannot say", NONE),
        ("", NONE),
        (None, NONE),
    ],
)
def test_what_a_reply_says(reply: str | None, verdict: int) -> None:
    assert read_verdict(reply) == verdict


def test_both_orders_decide(endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path, "good", "bad", "first", "garbage", "wordy", "silent", "nothing")
    out = relabel(pairs, f"openai:{endpoint.url}#m", None, Console())
    assert out == tmp_path / "pairs.relabelled.parquet"
    rows = read(out)
    assert [row["label"] for row in rows] == [1, 0, -1, -1, 1, -1, -1]
    assert [row["label_forward"] for row in rows] == [1, 0, 1, -1, 1, -1, -1]
    assert [row["label_backward"] for row in rows] == [1, 0, 0, -1, 1, -1, -1]
    assert [row["id"] for row in rows] == [str(i + 1) for i in range(7)]
    expected = {
        "pairs": 7,
        "agree": 2,
        "disagree": 1,
        "changed": 1,
        "changed_to_first": 1,
        "no_answer": 3,
        "not_asked": 0,
        "unusable": 0,
    }
    assert {key: counts_of(out)[key] for key in expected} == expected
    assert sum(endpoint.asked.values()) == 14
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    printed = capsys.readouterr().out
    assert "changed with the order            1 (1 to the response shown first)" in printed
    assert KEY not in printed + "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())


def test_the_three_sets_lie_beside_it(endpoint: Endpoint, tmp_path: Path) -> None:
    out = relabel(
        pairs_file(tmp_path, "good", "bad", "first", "good"), f"openai:{endpoint.url}#m", tmp_path / "x.parquet", Console()
    )
    sets = {name: read(tmp_path / f"x-{name}.parquet") for name in ("original", "relabelled", "agreement")}
    assert sets["original"] == read(out)
    assert [row["chosen"] for row in sets["relabelled"]] == ["good 0", "bad 1", "good 3"]
    assert [row["id"] for row in sets["agreement"]] == ["1", "4"]
    again = load_preferences(DataConfig(preferences=str(tmp_path / "x-relabelled.parquet")))
    assert list(again.rows["rejected"]) == ["bad 0", "good 1", "bad 3"]


def test_what_passes_is_tried_again(endpoint: Endpoint, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, "flaky", "limited", "slow", "good")
    out = relabel(pairs, f"openai:{endpoint.url}#m", None, Console(), options=EndpointOptions(timeout_s=SLOW_S / 3))
    assert [row["label"] for row in read(out)] == [1, 1, 1, 1]
    assert sorted(endpoint.asked.values()) == [1, 1, 2, 2, 2, 2, 2, 2]


def test_a_failure_stops_and_a_second_call_goes_on(endpoint: Endpoint, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, *["good"] * 6, "broken", *["good"] * 6)
    judge = f"openai:{endpoint.url}#m"
    with pytest.raises(JudgeFailed) as caught:
        relabel(pairs, judge, None, Console(), options=EndpointOptions(concurrency=1, retries=2))
    for part in ("'m'", endpoint.url, "3 attempt(s); the last: status 500", "out of order", "pairs.relabelled.answers.jsonl"):
        assert part in str(caught.value)
    assert not (tmp_path / "pairs.relabelled.parquet").exists()
    answers = tmp_path / "pairs.relabelled.answers.jsonl"
    kept = len(answers.read_text().splitlines())
    assert kept == 12  # what was answered before the broken one, the first half of its own batch included
    answers.write_text(answers.read_text() + '{"key": "cut o')
    pairs_file(tmp_path, *["good"] * 6, "bad", *["good"] * 6)
    out = relabel(pairs, judge, None, Console())
    assert [row["label"] for row in read(out)] == [1] * 6 + [0] + [1] * 6
    good = [times for question, times in endpoint.asked.items() if "broken" not in question]
    assert good == [1] * 26  # nothing was asked twice
    endpoint.down = True
    assert read(relabel(pairs, judge, None, Console())) == read(out)  # and a third call asks nothing
    other = f"openai:{endpoint.url}#another"
    with pytest.raises(JudgeFailed):
        relabel(pairs, other, None, Console(), options=EndpointOptions(retries=0))


def test_the_command_line(endpoint: Endpoint, command: Command, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, "good", "broken")
    judge = ("--judge", f"openai:{endpoint.url}#m", "--out", str(tmp_path / "x.parquet"), "--concurrency", "1", "--retries", "0")
    failed = command("relabel", pairs, *judge)
    assert failed.returncode == 1, failed.stderr
    assert "failed: the judge 'm' at" in failed.stderr and "2 answers (4 are needed) are kept in" in failed.stderr
    assert "Traceback" not in failed.stderr
    pairs_file(tmp_path, "good", "bad")
    done = command("relabel", pairs, *judge)
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in read(tmp_path / "x.parquet")] == [1, 0]
    assert "2 of 4 answers are there from an earlier call" in done.stdout
    assert KEY not in failed.stdout + failed.stderr + done.stdout + done.stderr


def test_requests_are_in_flight_together(endpoint: Endpoint, tmp_path: Path) -> None:
    relabel(
        pairs_file(tmp_path, *["good"] * 20), f"openai:{endpoint.url}#m", None, Console(), options=EndpointOptions(concurrency=4)
    )
    assert 2 <= endpoint.busiest <= 4


def test_retries_have_a_budget_for_all_requests(endpoint: Endpoint) -> None:
    judge = EndpointJudge(endpoint.url, "m", EndpointOptions(concurrency=1, retries=3), budget=2, pause_s=0.0)
    flaky = [f"flaky {i}" for i in range(5)]
    with pytest.raises(JudgeFailed, match=r"The budget of retries for the whole data set is used up") as caught:
        judge.compare(flaky, ["good"] * 5, ["bad"] * 5)
    assert caught.value.answers == (1, 1, None, None, None)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("forbidden", "status 401: the key is missing or not accepted; set OPENAI_API_KEY"),
        ("closed", "it limits the rate for over 600 s (status 429: "),
        ("page", "it answers, but not as a chat endpoint"),
    ],
)
def test_what_will_not_pass_is_not_tried_again_and_the_key_stays_hidden(
    endpoint: Endpoint, tmp_path: Path, rule: str, words: str
) -> None:
    with pytest.raises(JudgeFailed) as caught:
        relabel(pairs_file(tmp_path, rule), f"openai:{endpoint.url}#m", None, Console(), options=EndpointOptions(concurrency=1))
    assert words in str(caught.value)
    assert sum(endpoint.asked.values()) == 1
    assert KEY not in str(caught.value) and caught.value.__cause__ is None


def test_nobody_listens(tmp_path: Path) -> None:
    with serve() as server:
        url = server.url
    judge = EndpointJudge(url, "m", EndpointOptions(retries=1), pause_s=0.0)
    with pytest.raises(JudgeFailed, match=r"2 attempt\(s\); the last: no connection"):
        judge.compare(["good"], ["good"], ["bad"])


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("gpt", "no such judge: 'gpt'; expected gold, gold:CONFIG.yaml, reward:DIR or openai:BASE_URL#MODEL"),
        ("gold", "the judge gold knows the sandbox's prompts only"),
        ("openai:http://localhost:1/v1", "names no model: expected openai:BASE_URL#MODEL"),
        ("openai:localhost:1/v1#m", "must be a URL such as http://localhost:8000/v1"),
        ("openai:http://me:secret@localhost/v1#m", "must hold no user name, password or query"),
        ("openai:http://localhost/v1?key=secret#m", "must hold no user name, password or query"),
        ("reward:nowhere", "nowhere: no such model directory"),
    ],
)
def test_judges_that_cannot_be_asked(tmp_path: Path, judge: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        relabel(pairs_file(tmp_path, "good", "good"), judge, None, Console())
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, "good")
    for out, words in (
        (tmp_path / "x.jsonl", "--out must end in .parquet"),
        (tmp_path / "no" / "x.parquet", "--out: there is no directory"),
    ):
        with pytest.raises(UserError, match=words):
            relabel(pairs, "gold", out, Console())
    with pytest.raises(UserError, match=r"say where to write with --out FILE\.parquet"):
        relabel(str(tmp_path), "gold", None, Console())
    same = tmp_path / "same.parquet"
    parquet.write_table(parquet.read_table(same) if same.exists() else _table(), same)
    with pytest.raises(UserError, match="is the data itself"):
        relabel(str(same), "gold", same, Console())
    with pytest.raises(UserError, match="--limit must be at least 1, got 0"):
        relabel(pairs, "gold", None, Console(), limit=0)


def test_numbers_out_of_range() -> None:
    for name, number in (("concurrency", 0), ("retries", -1), ("max_tokens", 0)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be at least {number + 1}, got {number}"):
            EndpointOptions(**{name: number})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--timeout must be above 0, got nan"):
        EndpointOptions(timeout_s=float("nan"))


def _table() -> Any:
    import pyarrow as pa

    return pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})


def test_rows_that_cannot_be_read_stay_without_a_label(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"id": "x", "prompt": "good", "chosen": "same", "rejected": "same", "label": 7},
        {"id": "y", "prompt": "good", "chosen": "good", "rejected": "bad", "label": 7},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = relabel(str(path), f"openai:{endpoint.url}#m", None, Console())
    assert [(row["id"], row["label"], row["label_forward"]) for row in read(out)] == [("x", -1, -1), ("y", 1, 1)]
    assert "1 of 2 pairs cannot be read and get no label; first: line 1: chosen equals rejected" in capsys.readouterr().out
    assert counts_of(out)["unusable"] == 1
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no pair of 1 can be read; first: line 1"):
        relabel(str(path), f"openai:{endpoint.url}#m", None, Console())


def test_messages_stay_messages(endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "bad day?"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    path.write_text((json.dumps(row) + "\n") * 2)
    out = relabel(str(path), f"openai:{endpoint.url}#m", None, Console(), limit=1)
    (question, *_) = endpoint.asked
    assert "[Prompt]\nuser: bad day?\n" in question
    (written,) = read(out)
    assert written["chosen"] == row["chosen"]
    assert written["label"] == 1  # "user:" is no rule of the server
    (swapped,) = read(tmp_path / "chat.relabelled-relabelled.parquet")
    assert swapped["chosen"] == row["chosen"]


@pytest.fixture(scope="module")
def world(command: Command) -> WorldFiles:
    """The tiny world, which the other tests of the storage root share."""
    config = load_config(TINY)
    return WorldRecipe(config.world, config.sft, command.storage / "cache").build(lambda phase, done, total: None)


def test_the_sandbox_s_truth_agrees_with_its_validation_labels(
    command: Command, world: WorldFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RONDO_STORAGE", str(command.storage))
    out = relabel(f"sandbox:{TINY}", "gold", None, Console())
    assert out == command.storage / "relabelled" / "tiny-validation.parquet"
    assert [row["id"] for row in read(out)] == [pair.id for pair in world.pairs("validation")]
    counts = counts_of(out)
    assert counts["agree"] + counts["no_answer"] == counts["pairs"] == 32
    noisy = relabel(f"sandbox:{TINY}", "gold", None, Console(), split="train")
    for row in read(noisy):
        gap = row["gold_chosen"] - row["gold_rejected"]
        assert row["label"] == (1 if gap > 0 else 0 if gap < 0 else -1)
    for row in read(noisy.with_name("tiny-train-relabelled.parquet")):
        assert row["gold_chosen"] > row["gold_rejected"]
    with pytest.raises(UserError, match="the sandbox has the splits train, validation and validation_held_out, not 'test'"):
        relabel(f"sandbox:{TINY}", "gold", None, Console(), split="test")


def test_gold_judges_a_file_of_the_sandbox(world: WorldFiles, tmp_path: Path) -> None:
    out = relabel(str(world.pairs_path), f"gold:{TINY}", tmp_path / "x.parquet", Console(), limit=20)
    assert len(read(out)) == 20


def test_a_reward_model_judges_by_its_scores(world: WorldFiles, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from preferences.encode import encode_prompt, encode_response
    from rm.batches import score_sequences
    from rm.model import RewardModel

    tokenizer = AutoTokenizer.from_pretrained(world.sft_dir)
    model = RewardModel.from_language_model(world.sft_dir, pooling="last", seed=1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "card.json").write_text("{}")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "rm")
    out = relabel(str(world.pairs_path), f"reward:{tmp_path / 'run'}", tmp_path / "x.parquet", Console(), limit=40)
    rows = read(out)
    expected = []
    for row in rows:
        sequences = [
            (encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row[s])) for s in ("chosen", "rejected")
        ]
        chosen, rejected = score_sequences(model, sequences, 2, tokenizer.pad_token_id).tolist()
        expected.append(int(chosen > rejected))
    assert [row["label"] for row in rows] == expected
    assert 0 < sum(expected) < 40
    assert counts_of(out)["changed"] == 0  # scores do not depend on the order
    # trained again in the same place, it is another judge: nothing it said before is believed
    answers = tmp_path / "x.answers.jsonl"
    before = len(answers.read_text().splitlines())
    RewardModel.from_language_model(world.sft_dir, pooling="last", seed=2, dtype=torch.float32).save_pretrained(tmp_path / "rm")
    again = read(relabel(str(world.pairs_path), f"reward:{tmp_path / 'rm'}", tmp_path / "x.parquet", Console(), limit=40))
    assert len(answers.read_text().splitlines()) == 2 * before
    assert [row["label"] for row in again] != expected


def test_a_pair_longer_than_the_judge_s_context(world: WorldFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from rm.model import RewardModel

    RewardModel.from_language_model(world.sft_dir, pooling="last", seed=1, dtype=torch.float32).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(world.sft_dir).save_pretrained(tmp_path / "rm")
    long = {"prompt": "tea", "chosen": "tea " * 90, "rejected": "tea"}
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match=r"none of 2 questions about 1 pairs; first: .*\+ 91 tokens, the judge's context is 72\."):
        relabel(str(path), f"reward:{tmp_path / 'rm'}", None, Console())
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (long, *({"prompt": "tea", "chosen": "a", "rejected": "the"},) * 2))
    )
    out = relabel(str(path), f"reward:{tmp_path / 'rm'}", None, Console())
    first, second, third = read(out)
    assert first["label"] == -1 and second["label"] == third["label"] != -1
    assert counts_of(out)["not_asked"] == 1 and counts_of(out)["no_answer"] == 0
    assert (
        "1 of 3 pairs were more than the judge can take and get no label; first: pair '1': the prompt" in capsys.readouterr().out
    )


def test_an_encoder_judges_with_the_tokens_that_it_was_trained_with(tmp_path: Path) -> None:
    """Its tokenizer has CLS and SEP only, which stand for BOS and EOS."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rm.model import RewardModel

    words = write_data(tmp_path / "d.jsonl")
    base = encoder(tmp_path / "bert", words)
    RewardModel.from_any(base, pooling="last", seed=1, dtype=torch.float32).save_pretrained(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = read(relabel(str(tmp_path / "d.jsonl"), f"reward:{tmp_path / 'rm'}", None, Console(), limit=30))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")

    def score(row: dict[str, Any], side: str) -> float:
        ids = tokenizer(f"{row['prompt']} {row[side]}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return float(model(torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])).logits)

    assert [row["label"] for row in rows] == [int(score(row, "chosen") > score(row, "rejected")) for row in rows]


def test_one_pair_that_the_judge_cannot_take_blocks_nothing(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(tmp_path, "good", "refused", "filtered", "bad")
    out = relabel(pairs, f"openai:{endpoint.url}#m", None, Console())
    assert [row["label"] for row in read(out)] == [1, -1, -1, 0]
    expected = {"pairs": 4, "agree": 1, "disagree": 1, "no_answer": 0, "not_asked": 2, "unusable": 0}
    assert {key: counts_of(out)[key] for key in expected} == expected
    printed = capsys.readouterr().out
    assert "2 of 4 pairs were more than the judge can take and get no label" in printed
    assert "pair '2': the endpoint refuses it: status 400" in printed and "pair '3': the endpoint's content filter" in printed
    assert KEY not in printed + "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert len((tmp_path / "pairs.relabelled.answers.jsonl").read_text().splitlines()) == 4, "what is no answer is not kept"


def test_many_that_it_cannot_take_stop_it_early(endpoint: Endpoint, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, *["good"] * 3, *["refused"] * 20)
    with pytest.raises(UserError, match=r"of 46 questions were more than .*; last: .*status 400.* 6 answers are kept in .*jsonl"):
        relabel(pairs, f"openai:{endpoint.url}#m", None, Console(), options=EndpointOptions(concurrency=2))
    assert sum(endpoint.asked.values()) == 16, "two batches"
    assert not (tmp_path / "pairs.relabelled.parquet").exists()


def test_a_reply_that_is_cut_off_is_no_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    cut = r"cut off at 5 tokens \(finish_reason length\) before it said A or B: raise --max-tokens"
    pairs = pairs_file(tmp_path, *["reasoning"] * 2)
    with pytest.raises(UserError, match=f"answered none of 4 questions about 2 pairs; first: the reply was {cut}"):
        relabel(pairs, f"openai:{endpoint.url}#m", None, Console(), options=EndpointOptions(max_tokens=5))
    assert (tmp_path / "pairs.relabelled.answers.jsonl").read_text() == ""
    with pytest.raises(UserError, match=rf"of 40 questions were more than the judge can take.*{cut}"):
        relabel(
            pairs_file(tmp_path, *["reasoning"] * 20),
            f"openai:{endpoint.url}#m",
            None,
            Console(),
            options=EndpointOptions(max_tokens=5),
        )


def test_nothing_answered_is_nothing_written(endpoint: Endpoint, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, "garbage", "silent")
    with pytest.raises(
        UserError, match=r"none of 4 questions about 2 pairs: no reply is clearly one.*answers\.jsonl, remove that"
    ):
        relabel(pairs, f"openai:{endpoint.url}#m", None, Console())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.relabelled.answers.jsonl"]


def test_waits_that_the_server_asks_for_are_not_retries(endpoint: Endpoint) -> None:
    judge = EndpointJudge(endpoint.url, "m", EndpointOptions(concurrency=2, retries=0), budget=0, pause_s=0.01)
    assert judge.compare(["busy 1", "busy 2"], ["good"] * 2, ["bad"] * 2) == [1, 1]
    assert list(endpoint.asked.values()) == [BUSY_TIMES + 1] * 2 and judge.budget > 0
    judge.close()


def test_the_budget_of_retries_grows_with_the_questions(endpoint: Endpoint) -> None:
    judge = EndpointJudge(endpoint.url, "m", EndpointOptions(concurrency=1), budget=0, pause_s=0.0)
    assert judge.compare([f"good {i}" for i in range(20)], ["good"] * 20, ["bad"] * 20) == [1] * 20
    flaky = [f"flaky {i}" for i in range(5)]
    with pytest.raises(JudgeFailed, match="budget of retries") as caught:
        judge.compare(flaky, ["good"] * 5, ["bad"] * 5)
    assert caught.value.answers == (1, 1, None, None, None), "25 questions, a tenth of them"
    judge.close()


def test_any_failure_keeps_what_was_answered(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = EndpointJudge(endpoint.url, "m", EndpointOptions(concurrency=1))
    read, seen = judge._read, []

    def third_fails(answer: Any) -> Any:
        seen.append(answer)
        if len(seen) == 3:
            raise KeyError(f"no such field, key {KEY}")
        return read(answer)

    monkeypatch.setattr(judge, "_read", third_fails)
    with pytest.raises(JudgeFailed, match=r"did not answer: KeyError: .*no such field, key \*\*\*") as caught:
        judge.compare([f"good {i}" for i in range(5)], ["good"] * 5, ["bad"] * 5)
    assert caught.value.answers == (1, 1, None, None, None)
    judge.close()


class Odd:
    """A judge that does not keep its promise."""

    name, batch_size, template = "odd", 8, None

    def __init__(self, said: Any) -> None:
        self.said = said

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([1, 0, 1], "gave 3 answers to 4 questions"),
        ([1, 0, 1, "A"], "gave 'A' for an answer"),
        ([1, 0, 1, float("nan")], "gave nan for an answer"),
        ([1, 0, 1, None], "gave None for an answer"),
        (ZeroDivisionError("by zero"), "failed: ZeroDivisionError: by zero"),
    ],
)
def test_a_judge_that_does_not_keep_its_promise(said: Any, words: str, tmp_path: Path) -> None:
    texts = [Texts("a", "b", "c"), Texts("d", "e", "f")]
    with open_answers(tmp_path / "answers") as answers, pytest.raises(JudgeFailed, match=f"the judge odd {words}"):
        ask_in_both_orders(texts, Odd(said), answers, Console())
    assert (tmp_path / "answers").read_text() == ""


def test_connections_are_closed(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    close = EndpointJudge.close
    monkeypatch.setattr(EndpointJudge, "close", lambda judge: (closed.append(judge.model), close(judge)))
    relabel(pairs_file(tmp_path, "good"), f"openai:{endpoint.url}#one", None, Console())
    with pytest.raises(JudgeFailed):
        relabel(pairs_file(tmp_path, "forbidden"), f"openai:{endpoint.url}#two", None, Console())
    assert closed == ["one", "two"]


@pytest.mark.slow
def test_a_real_server_s_garbage_is_no_answer(world: WorldFiles, tmp_path: Path) -> None:
    """vLLM's own OpenAI server on the tiny policy, which knows neither A nor B: nothing is lost, nothing is made up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'][:40] }}{% endfor %}")
    sizes = ["--max-model-len", "72", "--kv-cache-memory-bytes", str(64 << 20), "--gpu-memory-utilization", "0.05"]
    plain = ["--enforce-eager", "--dtype", "float32", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
    model = ["--model", str(world.sft_dir), "--served-model-name", "tiny", "--chat-template", str(template)]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *place, *sizes, *plain],
            stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet, start_new_session=True,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not _healthy(port):
            assert server.poll() is None and time.monotonic() - began < 400, log.read_text()[-3000:]
            time.sleep(1)
        judge, out = f"openai:http://127.0.0.1:{port}/v1#tiny", tmp_path / "x.parquet"
        with pytest.raises(UserError, match=r"answered none of 20 questions about 10 pairs|finish_reason length"):
            relabel(str(world.pairs_path), judge, out, Console(), limit=10)
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    answers = [json.loads(line)["answer"] for line in (tmp_path / "x.answers.jsonl").read_text().splitlines()]
    assert set(answers) <= {NONE} and not out.exists()


def _healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True
