"""A run in which reward trainer and learner are two processes each, and share their models, and two scorers share the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster.load_config import load_config
from tests.cluster.command import TINY, Command
from tokens.errors import UserError


@pytest.fixture(scope="module")
def run(ranks_run: Path) -> Path:
    """One round with two ranks each, colocated."""
    return ranks_run


def test_a_round_with_two_ranks_each(run: Path) -> None:
    processes = json.loads((run / "processes.json").read_text())
    assert processes.keys() == {
        "driver",
        "rollout-0",
        *(f"{role}-{i}" for role in ("reward", "scorer", "learner") for i in (0, 1)),
    }
    assert len({process["pid"] for process in processes.values()}) == 8
    entry = json.loads((run / "ledger.json").read_text())["rounds"][0]
    assert entry["reward"]["J_after"] > entry["reward"]["J_before"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    policy = [row for row in rows if row["phase"] == "policy"]
    assert len(policy) == 2
    assert policy[0]["policy/kl"] == pytest.approx(0.0, abs=1e-4) and policy[1]["policy/kl"] != policy[0]["policy/kl"]
    assert max(row["policy/sampler_gap"] for row in policy) < 1e-4, "the engine got the whole weights of both ranks"
    syncs = [row for row in rows if row["phase"] == "sync"]
    assert [(row["round"], row["step"]) for row in syncs] == [(0, 0), (0, 1)]
    folder = run / "rounds" / "round_000"
    num_bytes = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict().values())
    for row in syncs:
        assert row["sync/bytes"] == num_bytes
        assert row["sync/bytes_per_second"] == pytest.approx(row["sync/bytes"] / row["sync/seconds"])
    assert AutoModelForCausalLM.from_pretrained(folder / "policy").config.architectures == ["LlamaForCausalLM"]
    for name in ("critic", "reward"):
        AutoModelForSequenceClassification.from_pretrained(folder / name)


@pytest.mark.slow
def test_one_process_each_goes_on_from_what_two_ranks_left(run: Path, command: Command) -> None:
    done = command("run", str(TINY), "--name", "tiny-ranks", "--rounds.num_rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Round 2 of 2" in done.stdout and "Round 1 of 2" not in done.stdout
    processes = json.loads((run / "processes.json").read_text())
    assert processes.keys() == {"driver", "rollout-0", "reward-0", "scorer-0", "learner-0"}
    assert [entry["round"] for entry in json.loads((run / "ledger.json").read_text())["rounds"]] == [0, 1]
    values = [json.loads((run / "rounds" / f"round_00{k}" / "learner.json").read_text()) for k in (0, 1)]
    assert [value["counters"]["num_updates"] for value in values] == [2, 4]


def test_shares_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match=r"minibatch_size \(16\) is not a multiple of resources.learner.num_ranks \(3\)"):
        load_config(TINY, ["--resources.learner.num_ranks", "3"])
    with pytest.raises(UserError, match=r"rollout\.num_ranks is 2: engines are counted by rollout\.num_engines"):
        load_config(TINY, ["--resources.rollout.num_ranks", "2"])


def test_placements_and_transfers_that_do_not_go_together_are_refused() -> None:
    for options, said in (
        (("--resources.placement", "colocated", "--resources.learner.num_gpus", "1"), r"learner.num_gpus 1: .*set all four to 1"),
        (("--rollout.sync", "nccl"), "rollout.sync is nccl, .*disaggregated engines and learner, both on GPUs; .*auto"),
        (("--rollout.sync", "ipc", "--resources.placement", "colocated"), "rollout.sync is ipc, .*both on GPUs"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(TINY, list(options))
    gpus = [x for role in ("rollout", "reward", "scorer", "learner") for x in (f"--resources.{role}.num_gpus", "1")]
    with pytest.raises(UserError, match=r"num_engines 2: every engine must share the GPU of one of the learner's ranks"):
        load_config(TINY, [*gpus, "--rollout.sync", "ipc", "--rollout.num_engines", "2", "--resources.placement", "colocated"])
