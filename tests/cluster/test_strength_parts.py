"""Which pairs are scored together, and how many fits go on together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from datasets import Dataset
from pyarrow import parquet

from actors.config import Share
from cluster.strength_parts import NUMBER, fold_of, folds_of, plan_parts, write_texts
from cluster.tasks import share_of_a_fit
from preferences.sets import PreferenceSet
from tokens.errors import UserError


def pairs(texts: list[tuple[str, str, str]]) -> PreferenceSet:
    prompts, chosen, rejected = zip(*texts, strict=True)
    ids = [f"id-{i}" for i in range(len(texts))]
    columns = {"id": ids, "prompt": prompts, "chosen": chosen, "rejected": rejected, "domain": [""] * len(texts)}
    table = {name: pa.array(list(values), pa.large_string()) for name, values in columns.items()}
    return PreferenceSet(Dataset(pa.table(table | {"stars": pa.array(range(len(texts)))})), "made", "explicit")


def planned(given: PreferenceSet, size: int, folds: np.ndarray | None = None, kept: np.ndarray | None = None):
    folds = np.zeros(len(given), dtype=np.int64) if folds is None else folds
    kept = np.ones(len(given), dtype=bool) if kept is None else kept
    return plan_parts([("train", given, folds, kept)], size)


REPEATED = [("p", "a", "b"), ("p", "c", "b"), ("p", "a", "b"), ("q", "a", "b"), ("p", "c", "b"), ("p", "b", "a"), ("p", "a", "b")]


def test_pairs_of_equal_text_are_one_pair_and_share_a_part() -> None:
    parts = planned(pairs(REPEATED), 2)
    assert [(part.rows.tolist(), part.numbers.tolist(), part.num_distinct) for part in parts] == [
        ([0, 2, 6, 1, 4], [0, 0, 0, 1, 1], 2),
        ([3, 5], [0, 1], 2),  # another prompt, and the pair turned round: neither is equal to the first
    ]


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_every_row_has_one_place(size: int) -> None:
    given = pairs([(f"prompt {i % 7}", f"yes {i % 11}", f"no {i % 3}") for i in range(60)])
    parts = planned(given, size)
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(60))
    assert [part.index for part in parts] == list(range(len(parts)))
    assert all(part.num_distinct == size for part in parts[:-1]) and 1 <= parts[-1].num_distinct <= size
    assert all(set(part.numbers.tolist()) == set(range(part.num_distinct)) for part in parts)


def test_folds_and_splits_are_not_mixed_and_what_does_not_fit_is_left_out() -> None:
    given = pairs(REPEATED)
    folds, kept = np.array([0, 0, 0, 1, 0, 0, 0]), np.array([True] * 5 + [False, True])
    others = pairs(REPEATED[:1])
    parts = plan_parts([("train", given, folds, kept), ("validation", others, np.array([0]), np.array([True]))], 10)
    assert [(part.fold, part.split, part.rows.tolist()) for part in parts] == [
        (0, "train", [0, 2, 6, 1, 4]),
        (0, "validation", [0]),
        (1, "train", [3]),
    ]


def test_the_texts_file_has_a_row_group_a_part_and_every_column(tmp_path: Path) -> None:
    given = pairs(REPEATED)
    parts = planned(given, 2)
    write_texts(tmp_path / "texts.parquet", parts, {"train": given})
    file = parquet.ParquetFile(tmp_path / "texts.parquet")
    assert file.num_row_groups == 2 and [path.name for path in tmp_path.iterdir()] == ["texts.parquet"]
    first = file.read_row_group(0)
    assert first["id"].to_pylist() == ["id-0", "id-2", "id-6", "id-1", "id-4"]
    assert first["stars"].to_pylist() == [0, 2, 6, 1, 4] and first[NUMBER].to_pylist() == [0, 0, 0, 1, 1]


def test_a_fold_is_the_prompt_s_whatever_the_order() -> None:
    given = pairs([(f"prompt {i % 40}", f"yes {i}", "no") for i in range(120)])
    folds = folds_of(given, 3, 7)
    by_prompt = {prompt: set(folds[np.array(given.rows["prompt"]) == prompt]) for prompt in set(given.rows["prompt"])}
    assert all(len(found) == 1 for found in by_prompt.values())
    assert sorted(np.bincount(folds)) == sorted(np.bincount(folds, minlength=3)) and np.bincount(folds).min() > 15
    assert fold_of("prompt 3", 3, 7) == folds[3] and (folds_of(given, 1, 7) == 0).all()
    assert (folds_of(given, 3, 8) != folds).any()


def test_too_few_prompts_for_the_folds() -> None:
    with pytest.raises(UserError, match=r"strength.folds is 5, but the 2 distinct prompts of made leave \d of the folds empty"):
        folds_of(pairs(REPEATED), 5, 0)


def test_a_fit_asks_for_the_cores_that_it_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in (2.0, 4.0)]
    nodes += [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 5.0})
    asked = [share_of_a_fit(Share(num_cpus=0.25, threads=threads)).num_cpus for threads in (1, 2, 8)]
    assert asked == [1, 2, 4], "no more than the largest living machine has: a task would wait for ever"
    assert share_of_a_fit(Share(num_cpus=3, threads=2)).num_cpus == 3
    assert share_of_a_fit(Share(num_cpus=0.25, num_gpus=1, threads=8)).num_cpus == 0.25
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    assert share_of_a_fit(Share(num_cpus=0.25, threads=8)).num_cpus == 1, "another job holds the rest"
    monkeypatch.setattr(ray, "nodes", lambda: nodes[2:])
    assert share_of_a_fit(Share(num_cpus=0.25, threads=2)).num_cpus == 0.25
