"""`strength` on real Ray: one run that loses a process, and what the same command does next."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.dataset as ds
import pytest
import torch
from rich.console import Console as RichConsole
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import members
from cluster.config import RunConfig
from cluster.console import Console
from cluster.lineage import lineage_of
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.strength import strength
from cluster.strength_parts import fold_of
from cluster.strength_scores import errors_to
from preferences.denoise import read_pairs, undo
from preferences.encode import encode_prompt, encode_response
from preferences.strength import read_strengths
from preferences.swap import as_table
from rm.batches import score_sequences
from rm.model import RewardModel
from tests.cluster.command import TINY, Command
from tests.cluster.test_reward import encoder, write_data
from tokens.errors import UserError

pytestmark = pytest.mark.filterwarnings(  # Ray's own
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
MEMBERS = ("--strength.num_members", "2", "--strength.rows_per_block", "8", "--reward.epochs", "2")
NAMED = ("--name", "strong")


@dataclass(frozen=True)
class Done:
    """A finished run, and what it printed."""

    path: Path
    printed: str

    @property
    def card(self) -> dict:
        return json.loads((self.path / "card.json").read_text())


def measure(*overrides: str) -> Done:
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), width=140, soft_wrap=True)
    path = strength(load_config(TINY, list(overrides)), console)
    return Done(path, console.rich.file.getvalue())


@pytest.fixture(scope="module", autouse=True)
def _storage(command: Command) -> Iterator[None]:
    """The storage of the other runs: they have built the tiny world, or will find it built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RONDO_STORAGE", str(command.storage))
        patch.delenv("RAY_ADDRESS", raising=False)
        handler = signal.getsignal(signal.SIGTERM)
        yield
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def killed() -> list[int]:
    """Numbers of the scoring processes that were killed."""
    return []


def processes_of(log: Path) -> list[int]:
    """Numbers of the processes that wrote a log file, in their order."""
    return [int(number) for number in re.findall(r"process (\d+), \d+ threads", log.read_text())] if log.is_file() else []


@pytest.fixture(scope="module")
def run(command: Command, killed: list[int]) -> Done:
    """Two members, ten parts or more. The process that trains member 1 is killed at its first step, and the one that scores once
    the first part is there. The reward trainer's ranks play no part."""
    path = command.storage / "strengths" / "strong"

    over = threading.Event()

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    def kill_two() -> None:
        training = path / "logs" / "member-1.log"
        while not (training.is_file() and ": step 1 of " in training.read_text()):
            if over.wait(0.005):
                return
        kill(processes_of(training)[0])
        while not list(path.glob("strengths/part-*.parquet")):
            if over.wait(0.005):
                return
        (log,) = path.glob("logs/scorer-*.log")
        kill(int(log.stem.removeprefix("scorer-")))

    watcher = threading.Thread(target=kill_two)
    watcher.start()
    try:
        return measure(*MEMBERS, *NAMED, "--resources.reward.num_ranks", "2")
    finally:
        over.set()
        watcher.join()


def rows_of(path: Path) -> dict[str, np.ndarray]:
    table = ds.dataset([str(part) for part in sorted(path.glob("strengths/part-*.parquet"))]).to_table()
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


def scores_by(folder: Path, prompts: list[str], responses: list[str]) -> np.ndarray:
    """What one member says, asked alone."""
    model, tokenizer = RewardModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    pairs = [(encode_prompt(tokenizer, p), encode_response(tokenizer, r)) for p, r in zip(prompts, responses, strict=True)]
    return score_sequences(model, pairs, 64, tokenizer.pad_token_id).numpy()


def test_a_killed_process_costs_nothing_but_time(run: Done, killed: list[int]) -> None:
    assert len(killed) == 2 and not any(psutil.pid_exists(pid) for pid in killed)
    trained, again = processes_of(run.path / "logs" / "member-1.log")
    assert trained == killed[0] != again, "the member was trained from its start by another process"
    assert len(processes_of(run.path / "logs" / "member-0.log")) == 1, "the other member's fit went on"
    assert {member.name for member in (run.path / "members" / "0").iterdir()} == {"0", "1"}
    logs = list(run.path.glob("logs/scorer-*.log"))
    assert len(logs) == 2, "another process took over"
    rows = rows_of(run.path)
    assert len(set(rows["id"])) == len(rows["id"]) == 128 + 32
    assert run.card["num_pairs"] == 160 and not (run.path / ".attempts.partial").is_file()


