"""Rollouts and scores come back bit for bit, and every sample has an id of its own."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from actors.scorer import Scores
from cluster.journal import Entry, Journal
from cluster.recorded import learned_from, read_rollouts, read_scores, sample_ids, write_rollouts, write_scores
from tokens.records import Prompt, Rollout, Swap


def rollouts() -> list[Rollout]:
    draw = random.Random(0)
    made = []
    for number in range(12):
        prompt = Prompt(f"p{number // 2 % 3}", 'Text "quoted"\nä', (1, 2, 3 + number // 2 % 3), "summaries")
        ids = tuple(draw.randrange(50) for _ in range(3 + number))
        logprobs = tuple(math.log(draw.random()) for _ in ids)
        swaps = (Swap(1, 8), Swap(2, 9)) if number == 5 else ()
        made.append(Rollout(prompt, number % 2, ids, f"text {number}", logprobs, 7, number % 3 > 0, swaps))
    return made


def test_they_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.parquet", rollouts(), sample_ids("run", "0/rollouts 3", rollouts()))
    assert read_rollouts(tmp_path / "r.parquet") == rollouts()
    draw = random.Random(1)
    three = tuple(draw.gauss(0, 1) for _ in range(3))
    scores = Scores((0, 2), tuple((x, x / 3) for x in three), three, three, three, 1, 0)
    write_scores(tmp_path / "s.json", scores)
    assert read_scores(tmp_path / "s.json") == scores


def test_every_sample_has_an_id_of_its_own() -> None:
    """A prompt that comes twice in a batch, the same batch in another step and in another run."""
    batches = [
        sample_ids(run, place, rollouts()) for run in ("a", "b") for place in ("0/rollouts 3", "0/rollouts 4", "1/shifted")
    ]
    assert len({name for ids in batches for name in ids}) == 6 * 12
    assert sample_ids("a", "0/rollouts 3", rollouts()) == batches[0], "it depends on nothing else"


def test_the_journal_says_which_samples_were_learned_from(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (0, 1):
        journal.append(Entry(f"rollouts {step}", {"samples": [f"{step}a", f"{step}b"]}))
        journal.append(Entry(f"step {step}"))
    journal.undo(("step 1",), "went back")
    assert learned_from(journal) == {0: ["0a", "0b"]}
    journal.append(Entry("step 1"))
    assert learned_from(Journal(tmp_path)) == {0: ["0a", "0b"], 1: ["1a", "1b"]}
    journal.append(Entry("step 2"))
    with pytest.raises(ValueError, match="step 2 was learned from rollouts that are not recorded"):
        learned_from(journal)
    journal.append(Entry("rollouts 2", {"samples": ["0a"]}))
    with pytest.raises(ValueError, match="sample 0a was learned from twice"):
        learned_from(journal)
