"""Held-out pairs of their own (``data.validation``), as every command is given them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from cluster.inputs import Source, open_source
from cluster.load_config import load_config
from cluster.strength_parts import plan_parts, write_texts
from preferences.sets import with_equal_columns
from tests.cluster.command import TINY
from tokens.errors import UserError

GIVEN = [{"prompt": f"say {i}", "chosen": f"word {i} is good", "rejected": f"no {i}", "score": i} for i in range(60)]
CLEAN = [{"prompt": f"tell {i}", "chosen": f"word {i}", "rejected": f"none {i}", "label": i % 2} for i in range(10)]
CLEAN.append({"prompt": "say 7", "chosen": "other word", "rejected": "no other", "label": -1})


def source_of(folder: Path, held_out: Sequence[dict[str, Any]], *overrides: str) -> Source:
    for name, rows in (("d.jsonl", GIVEN), ("v.jsonl", held_out)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.preferences", str(folder / "d.jsonl"), "--data.validation", str(folder / "v.jsonl")]
    made = ["--evaluation.judge", "ensemble", "--sft.shape.vocab_size", "300"]
    return open_source(load_config(TINY, [*data, *made, *overrides]), folder / "storage")


def test_a_run_trains_on_all_pairs_and_judges_on_the_held_out_prompts(tmp_path: Path) -> None:
    inputs = source_of(tmp_path, CLEAN).load()
    assert [pair.id for pair in inputs.pairs] == [str(i + 1) for i in range(60)]
    assert [pair.id for pair in inputs.validation] == [f"validation-{i + 1}" for i in range(11)]
    judged = {prompt.text for prompt in inputs.eval_prompts}
    assert judged == {row["prompt"] for row in CLEAN}
    for prompts in (inputs.meta_prompts, inputs.policy_prompts):
        assert {prompt.text for prompt in prompts} == {row["prompt"] for row in GIVEN} - {"say 7"}, "none that is judged on"
    assert inputs.stopping == {} and len(inputs.training) == 60


def test_what_early_stopping_goes_by_belongs_to_the_run(tmp_path: Path) -> None:
    stop = ("--reward.patience", "1", "--reward.evaluate_every", "2", "--reward.stop_on", "relabelled")
    inputs = source_of(tmp_path, CLEAN, *stop).load()
    (found,) = inputs.stopping.items()
    assert found[0] == "relabelled" and [pair.id for pair in found[1]] == [f"validation-{i + 1}" for i in range(10)]
    turned = {pair.id: pair for pair in found[1]}["validation-1"]
    assert (turned.chosen_ids, turned.rejected_ids) == (inputs.validation[0].rejected_ids, inputs.validation[0].chosen_ids)
    relabelled = [row | {"label": 1} for row in CLEAN]
    assert source_of(tmp_path, relabelled, *stop).load().fingerprint != inputs.fingerprint
    plain = source_of(tmp_path, CLEAN).load().fingerprint
    assert source_of(tmp_path, relabelled).load().fingerprint == plain, "labels that nothing goes by may change"


def test_too_few_prompts_to_judge_on_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only 3 prompts are held out .* use a larger data\.validation or add prompts"):
        source_of(tmp_path, CLEAN[:3])


def test_strengths_of_both_are_written_to_one_file(tmp_path: Path) -> None:
    training, validation = source_of(tmp_path, CLEAN).preferences()
    zeros = [np.zeros(len(pairs), dtype=np.int64) for pairs in (training, validation)]
    planned = [(name, p, z, z == 0) for name, p, z in zip(("train", "validation"), (training, validation), zeros, strict=True)]
    parts = plan_parts(planned, 32)
    write_texts(
        tmp_path / "t.parquet", parts, dict(zip(("train", "validation"), with_equal_columns(training, validation), strict=True))
    )
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(rows) == 71 and len({row["id"] for row in rows}) == 71
    assert {row["label"] for row in rows if not row["id"].startswith("validation-")} == {None}
    assert {row["score"] for row in rows if row["id"].startswith("validation-")} == {None}