def test_strengths_are_the_members_differences(run: Done) -> None:
    rows, found = rows_of(run.path), read_strengths(run.path)
    for member in (0, 1):
        for side, scores in (("chosen", found.chosen), ("rejected", found.rejected)):
            wanted = scores_by(run.path / "members" / "0" / str(member), rows["prompt"].tolist(), rows[side].tolist())
            np.testing.assert_allclose(scores[:, member], wanted, atol=1e-5)
    margin = np.array(rows["chosen score list"].tolist()) - np.array(rows["rejected score list"].tolist())
    np.testing.assert_allclose(rows["mean preference difference"].astype(float), margin.mean(1), atol=1e-9)
    np.testing.assert_allclose(rows["std preference difference"].astype(float), margin.std(1), atol=1e-9)
    assert {"gold_chosen", "gold_rejected", "flipped", "domain", "split"} <= rows.keys()
    assert sorted(set(rows["split"])) == ["train", "validation"]


def test_members_are_reward_models_that_differ_in_head_and_order(run: Done) -> None:
    weights = [load_file(run.path / "members" / "0" / str(member) / "model.safetensors") for member in (0, 1)]
    assert weights[0].keys() == weights[1].keys() and not weights[0]["score.weight"].equal(weights[1]["score.weight"])
    for member in (0, 1):
        AutoModelForSequenceClassification.from_pretrained(run.path / "members" / "0" / str(member))
    kept = lineage_of(run.path / "members" / "0" / "1")
    assert kept is not None and 0 < len(kept.pairs) <= (rows_of(run.path)["split"] == "train").sum()


def test_the_card_says_what_it_cost_and_whether_it_found_the_wrong_labels(run: Done) -> None:
    card, rows = run.card, rows_of(run.path)
    assert card["kind"] == "strength" and card["members"] == "full" and card["folds"] == 1 and card["num_members"] == 2
    assert card["seconds"]["train"] > 0 and card["scored"]["pairs"] == 160
    assert card["memory_bytes"] > card["memory_above_start_bytes"] > 0
    model = run.path / "members" / "0" / "0" / "model.safetensors"
    assert card["weight_bytes"] == 2 * model.stat().st_size
    train = rows["split"] == "train"
    mean = rows["mean preference difference"].astype(float)[train]
    wrong = (rows["gold_chosen"].astype(float) < rows["gold_rejected"].astype(float))[train]
    ranked = np.mean([(low < high) + 0.5 * (low == high) for low in mean[wrong] for high in mean[~wrong]])
    assert card["splits"]["train"]["auroc_wrong"] == pytest.approx(ranked)
    assert card["splits"]["train"]["negative"] == pytest.approx((mean < 0).mean())
    assert card["splits"]["validation"]["auroc_wrong"] is None, "validation labels are the truth"


def test_the_terminal_shows_members_speed_and_a_table_and_no_noise(run: Done) -> None:
    assert "num_ranks is 2 and plays no part here: each member is trained whole in one process" in run.printed
    for words in ("member-0: 128 pairs", "member-1: 128 pairs", "train 2 of 2 fits", "score pairs", "pairs/s", "AUROC"):
        assert words in run.printed, run.printed
    assert "core_worker" not in run.printed and (run.path / "logs" / "ray-data.log").is_file()


