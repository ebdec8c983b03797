"""One scoring process, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from actors.process import ProcessSetup
from actors.strength_scorer import MAX_DEATHS, ScoringJob, StrengthScorer, attempt
from policy.sft import make_model
from preferences.encode import encode_prompt, encode_response
from rm.batches import score_sequences
from rm.model import RewardModel
from sandbox.tokenizer import make_tokenizer
from tokens.shape import ModelShape

WORDS = [f"w{i}" for i in range(30)]
ROWS = {
    "prompt": ["w1 w2", "w1 w2", "w3", "w1 w2"],
    "chosen": ["w4 w5", "w4 w5", "w6", "w7"],
    "rejected": ["w7", "w7", "w8 w9 w10", "w4 w5"],
    "number": [0, 0, 1, 0],
}


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """A role's process keeps its log file and its threads for life; this one goes on."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def job(tmp_path: Path) -> ScoringJob:
    tokenizer = make_tokenizer(WORDS)
    shape = ModelShape(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=1, context_length=32)
    for name in ("base", "members/0", "members/1"):
        tokenizer.save_pretrained(tmp_path / name)
    make_model(tokenizer, shape, seed=0).save_pretrained(tmp_path / "base")
    for member in (0, 1):
        model = RewardModel.from_language_model(tmp_path / "base", pooling="last", seed=member, dtype=torch.float32)
        model.save_pretrained(tmp_path / "members" / str(member))
    parquet.write_table(pa.table(ROWS), tmp_path / "texts.parquet", row_group_size=3)
    (tmp_path / "attempts").mkdir()
    return ScoringJob(
        setup=ProcessSetup("scorer", tmp_path / "logs" / "scorer.log", 1, "cpu", "float32", 0, 1, False),
        texts=tmp_path / "texts.parquet",
        number="number",
        templated=False,
        kind="full",
        base=tmp_path / "base",
        members=tmp_path / "members",
        num_members=2,
        pooling="last",
        batch_size=2,
        attempts=tmp_path / "attempts",
        num_workers=1,
    )


def test_a_part_s_scores_are_the_members_own(job: ScoringJob) -> None:
    scorer = StrengthScorer(job)
    answers = [scorer({"part": np.array([part])}).to_pylist() for part in (0, 1)]
    assert [len(answer) for answer in answers] == [1, 1] and [answer[0]["part"] for answer in answers] == [0, 1]
    for member in (0, 1):
        model = RewardModel.from_pretrained(job.members / str(member), dtype=torch.float32)
        for side in ("chosen", "rejected"):
            found = np.concatenate([np.array(answer[0][side]).reshape(-1, 2)[:, member] for answer in answers])
            texts = zip(ROWS["prompt"], ROWS[side], strict=True)
            own = [(encode_prompt(scorer.tokenizer, p), encode_response(scorer.tokenizer, r)) for p, r in texts]
            wanted = score_sequences(model, own, 8, scorer.tokenizer.pad_token_id)
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_what_is_equal_is_computed_once(job: ScoringJob, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = StrengthScorer(job)
    computed: list[int] = []
    scores = scorer.members.scores
    monkeypatch.setattr(scorer.members, "scores", lambda own, *rest: computed.append(len(own)) or scores(own, *rest))
    (answer,) = scorer({"part": np.array([0])}).to_pylist()
    assert computed == [4] and answer["num_sequences"] == 4, "three rows, of which two are equal: four sequences, not six"
    assert np.array(answer["chosen"]).reshape(3, 2)[0].tolist() == np.array(answer["chosen"]).reshape(3, 2)[1].tolist()


def test_what_kills_its_process_every_time_is_not_tried_for_ever(job: ScoringJob) -> None:
    place = job.attempts / "part-00000"
    place.write_bytes(b"." * MAX_DEATHS)  # so many processes began it and said no more
    with attempt(place, 1):
        assert place.stat().st_size == MAX_DEATHS + 1
    assert not place.exists(), "it went well"
    place.write_bytes(b"." * (MAX_DEATHS + 1))
    with pytest.raises(RuntimeError, match=r"part-00000 killed its process 4 times.*strength\.batch_size"), attempt(place, 1):
        pytest.fail("it must not be tried again")


def test_what_is_wrong_with_the_members_is_an_answer(job: ScoringJob) -> None:
    weights = job.members / "1" / "model.safetensors"
    kept = load_file(weights)
    del kept["score.weight"]
    save_file(kept, weights, metadata={"format": "pt"})
    scorer = StrengthScorer(job)
    for part in (0, 1):
        (answer,) = scorer({"part": np.array([part])}).to_pylist()
        assert answer["part"] == part and answer["chosen"] == [] and "score.weight" in answer["refusal"]
        assert str(job.members / "1") in answer["refusal"]


def test_what_is_wrong_with_a_pair_is_an_answer(job: ScoringJob) -> None:
    scorer = StrengthScorer(job)
    scorer.tokenizer.eos_token = None
    (answer,) = scorer({"part": np.array([0])}).to_pylist()
    assert "has no eos_token" in answer["refusal"] and answer["num_sequences"] == 0
