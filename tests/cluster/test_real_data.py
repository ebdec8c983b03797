"""The shipped recipe for real human preferences, on real transcripts; and towards a domain without preferences."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cluster.data_source import DataSource
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from evaluation.records import EvaluationRow, MetaRow, read_rows
from tests.cluster.command import HELD_OUT_DOMAINS, ROOT, TINY, Command

HH_TINY = ROOT / "configs" / "hh_tiny.yaml"
ENOUGH = ("--evaluation.held_out_fraction", "0.4")
"""A batch of so few pairs for the reward models that only judge."""


@pytest.fixture(scope="module")
def transcripts(shared_data: Path) -> Path:
    return shared_data / "hh_helpful"


def test_two_rounds_on_real_transcripts(command: Command, transcripts: Path) -> None:
    shorter = ("--sft.epochs", "1", "--policy.steps_per_round", "2", "--policy.critic_warmup_steps", "1")
    done = command("run", str(HH_TINY), "--data.preferences", str(transcripts), *shorter, seconds=580)
    assert done.returncode == 0, done.stdout + done.stderr
    run = command.storage / "runs" / "hh_tiny"
    state = json.loads((run / "ledger.json").read_text())
    assert [entry["round"] for entry in state["rounds"]] == [0, 1]
    assert sum(state["rounds"][0]["dropped"]["preferences"].values()) > 0, "the transcripts hold pairs that cannot be used"
    rows = read_rows(run / "rounds" / "round_001" / "evaluation.parquet", EvaluationRow)
    assert all(row.gold is None for row in rows) and "Human:" in rows[0].prompt
    assert state["rounds"][0]["evaluation"]["judge"] == "held_out" and all(row.held_out is not None for row in rows)
    assert "nothing is trained by" in (run / "report.html").read_text(), "the report says who judges"


def test_held_out_prompts_are_in_no_training_data(transcripts: Path, tmp_path: Path) -> None:
    config = load_config(HH_TINY, ["--data.preferences", str(transcripts), "--data.max_pairs", "300", *ENOUGH])
    inputs = DataSource(config, tmp_path).load()
    held_out = {p.token_ids for p in inputs.eval_prompts}
    assert held_out and not held_out & {p.token_ids for p in (*inputs.policy_prompts, *inputs.meta_prompts)}
    assert not held_out & {p.prompt_ids for p in inputs.pairs}
    assert {p.prompt_ids for p in inputs.validation} <= held_out


def test_prompts_of_their_own_do_not_bring_held_out_ones_back(transcripts: Path, tmp_path: Path) -> None:
    words = ["--data.preferences", str(transcripts), "--data.max_pairs", "200", *ENOUGH]
    defaults = DataSource(load_config(HH_TINY, words), tmp_path / "cache").load()
    rows = [{"prompt": p.text} for p in (*defaults.policy_prompts, *defaults.eval_prompts)]
    own = tmp_path / "prompts.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for keys in (("meta.prompts",), ("meta.prompts", "policy.prompts")):
        mine = [part for key in keys for part in (f"--{key}", str(own))]
        inputs = DataSource(load_config(HH_TINY, [*words, *mine]), tmp_path / "cache").load()
        judged = {p.text for p in inputs.eval_prompts}
        assert judged and not judged & {p.text for p in (*inputs.meta_prompts, *inputs.policy_prompts)}
        assert len(inputs.meta_prompts) == len(rows) - len(judged)


def test_prompts_of_a_domain_without_preferences(
    pool_run: tuple[Path, subprocess.CompletedProcess[str]], command: Command
) -> None:
    config = load_config(TINY, list(HELD_OUT_DOMAINS))
    source = SandboxSource(config, command.storage / "cache")
    inputs = source.load()
    held_out = set(source.world.held_out_domains)
    assert {p.domain for p in inputs.pairs} <= set(source.world.train_domains)
    assert {p.domain for p in (*inputs.meta_prompts, *inputs.policy_prompts, *inputs.eval_prompts)} == held_out
    shifted = read_rows(pool_run[0] / "rounds" / "round_000" / "meta_rollouts.parquet", MetaRow)
    assert {row.prompt_id for row in shifted} <= {p.id for p in inputs.meta_prompts}
