"""A run whose policy is paid by customised reward models, as they are, on a real Ray."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.experiments.domain_fits import fit_here
from cluster.domain_models import find_domain, find_domains
from cluster.load_config import load_config
from rm.batches import score_sequences
from rm.domain_bank import open_bank
from rm.domain_config import ADAPTERS
from rm.model import RewardModel
from tests.cluster.command import TINY, Command

DOMAINS = ("cooking", "travel")


@pytest.fixture(scope="module")
def customised(command: Command) -> None:
    """Adapters for two domains of the tiny world, fitted in this process."""
    own = ("--customize.general", "{everyday: sandbox}", "--customize.domains", "{cooking: sandbox, travel: sandbox}")
    fits = ("--customize.lora.rank", "2", "--customize.domain_stage.lr", "0.01", "--customize.domain_stage.batch_size", "8")
    fit_here(load_config(TINY, ["--name", "two", "--storage", str(command.storage), *own, *fits]))


def test_a_policy_is_paid_by_the_adapter_of_its_prompts_domain(customised: None, command: Command) -> None:
    paid = ("--scorer.reward_model", "domains:two", "--scorer.num_members", "1", "--scorer.aggregate", "primary")
    short = ("--rounds.num_rounds", "1", "--policy.steps_per_round", "1", "--evaluation.num_prompts", "8")
    of = "sandbox:cooking,travel"
    everywhere = command("run", str(TINY), "--name", "paid", *paid, *short, "--policy.prompts", of, "--meta.enabled", "false")
    assert everywhere.returncode == 2 and "set meta.prompts as policy.prompts" in everywhere.stderr, everywhere.stderr
    prompts = ("--policy.prompts", of, "--meta.prompts", of, "--meta.enabled", "false")
    done = command("run", str(TINY), "--name", "paid", *paid, *short, *prompts)
    assert done.returncode == 0, done.stdout + done.stderr
    run = command.storage / "runs" / "paid"
    reward = next(run.glob(f"rounds/*/**/{ADAPTERS}")).parent
    for found in find_domains(command.storage, "two"):
        assert found.adapter is not None
        for name, there in (("model.safetensors", found.backbone), (f"{ADAPTERS}/{found.name}/adapter_model.safetensors", None)):
            expected = (there or found.adapter) / name.rsplit("/", 1)[-1]
            assert (reward / name).read_bytes() == expected.read_bytes(), "no reward model is trained"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("score" in key for row in rows for key in row), "responses were scored"


def test_a_policy_is_paid_by_one_domain(customised: None, command: Command) -> None:
    """Two whole rounds of ``domain:NAME``: sampled, scored by the customised model as it is, learned, judged and committed."""
    paid = ("--scorer.reward_model", "domain:two/cooking", "--scorer.num_members", "1", "--scorer.aggregate", "primary")
    short = ("--rounds.num_rounds", "2", "--policy.steps_per_round", "1", "--evaluation.num_prompts", "8")
    prompts = ("--policy.prompts", "sandbox:cooking", "--meta.enabled", "false")
    done = command("run", str(TINY), "--name", "cook", *paid, *short, *prompts)
    assert done.returncode == 0, done.stdout + done.stderr
    run = command.storage / "runs" / "cook"
    assert [entry["round"] for entry in json.loads((run / "ledger.json").read_text())["rounds"]] == [0, 1]
    found = find_domain(command.storage, "two/cooking")
    assert found.adapter is not None
    texts = [((5, 6, 7), (8, 9, 2)), ((11, 12), (13, 14, 15, 2))]
    bank = open_bank(RewardModel.from_pretrained(found.backbone, torch.float32), [("cooking", found.adapter)])
    expected = bank.scores(texts, ["cooking"] * 2, batch_size=2, pad_id=0)
    for number in range(2):
        paid_by = RewardModel.from_pretrained(run / "rounds" / f"round_{number:03d}" / "reward", torch.float32)
        torch.testing.assert_close(score_sequences(paid_by, texts, 2, 0), expected, msg="the backbone with the domain's adapter")