def test_what_ray_writes_to_standard_error_goes_to_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ray says some things once a process: a run may have nothing in the file."""
    with errors_to(tmp_path / "ray-data.log"):
        os.write(2, b"core_worker.cc: noise\n")
    os.write(2, b"ours\n")
    assert (tmp_path / "ray-data.log").read_text() == "core_worker.cc: noise\n" and capfd.readouterr().err == "ours\n"


def test_the_same_command_again_scores_only_what_is_missing(run: Done) -> None:
    copy = run.path.with_name("tiny-resumed")
    shutil.copytree(run.path, copy)
    before = rows_of(copy)
    for name in ("card.json", "strengths/part-00003.parquet"):
        (copy / name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (*copy.glob("members/*/*/*"), *copy.glob("strengths/part-*"))}
    (copy / "strengths" / ".part-00003.parquet.partial").write_text("half")
    again = measure(*MEMBERS, "--name", "tiny-resumed", "--strength.batch_size", "7", "--data.denoise.method", "flip")
    assert again.card["scored"]["pairs"] == 8 and again.card["num_pairs"] == 160
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    after = rows_of(copy)
    now, then = (np.array(rows["chosen score list"].tolist()) for rows in (after, before))
    np.testing.assert_allclose(now, then, atol=1e-5)
    assert not list(copy.glob("strengths/.*")) and "2 of 2 fits are there already" in again.printed


def test_a_finished_run_is_left_alone_and_another_config_is_refused(run: Done) -> None:
    assert "nothing to do" in measure(*MEMBERS, *NAMED).printed
    with pytest.raises(UserError, match=r"belongs to another config \(reward.lr: 0.001 there, 0.002 here\)"):
        measure(*MEMBERS, *NAMED, "--reward.lr", "0.002")
    with pytest.raises(UserError, match=r"strength\.num_members: 2 there, 3 here"):
        measure(*MEMBERS, *NAMED, "--strength.num_members", "3")


def test_other_pairs_under_the_same_config_are_refused(run: Done) -> None:
    copy = run.path.with_name("tiny-other-pairs")
    shutil.copytree(run.path, copy)
    (copy / "card.json").unlink()
    begun = json.loads((copy / "begun.json").read_text())
    (copy / "begun.json").write_text(json.dumps(begun | {"data_sha256": "of other pairs"}))
    with pytest.raises(UserError, match="preference pairs are not those that"):
        measure(*MEMBERS, "--name", "tiny-other-pairs")


def test_what_cannot_be_is_refused_before_anything_is_written(run: Done) -> None:
    with pytest.raises(UserError, match=r"strength\.folds is 5000, but the .* distinct prompts"):
        measure(*MEMBERS, "--name", "tiny-refused", "--strength.folds", "5000")
    assert not run.path.with_name("tiny-refused").exists()


def test_strengths_then_a_reward_model_then_a_run_on_the_same_files(run: Done, command: Command) -> None:
    """The chain of three commands: the members are trained once, and both successors flip the pairs of lowest strength."""
    chained = [*MEMBERS, *NAMED, "--data.denoise.method", "flip+margin"]
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    for words in (("reward",), ("run", "--rounds.num_rounds", "1", "--policy.steps_per_round", "1")):
        done = command(words[0], str(TINY), *words[1:], *chained)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "come first" not in done.stdout and f"26 flip, 128 margin; by {run.path}" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before, "strengths are not trained, scored or written again"

    mu = {row["id"]: row["mean preference difference"] for row in ds.dataset(run.path / "strengths").to_table().to_pylist()}
    source = SandboxSource(load_config(TINY, []), command.storage / "cache", policy=False)
    train, _ = source.preferences()
    for folder in (command.storage / "rewards" / "strong", command.storage / "runs" / "strong" / "start"):
        pairs = read_pairs(folder)
        rows = list(pairs.rows)
        flipped = {row["id"] for row in rows if row["denoise"] == "flip+margin"}
        assert flipped == set(sorted((row["id"] for row in rows), key=lambda id_: (mu[id_], id_))[:26])
        for row in rows:
            assert row["margin"] == row["strength"] == (-mu[row["id"]] if row["id"] in flipped else mu[row["id"]])
        assert as_table(undo(pairs).rows) == as_table(train.rows)
    entry = json.loads((command.storage / "runs" / "strong" / "ledger.json").read_text())["rounds"][0]
    assert entry["denoised"]["flip"] == 26 and entry["denoised"]["margin"] == 128


@pytest.mark.slow
def test_a_member_whose_scores_overflow_is_named_with_the_pair(run: Done) -> None:
    copy = run.path.with_name("tiny-overflow")
    shutil.copytree(run.path, copy)
    for part in copy.glob("strengths/part-*"):
        part.unlink()
    (copy / "card.json").unlink()
    weights = load_file(copy / "members" / "0" / "1" / "model.safetensors")
    weights["score.weight"].fill_(torch.finfo(torch.float32).max)  # finite itself: not refused where it is read
    save_file(weights, copy / "members" / "0" / "1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"member 1 .*train-0"):
        measure(*MEMBERS, "--name", "tiny-overflow")
    assert not list(copy.glob("strengths/*.parquet")) and not (copy / "card.json").exists()


def test_what_is_wrong_with_a_member_is_the_users_error(run: Done) -> None:
    copy = run.path.with_name("tiny-broken")
    shutil.copytree(run.path, copy)
    (copy / "card.json").unlink()
    (copy / "strengths" / "part-00002.parquet").unlink()
    weights = copy / "members" / "0" / "1" / "model.safetensors"
    kept = load_file(weights)
    del kept["score.weight"]
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"members/0/1\b.*score\.weight"):
        measure(*MEMBERS, "--name", "tiny-broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "scores"], "it would end the process by asking Ray"


def test_an_encoder_scores_with_the_tokens_that_it_was_trained_with(command: Command, tmp_path: Path) -> None:
    """Its tokenizer has CLS and SEP only, which stand for BOS and EOS."""
    words = write_data(tmp_path / "d.jsonl")
    base = encoder(tmp_path / "bert", words)
    data = ("--reward.base", str(base), "--data.preferences", str(tmp_path / "d.jsonl"))
    done = measure("--name", "tiny-bert", "--strength.num_members", "2", *data)
    rows = rows_of(done.path)
    assert len(rows["id"]) == 120
    for member in (0, 1):
        folder = done.path / "members" / "0" / str(member)
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
        for row in (0, 77):
            text = f"{rows['prompt'][row]} {rows['chosen'][row]}"
            ids = [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
            with torch.no_grad():
                score = float(model(torch.tensor([ids])).logits)
            assert rows["chosen score list"].tolist()[row][member] == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_cross_fitted_pairs_are_scored_by_members_that_did_not_see_them(run: Done) -> None:
    done = measure("--name", "tiny-folds", "--strength.num_members", "1", "--strength.folds", "2", "--strength.num_workers", "2")
    config: RunConfig = load_config(TINY, [])
    rows = rows_of(done.path)
    train = rows["split"] == "train"
    folds = np.array([fold_of(prompt, 2, config.seed) for prompt in rows["prompt"]])
    folds[~train] = 0
    assert len(rows["id"]) == 160 and done.card["folds"] == 2
    for fold in (0, 1):
        report = json.loads((done.path / "members" / str(fold) / "0" / "member.json").read_text())
        assert report["num_pairs"] == int((train & (folds != fold)).sum()), "trained on the other part"
        own = folds == fold
        prompts, chosen = rows["prompt"][own].tolist(), rows["chosen"][own].tolist()
        wanted = scores_by(done.path / "members" / str(fold) / "0", prompts, chosen)
        found = np.array([scores[0] for scores, mine in zip(rows["chosen score list"].tolist(), own, strict=True) if mine])
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert "has no spread" in done.printed
    found = read_strengths(done.path)
    with pytest.raises(UserError, match="one member"):
        _ = found.std


@pytest.mark.slow
def test_the_benchmark_compares_cheaper_members_with_whole_ones(
    run: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "members.jsonl"
    full, lora, heads = members.main([str(TINY), *MEMBERS, "--name", "tiny-kinds", "--seeds", "3"], results)
    assert [json.loads(line)["what"] for line in results.read_text().splitlines()] == ["full", "lora", "heads"]
    assert [row["seed"] for row in (full, lora, heads)] == [3] * 3
    lines = capsys.readouterr().out.splitlines()
    assert "| | full | lora | heads |" in lines and "| train_ratio | 1.000 [1.000, 1.000] |" in "\n".join(lines)
    assert full["spearman_mu"] == full["weight_ratio"] == full["train_ratio"] == 1.0
    assert 0 < lora["weight_ratio"] < 1 and heads["weight_ratio"] == pytest.approx(0.5, abs=0.1)
    for row, kind in ((lora, "lora"), (heads, "heads")):
        found = read_strengths(run.path.with_name(f"tiny-kinds-seed-3-members-{kind}"))
        assert len(found) == 160 and found.num_members == 2
        assert float(np.abs(found.chosen[:, 0] - found.chosen[:, 1]).max()) > 0, "members differ"
        assert -1 <= row["spearman_mu"] < 1
