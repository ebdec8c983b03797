"""What benchmarks print and write, at a size at which nothing can be learned from it."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import members, strength_memory
from benchmarks.faults.writes import STATE_BYTES, Kept
from benchmarks.ratios import checkpoints
from benchmarks.ratios.catalogue import CASES
from benchmarks.ratios.rows import Settings


@pytest.mark.slow
def test_memory_of_pairs_as_records_and_as_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "memory.jsonl"
    tuples, store, parts = strength_memory.main(["--pairs", "3000"], results)
    assert [json.loads(line) for line in results.read_text().splitlines()] == [tuples, store, parts]
    assert {row["num_pairs"] for row in (tuples, store, parts)} == {3000} and parts["what"] == "parts"
    assert tuples["bytes_per_pair"] > 1000 > 2 * store["bytes_per_pair"], "60 numbers of Python's against 60 of four bytes"
    assert "what store, num_pairs 3000" in capsys.readouterr().out


def test_members_over_seeds_have_a_mean_and_a_range() -> None:
    plain: dict[str, Any] = dict.fromkeys(members.SHOWN, 1.0)
    rows = [plain | {"what": "full", "score_ratio": None}, plain | {"what": "full"}]
    rows += [plain | {"what": "heads", "train_ratio": ratio} for ratio in (0.25, 0.35)]
    lines = members.table(rows).splitlines()
    assert lines[0] == "| | full | heads |"
    assert "| train_ratio | 1.000 [1.000, 1.000] | 0.300 [0.250, 0.350] |" in lines
    assert "| score_ratio | - | 1.000 [1.000, 1.000] |" in lines


def test_older_rows_of_members_are_rows_of_one_seed() -> None:
    rows = [json.loads(line) for line in members.RESULTS.read_text().splitlines()]
    assert all(set(members.SHOWN) <= row.keys() for row in rows)
    assert members.table(rows).splitlines()[0].startswith("| | full")


def test_a_file_that_was_cut_short_is_told_from_a_checkpoint_that_was(tmp_path: Path) -> None:
    with mmap.mmap(-1, STATE_BYTES) as state:
        plain, kept = checkpoints.InPlace(tmp_path / "plain", state), Kept(tmp_path / "kept", state)
        for each in (plain, kept):
            each.write(1)
            each.write(2)
            assert each.read() == 2
        with (plain.folder / "state.pt").open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) // 2)
        newest = kept.folder / "after_0002_steps" / "learner.safetensors"
        os.truncate(newest, newest.stat().st_size // 2)
        with pytest.raises(ValueError, match="zip"):
            plain.read()
        assert kept.read() == 1, "the one before it"


def test_what_a_checkpoint_costs_is_beside_what_others_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(kept: Kept, kills: int, rng: object) -> dict[str, float]:  # its processes are forks, which want one thread
        return {"unreadable": kills if isinstance(kept, checkpoints.InPlace) else 0}

    monkeypatch.setattr(checkpoints, "kill_writes", ruined)
    plain, synced = checkpoints.measure(Settings(1, 1, small=True))
    assert {(each.id, each.case) for each in (plain, synced)} == {case.place for case in CASES if case.id == "C9"}
    assert plain.equality == "the same bits come back; unreadable after 2 kills: 0, and 2 of torch.save"
    assert plain.ratio > 0 and plain.limit is not None and plain.threads == 1
