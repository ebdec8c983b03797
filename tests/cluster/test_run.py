"""The whole loop on real Ray and real vLLM: what a run leaves behind, and what the same command does next."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster.draft import point_of
from cluster.load_config import load_config
from cluster.run_directory import config_sha256
from evaluation.records import EvaluationRow, MetaRow, read_rows
from evaluation.timeline import DRIVER, read_timeline
from tests.cluster.command import ROOT, TINY, Command

TinyRun = tuple[Path, "subprocess.CompletedProcess[str]"]


def ledger(run: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    return json.loads((run / "ledger.json").read_text())


def rows(run: Path, phase: str) -> list[dict[str, float]]:
    return [row for line in (run / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["phase"] == phase]


def test_five_roles_ran_as_separate_processes_and_none_is_left(tiny_run: TinyRun) -> None:
    processes = json.loads((tiny_run[0] / "processes.json").read_text())
    assert processes.keys() == {"driver", "rollout-0", "reward-0", "scorer-0", "learner-0"}
    pids = [process["pid"] for process in processes.values()]
    assert len(set(pids)) == 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    storage = str(tiny_run[0].parents[1])
    assert not [p.pid for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("RONDO_STORAGE") == storage]


def test_every_round_is_committed_with_what_the_issue_names(tiny_run: TinyRun) -> None:
    run, done = tiny_run
    entries = ledger(run)["rounds"]
    assert [entry["round"] for entry in entries] == [0, 1]
    for entry in entries:
        assert entry["choices"]["policy.reference"] == "sft" and entry["choices"]["scorer.refresh"] == "never"
        assert entry["reward"]["J_after"] > entry["reward"]["J_before"], "the ascent must raise J"
        assert {"sample_meta", "reward", "sample", "score", "policy", "sync", "evaluate", "commit"} <= entry["seconds"].keys()
        folder = run / "rounds" / f"round_{entry['round']:03d}"
        AutoModelForCausalLM.from_pretrained(folder / "policy")
        AutoModelForSequenceClassification.from_pretrained(folder / "reward")
        assert len(read_rows(folder / "evaluation.parquet", EvaluationRow)) == 24
        rows = read_rows(folder / "meta_rollouts.parquet", MetaRow)
        assert len(rows) == 32 * 3 and sum(row.kept_back for row in rows) == 3 * 3, "a tenth of the prompts saw no ascent"
    assert entries[0]["policy_version"] == 2 and entries[1]["policy_version"] == 4
    assert {"config.yaml", "versions.json", "report.html", "tensorboard", "logs"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "versions.json").read_text())["vllm"] is not None
    assert "round 1" in done.stdout and "report.html" in done.stdout


def test_the_engine_agrees_with_the_learner_after_every_sync(tiny_run: TinyRun) -> None:
    gaps = [row["policy/sampler_gap"] for row in rows(tiny_run[0], "policy")]
    assert len(gaps) == 4 and max(gaps) < 1e-4
    assert {(row["policy/lag"], row["policy/swapped"]) for row in rows(tiny_run[0], "policy")} == {(0.0, 0.0)}


def test_every_rollout_carries_the_version_that_sampled_it(tiny_run: TinyRun) -> None:
    second = read_rows(tiny_run[0] / "rounds" / "round_001" / "meta_rollouts.parquet", MetaRow)
    assert {row.policy_version for row in second} == {2}, "S_1 comes from the policy that round 0 committed"


def test_policy_and_reward_model_change_from_round_to_round(tiny_run: TinyRun) -> None:
    for name in ("policy", "reward"):
        first, second = (load_file(tiny_run[0] / "rounds" / f"round_{k:03d}" / name / "model.safetensors") for k in (0, 1))
        assert any(not first[key].equal(second[key]) for key in first), name


def test_engine_logs_go_to_files_not_to_the_terminal(tiny_run: TinyRun) -> None:
    run, done = tiny_run
    assert "vllm" in (run / "logs" / "rollout-0.log").read_text().lower()
    assert "vllm" not in (done.stdout + done.stderr).lower()


def test_the_same_command_again_says_that_all_is_done(tiny_run: TinyRun, command: Command) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tiny_run[0] / "rounds").rglob("*")}
    again = command("run", str(TINY), seconds=120)
    assert again.returncode == 0 and "rounds are done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tiny_run[0] / "rounds").rglob("*")} == before


def test_other_data_under_the_same_config_is_refused(tiny_run: TinyRun, command: Command) -> None:
    copy = tiny_run[0].parent / "tiny-other-data"
    shutil.copytree(tiny_run[0], copy)
    state = json.loads((copy / "ledger.json").read_text())
    state["config_sha256"] = config_sha256(load_config(TINY, ["--name", "tiny-other-data"]))
    state["rounds"] = state["rounds"][:1]
    state["start"]["data_sha256"] = "of other pairs"
    (copy / "ledger.json").write_text(json.dumps(state))
    logs = {path: path.stat().st_mtime_ns for path in (copy / "logs").iterdir()}
    done = command("run", str(TINY), "--name", "tiny-other-data")
    assert done.returncode == 2 and "not those that" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (copy / "logs").iterdir()} == logs, "no role was started"


def test_ctrl_c_saves_the_round_and_leaves_no_process(command: Command, tmp_path: Path) -> None:
    environment = dict(os.environ) | {"RONDO_STORAGE": str(command.storage)}
    arguments = ["run", str(TINY), "--name", "tiny-stopped", "--policy.steps_per_round", "2000"]
    log = tmp_path / "log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    run = command.storage / "runs" / "tiny-stopped"
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and rows(run, "policy")):
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    processes = json.loads((run / "processes.json").read_text())
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
    try:
        assert driver.wait(timeout=60) == 130, log.read_text()
    finally:
        driver.kill()  # nothing if it has ended; else it would disturb every test that follows
        driver.wait()
    gone = time.monotonic() + 20
    while time.monotonic() < gone and any(psutil.pid_exists(p["pid"]) for p in processes.values()):
        time.sleep(0.2)
    assert not any(psutil.pid_exists(p["pid"]) for p in processes.values())
    assert ledger(run)["rounds"] == []
    assert [path.name for path in (run / "rounds").iterdir()] == [".round_000.partial"]
    paused = point_of(run / "rounds" / ".round_000.partial")
    assert paused is not None and [row["step"] for row in rows(run, "policy")] == list(range(paused.steps))
    said = f"stopped: round 1 is saved after step {paused.steps} of 2000; the same command continues there"
    assert said in log.read_text() and "Traceback" not in log.read_text()


def test_two_engines_share_the_prompts_and_sample_ahead(pool_run: TinyRun) -> None:
    run, done = pool_run
    assert "policy.max_lag is 1" in done.stdout
    lags = [row["policy/lag"] for row in rows(run, "policy")]
    assert lags[0] == 0.0 and all(0.0 < lag <= 1.0 for lag in lags[1:]), lags
    spans = read_timeline(run / "timeline.jsonl")
    sampled = [span for span in spans if span.what == "sample" and span.who != DRIVER]
    assert Counter((span.who, span.step) for span in sampled) == {(f"rollout-{i}", step): 1 for i in (0, 1) for step in range(4)}
    learned = [span for span in spans if span.what == "policy" and span.who == "learner-0" and span.step is not None]
    assert any(a.start < b.end and b.start < a.end for a in sampled for b in learned), "the pool works while the learner does"
    assert 'id="figure-timeline"' in (run / "report.html").read_text()
    assert {"rollout-0", "rollout-1"} <= json.loads((run / "processes.json").read_text()).keys()
    assert len(read_rows(run / "rounds" / "round_000" / "meta_rollouts.parquet", MetaRow)) == 16 * 3
