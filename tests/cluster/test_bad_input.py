"""What a person gets wrong: one clear message, exit code 2, no Ray, nothing left behind."""

from __future__ import annotations

import errno
import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from cluster.cli import main
from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import open_source
from cluster.load_config import load_config
from cluster.patience import errno_of
from cluster.reward import reward
from cluster.reward_directory import RewardDirectory
from cluster.reward_inputs import pairs_sha256
from cluster.run_directory import RunDirectory, space_errors
from cluster.storage import storage_root
from cluster.strength import fingerprint, strength
from cluster.strength_directory import StrengthDirectory
from cluster.waiting import TAKES_NOTHING
from evaluation.records import MetaRow, write_rows
from tests.cluster.command import TINY, Command
from tests.cluster.judged import JUDGED
from tests.cluster.refused import GOOD, REAL, changed, config, jsonl, refused
from tokens.errors import UserError


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path / "storage"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "storage"


HALF = {"num_gpus": 0.5, "fraction_reason": "a test"}
CONFIGS = {
    "unknown key": ({"polciy": {}}, ["unknown key polciy", "policy"]),
    "unknown nested key": ({"policy": {"kl": {"coeff": 0.1}}}, ["policy.kl.coeff", "did you mean coef"]),
    "negative size": ({"rounds": {"num_rounds": -1}}, ["rounds.num_rounds", "-1", "greater than or equal to 1"]),
    "zero size": ({"scorer": {"num_members": 0}}, ["scorer.num_members", "0"]),
    "not a number": ({"reward": {"lr": "1e-5x"}}, ["reward.lr", "1e-5x"]),
    "infinite": ({"reward": {"lr": float("inf")}}, ["reward.lr", "finite"]),
    "a learning rate of 0": ({"policy": {"lr": 0}}, ["policy.lr", "greater than 0", "got 0"]),
    "a rate that is no number": ({"policy": {"lr": float("nan")}}, ["policy.lr", "finite", "nan"]),
    "a negative rate": ({"sft": {"lr": -1.0}}, ["sft.lr", "greater than 0"]),
    "a thousand million rounds": ({"rounds": {"num_rounds": 10**9}}, ["rounds.num_rounds", "1000"]),
    "a seed that no generator takes": ({"seed": 10**30}, ["seed", "4294967296"]),
    "temperature 0": ({"rollout": {"temperature": 0}}, ["rollout.temperature", "greater than 0"]),
    "a KL target of 0": ({"policy": {"kl": {"target": 0}}}, ["policy.kl.target", "greater than 0"]),
    "an engine over GPUs that it is not given": (
        {"rollout": {"tensor_parallel": 8, "max_new_tokens": 32}}, ["tensor_parallel is 8", "num_gpus 0"],
    ),
    "more rounds than the disk holds": (
        {"rounds": {"num_rounds": 1000}, "sft": {"shape": {"hidden_size": 65536, "intermediate_size": 65536, "num_layers": 99}}},
        ["no space left for the run", "GiB are free", "rounds.num_rounds"],
    ),
    "k < 2": ({"meta": {"samples_per_prompt": 1}}, ["meta.samples_per_prompt", "2"]),
    "odd minibatch": (
        {"policy": {"prompts_per_step": 16, "minibatch_size": 5, "microbatch_size": 5}}, ["minibatch_size", "divide", "16", "5"],
    ),
    "microbatch does not divide": (
        {"policy": {"prompts_per_step": 16, "minibatch_size": 16, "microbatch_size": 5}}, ["microbatch_size", "divide", "16"],
    ),
    "a sampler without chance": ({"rollout": {"top_k": 1}}, ["rollout: rollout.top_k is 1", "importance"]),
    "another distribution, uncorrected": (
        {"rollout": {"top_p": 0.9, "repetition_penalty": 1.1}, "policy": {"importance_cap": None}},
        ["rollout.top_p 0.9, rollout.repetition_penalty 1.1", "policy.importance_cap null", "2.0"],
    ),
    "old rollouts, uncorrected": (
        {"policy": {"max_lag": 1, "importance_cap": None}}, ["policy.max_lag 1", "policy.importance_cap null"],
    ),
    "texts that do not divide": (
        {"policy": {"ptx_coef": 0.1, "ptx_batch_size": 3}, "resources": {"learner": {"num_ranks": 2}}},
        ["policy.ptx_batch_size (3)", "resources.learner.num_ranks (2)"],
    ),
    "texts without a weight": ({"policy": {"ptx_data": "texts.jsonl"}}, ["policy.ptx_data", "ptx_coef 0"]),
    "nccl on a part of a GPU": (
        {"rollout": {"sync": "nccl"}, "resources": dict.fromkeys(("rollout", "learner"), HALF)},
        ["rollout.sync is nccl", "two processes on one GPU"],
    ),
    "nothing to offload": (
        {"policy": {"lora": {"rank": 4}}, "resources": {"learner": {"offload": True}}},
        ["resources.learner.offload", "policy.lora.rank 4"],
    ),
    "ahead on a shared device": (
        {"policy": {"max_lag": 1}, "resources": {"placement": "colocated"}},
        ["policy.max_lag is 1", "colocated", "disaggregated"],
    ),
    "meta batch over S_k": ({"meta": {"num_prompts": 2, "prompts_per_step": 3}}, ["meta.prompts_per_step", "3", "2"]),
    "spread of one member": ({"scorer": {"num_members": 1}}, ["mean_minus_std", "num_members"]),
    "a name that is a path": ({"name": "../../etc"}, ["name", "../../etc"]),
    "context too short": ({"data": {"max_prompt_tokens": 100}}, ["context", "164", "72"]),
    "gold without a sandbox": (
        {
            "data": {"preferences": "x.jsonl", "max_prompt_tokens": 24, "max_response_tokens": 40},
            "evaluation": {"judge": "gold"},
        },
        ["evaluation.judge", "held_out", "ensemble"],
    ),
    "nobody to judge": (
        {"evaluation": {"judge": "held_out", "held_out_members": 0}}, ["held_out_members 0", "set held_out_members to 1 or more"],
    ),
    "held-out members beside a given reward model": (
        {"evaluation": {"held_out_members": 2}, "scorer": {"reward_model": "domain:law", "num_members": 1}},
        ["evaluation.held_out_members 2", "scorer.reward_model domain:law", "held_out_members to null"],
    ),
    "a stop by what PPO is paid by": (
        {"rounds": {"stop": {"patience": 1}}, "evaluation": {"judge": "ensemble"}},
        ["rounds.stop.patience is 1", "evaluation.judge ensemble", "set evaluation.judge to held_out"],
    ),
    "a stop of one round": (
        {"rounds": {"baseline": "dpo", "num_rounds": 1, "stop": {"patience": 1}}},
        ["stop.patience is 1", "dpo, which is one round"],
    ),
    "no patience": ({"rounds": {"stop": {"patience": 0}}}, ["rounds.stop.patience", "1"]),
    "unknown domain": ({"policy": {"prompts": "sandbox:nowhere"}}, ["policy.prompts", "nowhere"]),
    "a model beside the sandbox": ({"sft": {"model": "nowhere"}}, ["sft.model", "nowhere", "allow_hub"]),
    "n without best of n": ({"rounds": {"best_of": 4}}, ["rounds: best_of is 4", "baseline none", "neither"]),
    "best of n without n": ({"rounds": {"baseline": "best_of_n", "num_rounds": 1}}, ["best_of is None", "best_of_n"]),
    "two rounds of best of n": (
        {"rounds": {"baseline": "best_of_n", "best_of": 4, "num_rounds": 2}}, ["best_of_n is one round", "num_rounds is 2"],
    ),
    "two rounds of DPO": ({"rounds": {"baseline": "dpo", "num_rounds": 2}}, ["dpo is one round", "num_rounds is 2"]),
    "an unknown baseline": ({"rounds": {"baseline": "grpo"}}, ["rounds.baseline", "grpo", "vanilla_ppo"]),
    "vanilla PPO that starts over": (
        {"rounds": {"baseline": "vanilla_ppo"}, "policy": {"start": "sft"}}, ["policy.start is 'sft'", "vanilla_ppo"],
    ),
    "vanilla PPO with members that are fitted anew": (
        {"rounds": {"baseline": "vanilla_ppo"}, "scorer": {"refresh": "each_round"}}, ["scorer.refresh", "vanilla_ppo"],
    ),
    "best of n with PPO's controller": (
        {"rounds": {"baseline": "best_of_n", "best_of": 4, "num_rounds": 1}, "policy": {"kl": {"controller": "adaptive"}}},
        ["policy.kl.controller is 'adaptive'", "best_of_n", "'fixed'"],
    ),
    "best of n with texts for PPO": (
        {"rounds": {"baseline": "best_of_n", "best_of": 4, "num_rounds": 1}, "policy": {"ptx_coef": 0.1}},
        ["policy.ptx_coef is 0.1", "best_of_n"],
    ),
    "DPO on soft labels": (
        {"rounds": {"baseline": "dpo", "num_rounds": 1}, "data": {"denoise": {"method": "soft"}}},
        ["data.denoise.method is soft", "dpo"],
    ),
    "DPO on two ranks": (
        {"rounds": {"baseline": "dpo", "num_rounds": 1}, "resources": {"learner": {"num_ranks": 2}}}, ["learner.num_ranks is 2"],
    ),
    "DPO's microbatch": ({"dpo": {"microbatch_size": 5}}, ["dpo: microbatch_size", "32", "5"]),
    "SFT's microbatch": ({"sft": {"batch_size": 32, "microbatch_size": 5}}, ["sft: microbatch_size", "32", "5"]),
    "texts for PPO that are not there": (
        {"policy": {"ptx_coef": 0.1, "ptx_data": "x.jsonl"}, "data": {"max_prompt_tokens": 24, "max_response_tokens": 40}},
        ["x.jsonl", "no such file"],
    ),
    "theta' without MetaRM": ({"meta": {"enabled": False, "deploy": "theta_prime"}}, ["meta.deploy", "meta.enabled"]),
    "recorded samples without MetaRM": ({"meta": {"enabled": False, "samples": "x"}}, ["meta.samples", "meta.enabled"]),
    "recorded samples in a run": ({"meta": {"samples": "x.parquet"}}, ["meta.samples", "`reward`"]),
    "order 2 on two ranks": (
        {"meta": {"order": 2}, "resources": {"reward": {"num_ranks": 2}}}, ["meta.order", "resources.reward.num_ranks", "2"],
    ),
    "order 2 with activations recomputed": (
        {"meta": {"order": 2}, "resources": {"reward": {"recompute_activations": True}}},
        ["meta.order 2", "resources.reward.recompute_activations", "false"],
    ),
    "joint objective with theta' deployed": (
        {"meta": {"objective": "joint", "deploy": "theta_prime"}}, ["objective joint", "theta_prime", "meta"],
    ),
    "order 2 in a random direction": ({"meta": {"order": 2, "direction": "random"}}, ["meta: order 2", "random"]),
    "joint in a direction": ({"meta": {"objective": "joint", "direction": "descent"}}, ["meta: objective joint", "descent"]),
    "patience without measurements": ({"reward": {"patience": 2}}, ["patience", "evaluate_every"]),
    "nothing to measure on": (
        {"data": {"preferences": "x.jsonl", "validation_fraction": 0}, "reward": {"evaluate_every": 5}},
        ["reward.evaluate_every", "data.validation_fraction"],
    ),
    "nothing to stop on": (
        {"data": {"preferences": "x.jsonl", "validation_fraction": 0}, "reward": {"patience": 2}},
        ["reward.patience is 2", "data.validation_fraction", "data.validation"],
    ),
    "held out twice": (
        {"data": {"preferences": "x.jsonl", "validation": "y.jsonl", "validation_fraction": 0.3}},
        ["data.validation is 'y.jsonl'", "data.validation_fraction 0.3", "one of the two"],
    ),
    "a validation set beside the sandbox": ({"data": {"validation": "y.jsonl"}}, ["data: validation", "sandbox", "null"]),
    "a set to stop on without stopping": ({"reward": {"stop_on": "agreement"}}, ["reward: stop_on is agreement", "patience"]),
    "a set that the sandbox has not": (
        {"reward": {"stop_on": "agreement", "patience": 1, "evaluate_every": 1}}, ["reward.stop_on", "second labeller"],
    ),
    "a set that nobody knows": ({"reward": {"stop_on": "gold"}}, ["reward.stop_on", "gold", "agreement"]),
    "a batch too small for the prototypes": (
        {"reward": {"batch_size": 8, "contrastive": {"method": "swav"}}}, ["num_prototypes=50", "reward.batch_size", "8 pairs"],
    ),
    "contrasting on two ranks": (
        {"reward": {"contrastive": {"method": "simcse"}}, "resources": {"reward": {"num_ranks": 2}}}, ["simcse", "2 processes"],
    ),
    "two rates of dropout": ({"reward": {"dropout": 0.1, "contrastive": {"method": "simcse"}}}, ["reward.dropout", "0.05"]),
    "beta out of range": ({"reward": {"contrastive": {"beta": 0}}}, ["reward.contrastive.beta", "greater than 0"]),
    "tau out of range": ({"reward": {"contrastive": {"temperature": -1}}}, ["reward.contrastive.temperature", "-1"]),
    "smoothing out of range": ({"data": {"denoise": {"smoothing": 1.5}}}, ["data.denoise.smoothing", "1.5"]),
    "an unknown method": ({"data": {"denoise": {"method": "fliip"}}}, ["data.denoise.method", "fliip", "flip"]),
    "strengths that are not there": (
        {"data": {"denoise": {"method": "flip", "strength": "nowhere"}, "max_prompt_tokens": 24, "max_response_tokens": 40}},
        ["data.denoise.strength", "nowhere", "python -m cluster strength"],
    ),
    "a base that is not there": ({"reward": {"base": "nowhere"}}, ["reward.base", "nowhere", "allow_hub"]),
    "a fraction without a reason": (
        {"resources": {"scorer": {"num_gpus": 0.5}}}, ["resources.scorer: num_gpus is 0.5", "fraction_reason", "num_gpus to 1"],
    ),
    "a blank reason": ({"resources": {"scorer": {"num_gpus": 0.5, "fraction_reason": " "}}}, ["fraction_reason says nothing"]),
    "a reason without a fraction": (
        {"resources": {"scorer": {"num_gpus": 1, "fraction_reason": "x"}}}, ["num_gpus is 1, no fraction", "leave it out"],
    ),
    "a GPU and a half": ({"resources": {"scorer": {"num_gpus": 1.5, "fraction_reason": "x"}}}, ["is 1.5", "set it to 1"]),
    "a label that is none": (
        {"resources": {"learner": {"labels": {"pool": "-trainer"}}}}, ["resources.learner.labels", "pool asks for '-trainer'"],
    ),
    "a label's key that is none": ({"resources": {"learner": {"labels": {"po ol": "x"}}}}, ["learner.labels", "'po ol'"]),
    "labels apart, roles together": (
        {"resources": {"placement": "colocated", "learner": {"labels": {"pool": "trainer"}}}}, ["colocated", "same nodes"],
    ),
    "a share of nothing": ({"resources": {"learner": {"num_cpus": 0}}}, ["num_cpus and num_gpus are both 0"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_config(
    change: dict[str, object], words: list[str], tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(**change)))
    message = refused(capsys, storage, "run", str(tmp_path / "c.yaml"))
    assert all(word in message for word in words), message


FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["no config file"]),
    "empty": (b"", ["mapping", "nothing"]),
    "a list": (b"- 1\n", ["mapping", "list"]),
    "not YAML": (b"a: [1\n", ["not valid YAML"]),
    "not UTF-8": (b"name: \xff\xfe\n", ["UTF-8"]),
    "a key twice": (b"name: a\nname: b\n", ["name", "twice"]),
    "UTF-16": (TINY.read_text().encode("utf-16"), ["UTF-8"]),
    "a NUL character": (b"name: a\x00b\n", ["not valid YAML", "0000"]),
    "aliases that explode": (
        b"name: x\na: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
        ["more than 10,000 values", "aliases"],
    ),
    "an alias of itself": (b"name: &a [*a]\n", ["nested"]),
    "sections without end": (b"name: " + b"[" * 100_000, ["nested"]),
    "too large": (b"#" * 1_000_001, ["larger than 1,000,000 bytes"]),
    "a Python object": (b"name: !!python/object:os.system x\n", ["not valid YAML", "python/object"]),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES.keys())
def test_config_file(
    content: bytes | None, words: list[str], tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    message = refused(capsys, storage, "run", str(tmp_path / "c.yaml"))
    assert all(word in message for word in words), message


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + TINY.read_bytes())
    assert load_config(tmp_path / "c.yaml") == load_config(TINY)


def test_config_comes_first(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "right after run" in refused(capsys, storage, "run", "--seed", "1", str(TINY))
    assert load_config(TINY, ["--name", "2024"]).name == "2024"


def test_override(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "policy.kl.coef" in refused(capsys, storage, "run", str(TINY), "--policy.kl.coef", "much")
    assert "unknown key policy.kl.koef" in refused(capsys, storage, "run", str(TINY), "--policy.kl.koef", "1")
    assert "pairs" in refused(capsys, storage, "run", str(TINY), "--policy.kl.coef")
    assert load_config(TINY, ["--policy.kl.coef", "1e-3", "--policy.lr=2e-4"]).policy.kl.coef == 1e-3


DATA: dict[str, tuple[bytes | None, list[str]]] = {
    "missing file": (None, ["d.jsonl", "no such file"]),
    "empty file": (b"", ["d.jsonl", "empty"]),
    "malformed line": (jsonl([dict(GOOD[0])]) + b"{not json\n", ["d.jsonl", "line 2"]),
    "missing columns": (jsonl([{"question": "a", "answer": "b"}] * 3), ["answer", "question"]),
    "empty chosen": (changed(chosen=" "), ["line 3", "chosen", "empty"]),
    "empty rejected": (changed(rejected=""), ["line 3", "rejected", "empty"]),
    "chosen equal to rejected": (changed(chosen="same", rejected="same"), ["line 3", "equal"]),
    "prompt longer than allowed": (changed(prompt="long " * 100), ["prompt too long", "24"]),
    "not UTF-8": (jsonl([dict(GOOD[0])]) + b'{"prompt": "\xff"}\n', ["d.jsonl", "UTF-8"]),
    "no column chosen": (jsonl([{"prompt": "a", "rejected": "b"}] * 3), ["no column 'chosen'", "prompt, rejected"]),
    "a last line cut off": (jsonl([dict(row) for row in GOOD])[:-9], ["line 200", "cut off"]),
    "an id twice": (jsonl([row | {"id": "same"} for row in GOOD]), ["199 x the id was used before", "line 2"]),
    "ten million characters": (changed(chosen="a" * 10_000_000), ["line 3", "chosen has more than 1,000,000 characters"]),
    "half a character": (jsonl([dict(row) for row in GOOD]).replace(b"no 5", b"no \\ud800"), ["line 6", "surrogate"]),
    "NaN in a column": (
        jsonl([dict(row) for row in GOOD]).replace(b'"rejected"', b'"margin": NaN, "rejected"'),
        ["line 1", "NaN"],
    ),
    "null in a column of numbers": (jsonl([row | {"margin": None} for row in GOOD]), ["margin is not a finite number"]),
    "one row": (jsonl([dict(GOOD[0])]), ["1 usable preference pair", "at least 2"]),
    "fewer rows than can be judged on": (jsonl([dict(row) for row in GOOD[:20]]), ["2 prompts are held out", "at least 8"]),
    "compressed": (gzip.compress(b"0" * 10_000_000), ["d.jsonl, line 1", "UTF-8", "uncompressed"]),
    "brackets without end": (b"[" * 100_000, ["not valid JSON"]),
}


@pytest.mark.parametrize(("content", "words"), DATA.values(), ids=DATA.keys())
def test_data(content: bytes | None, words: list[str], tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_bytes(content)
    message = refused(capsys, storage, "run", str(TINY), "--data.preferences", str(tmp_path / "d.jsonl"), *REAL)
    assert all(word in message for word in words), message


TEXTS: dict[str, tuple[bytes | None, list[str]]] = {
    "missing file": (None, ["t.jsonl", "no such file"]),
    "empty file": (b"", ["t.jsonl", "empty"]),
    "missing columns": (jsonl([{"question": "a", "answer": "b"}] * 3), ["prompt and completion", "answer", "docs/sft.md"]),
    "pairs": (jsonl([dict(row) for row in GOOD]), ["columns found", "data.preferences"]),
    "text and messages": (
        jsonl([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}] * 9),
        ["both", "prompt: text, completion: messages"],
    ),
    "an empty text": (jsonl([{"text": "a b c"}, {"text": " "}] * 9), ["9 of 18 rows", "line 2", "text is empty"]),
    "no chat template": (
        jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 9), ["chat template"],
    ),
    "longer than the context": (
        jsonl([{"prompt": f"say {i}", "completion": "word " * (100 if i == 3 else 2)} for i in range(9)]),
        ["line 4", "longer than the context", "72", "data.drop_bad"],
    ),
    "nothing to hold out": (jsonl([{"prompt": "a", "completion": "b"}] * 9), ["hold out", "validation_fraction"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), TEXTS.values(), ids=TEXTS.keys())
def test_texts(
    content: bytes | None, words: list[str], tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "t.jsonl").write_bytes(content)
    small = ["--sft.shape.vocab_size", "300"]
    message = refused(capsys, storage, "sft", str(TINY), "--sft.data", str(tmp_path / "t.jsonl"), *small)
    assert all(word in message for word in words), message


def test_texts_for_ppo_that_are_too_long(tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_bytes(jsonl([{"text": "a b c"}, {"text": "kettle " * 100}]))
    texts = ["--policy.ptx_coef", "0.1", "--policy.ptx_data", str(tmp_path / "t.jsonl")]
    message = refused(capsys, storage, "run", str(TINY), *texts)
    assert all(word in message for word in ("t.jsonl", "line 2", "longer than the context", "64")), message


def test_a_model_to_fine_tune(tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from policy.sft import make_model, train_tokenizer
    from tokens.shape import ModelShape

    tokenizer = train_tokenizer(["a b c"], 300, tmp_path / "model")
    make_model(tokenizer, ModelShape(hidden_size=32, num_heads=1, num_layers=1, context_length=72), 0).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "t.jsonl").write_bytes(jsonl([{"prompt": f"say {i}", "completion": "a b c"} for i in range(9)]))
    capsys.readouterr()
    texts = ["--sft.data", str(tmp_path / "t.jsonl")]
    missing = refused(capsys, storage, "sft", str(TINY), "--sft.model", str(tmp_path / "nowhere"), *texts)
    assert "sft.model" in missing and "nowhere" in missing and "allow_hub" in missing
    other = refused(capsys, storage, "run", str(TINY), "--sft.model", str(tmp_path / "model"))
    assert "different vocabularies" in other and "python -m cluster sft" in other
    tokenizer.save_pretrained(tmp_path / "model")
    message = refused(capsys, storage, "sft", str(TINY), "--sft.model", str(tmp_path / "model"), *texts)
    assert "pad_token" in message and "add_special_tokens" in message


def test_a_directory_that_sft_did_not_write(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (storage / "sft" / "tiny").mkdir(parents=True)
    (storage / "sft" / "tiny" / "notes.txt").write_text("mine")
    assert main(["sft", str(TINY)]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert (storage / "sft" / "tiny" / "notes.txt").read_text() == "mine"


def strengths(path: Path, rows: list[dict[str, str]]) -> Path:
    """A strengths file of two members."""
    scores = {"chosen score list": [[1.0, 2.0]] * len(rows), "rejected score list": [[0.5, 0.25 * i] for i in range(len(rows))]}
    columns = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table({"id": [str(i + 1) for i in range(len(rows))], **columns, **scores}), path)
    return path


@pytest.mark.parametrize("what", ["run", "reward"])
def test_strengths_of_another_data_set(what: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    other = strengths(tmp_path / "other.parquet", [row | {"chosen": row["chosen"] + " indeed"} for row in GOOD])
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), *REAL, "--data.denoise.method", "flip"]
    message = refused(capsys, storage, what, str(TINY), *data, "--data.denoise.strength", str(other))
    assert "no strength" in message and "fingerprint" in message and "180 of 180" in message
    constant = strengths(tmp_path / "same.parquet", GOOD)
    table = pq.read_table(constant).drop_columns(["chosen score list"])
    pq.write_table(table.append_column("chosen score list", table["rejected score list"]), constant)
    message = refused(capsys, storage, what, str(TINY), *data, "--data.denoise.strength", str(constant))
    assert "all 180 pairs have the strength 0" in message or "the score" in message


@pytest.mark.parametrize("what", ["strength", "reward", "run"])
def test_a_column_label_of_another_meaning(what: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), *REAL]
    for value, got in (("harmless", "string"), (5, "row 1 has 5")):
        (tmp_path / "d.jsonl").write_bytes(jsonl([row | {"label": value} for row in GOOD]))
        message = refused(capsys, storage, what, str(TINY), *data)
        assert "d.jsonl: column 'label' must hold" in message and got in message and "rename or remove the column" in message


@pytest.mark.parametrize("what", ["reward", "run", "study"])
def test_columns_that_denoising_writes_are_refused_before_an_ensemble_is_trained(
    what: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([row | {"margin": 0.5} for row in GOOD]))
    method = [] if what == "study" else ["--data.denoise.method", "soft"]
    message = refused(capsys, storage, what, str(TINY), "--data.preferences", str(tmp_path / "d.jsonl"), *REAL, *method)
    assert "the pairs have the column(s) margin, which data.denoise writes" in message


@pytest.mark.parametrize("what", ["reward", "run"])
def test_a_set_to_stop_on_that_the_data_do_not_have(
    what: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    stop = ["--reward.patience", "2", "--reward.evaluate_every", "3", "--reward.stop_on", "agreement"]
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), *REAL, *stop]
    message = refused(capsys, storage, what, str(TINY), *data)
    assert "reward.stop_on is agreement" in message and "found: original (20 pairs)" in message and "relabel" in message
    (tmp_path / "d.jsonl").write_bytes(jsonl([row | {"label": 0} for row in GOOD]))
    message = refused(capsys, storage, what, str(TINY), *data)
    assert "relabelled (20 pairs), agreement (0 pairs)" in message


@pytest.mark.parametrize("what", ["strength", "reward", "run"])
def test_held_out_pairs_of_their_own(what: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), *REAL, "--data.validation", str(tmp_path / "v.jsonl")]
    assert "v.jsonl: no such file" in refused(capsys, storage, what, str(TINY), *data)
    (tmp_path / "v.jsonl").write_bytes(jsonl([dict(row) for row in GOOD[:3]]))
    message = refused(capsys, storage, what, str(TINY), *data)
    assert "d.jsonl: 3 of 200 rows cannot be used" in message and "stands in data.validation" in message
    (tmp_path / "v.jsonl").write_bytes(jsonl([{**row, "prompt": "do it", "label": "A"} for row in GOOD[:3]]))
    assert "v.jsonl: column 'label'" in refused(capsys, storage, what, str(TINY), *data)


def finished(config: RunConfig) -> dict[str, Path]:
    """The directories of `strength` and `reward`, as if the commands had finished on the pairs that are there."""
    source = open_source(config, storage_root(config), policy=False)
    ensemble, model = StrengthDirectory(config), RewardDirectory(config)
    with ensemble.open():
        ensemble.belong_to(fingerprint(*source.preferences()))
        ensemble.card.write_text("{}")
    with model.open(), model.draft() as draft:
        model.commit(draft, {"pairs_sha256": pairs_sha256(source)})
    return {"strength": ensemble.path, "reward": model.path}


@pytest.mark.parametrize("what", ["strength", "reward"])
@pytest.mark.parametrize("side", ["d.jsonl", "v.jsonl"])
def test_pairs_that_were_edited_in_place_are_not_done(
    what: str, side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"d.jsonl": [dict(row) for row in GOOD], "v.jsonl": [{**row, "prompt": "do it"} for row in GOOD[:3]]}
    for name, of_file in rows.items():
        (tmp_path / name).write_bytes(jsonl(of_file))
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), "--data.validation", str(tmp_path / "v.jsonl"), *REAL]
    path = finished(load_config(TINY, data))[what]
    command: Callable[[RunConfig, Console], Path] = {"strength": strength, "reward": reward}[what]
    assert command(load_config(TINY, data), Console()) == path
    assert "nothing to do" in capsys.readouterr().out
    rows[side][1]["rejected"] = "not so good"
    (tmp_path / side).write_bytes(jsonl(rows[side]))
    before = sorted(path.rglob("*"))
    assert main([what, str(TINY), *data]) == 2
    message = capsys.readouterr().err
    assert "the preference pairs are not those that" in message and "although the config is the same" in message
    assert not ray.is_initialized() and sorted(path.rglob("*")) == before


def sample(prompt: str, number: int) -> MetaRow:
    return MetaRow(prompt, "say it", number, "it", (4, 2), (-1.0, -1.0), 0, True, None, 0.0)


SAMPLES: dict[str, tuple[list[MetaRow], list[str]]] = {
    "one response": ([sample("a", 0), sample("b", 0)], ["k >= 2", "[1]"]),
    "ragged": ([sample("a", 0), sample("a", 1), sample("b", 0)], ["same number", "[1, 2]"]),
}


@pytest.mark.parametrize(("rows", "words"), SAMPLES.values(), ids=SAMPLES.keys())
def test_samples(
    rows: list[MetaRow], words: list[str], tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "meta_rollouts.parquet", rows)
    message = refused(capsys, storage, "reward", str(TINY), "--meta.samples", str(tmp_path))
    assert all(word in message for word in words), message
    assert "no file" in refused(capsys, storage, "reward", str(TINY), "--meta.samples", str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("no Parquet")
    assert "cannot be read" in refused(capsys, storage, "reward", str(TINY), "--meta.samples", str(tmp_path / "bad.parquet"))


def test_model_directory_without_a_tokenizer(tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    capsys.readouterr()
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), *REAL]
    message = refused(capsys, storage, "run", str(TINY), "--sft.model", str(tmp_path / "model"), *data)
    assert "tokenizer" in message and str(tmp_path / "model") in message
    missing = refused(capsys, storage, "run", str(TINY), "--sft.model", "somebody/some-model", *data)
    assert "allow_hub" in missing


def test_storage_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(TINY), "--storage", "runs"]) == 2
    assert "absolute" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["run", str(TINY), "--storage", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_storage_root_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", str(TINY), "--storage", "/proc/rondo"]) == 2
    assert "cannot be made" in capsys.readouterr().err
    monkeypatch.setattr("cluster.storage.os.access", lambda path, mode: False)  # root may write everywhere
    assert main(["run", str(TINY), "--storage", str(tmp_path)]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_run_directory_of_another_config(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(load_config(TINY)).open() as run, run.draft(run.start_path) as draft:
        run.commit_start(draft, {**JUDGED, "committed": True})
    before = (storage / "runs" / "tiny" / "config.yaml").read_text()
    assert main(["run", str(TINY), "--policy.kl.coef", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "belongs to another config" in message and "policy.kl.coef: 0.05 there, 0.5 here" in message
    assert (storage / "runs" / "tiny" / "config.yaml").read_text() == before
    RunDirectory(load_config(TINY, ["--rounds.num_rounds", "9"])).inspect()  # going on for longer is no other config


def test_a_directory_that_is_not_a_run(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (storage / "runs" / "tiny").mkdir(parents=True)
    (storage / "runs" / "tiny" / "thesis.txt").write_text("precious")
    assert main(["run", str(TINY)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert [path.name for path in (storage / "runs" / "tiny").iterdir()] == ["thesis.txt"]
    assert main(["report", str(storage / "runs" / "tiny")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_two_drivers(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(load_config(TINY)).open():
        assert main(["run", str(TINY)]) == 2
    assert "another driver" in capsys.readouterr().err


@pytest.mark.parametrize("fails_in", ["draft", "commit"])
def test_full_disk(fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(load_config(TINY))

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_a_round(run: RunDirectory) -> None:
        with run.draft(run.round_path(0)) as draft:
            (draft / "y").write_text("lost")
            if fails_in == "draft":
                no_space()
            monkeypatch.setattr("tokens.durable.os.fsync", no_space)
            run.commit_round(draft, {**JUDGED, "round": 0})

    with run.open():
        with run.draft(run.start_path) as draft:
            (draft / "x").write_text("kept")
            run.commit_start(draft, {**JUDGED, "committed": True})
        before = (run.path / "ledger.json").read_text()
        with pytest.raises(UserError, match=r"no space left.*earlier rounds are intact"):
            write_a_round(run)
        monkeypatch.undo()
        assert (run.path / "ledger.json").read_text() == before
        assert (run.start_path / "x").read_text() == "kept"
        assert list((run.path / "rounds").iterdir()) == []


def test_a_full_disk_for_real(tmp_path: Path, mounted: Callable[[Path, int], None], capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted(small, 64 << 10)
    (small / "filler").write_bytes(b"x" * (56 << 10))
    assert main(["run", str(TINY), "--storage", str(small)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not ray.is_initialized()


def test_a_directory_that_may_not_be_written_to_is_told_before_anything_starts(
    tmp_path: Path, mounted: Callable[[Path, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, command in (("runs/tiny", "run"), ("rewards/tiny", "reward")):
        place = tmp_path / kind
        place.mkdir(parents=True)
        mounted(place, 64 << 10)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert main([command, str(TINY), "--storage", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert (
            f"read-only file system while writing to {place}" in said and "Make it writable" in said and not list(place.iterdir())
        )
    assert not ray.is_initialized()


def test_what_is_refused_elsewhere_is_not_taken_for_the_runs_own_disk(tmp_path: Path) -> None:
    inside, outside = (OSError(errno.EACCES, "no", str(place)) for place in (tmp_path / "run" / "x", tmp_path / "data"))
    with (
        pytest.raises(UserError, match=r"permission denied while writing to .*run.* back to your user"),
        space_errors(tmp_path / "run"),
    ):
        raise inside
    with pytest.raises(PermissionError), space_errors(tmp_path / "run"):
        raise outside


def test_a_full_disk_is_known_by_what_safetensors_says(tmp_path: Path, mounted: Callable[[Path, int], None]) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    small = tmp_path / "small"
    small.mkdir()
    mounted(small, 64 << 10)
    with pytest.raises((SafetensorError, OSError)) as caught:
        save_file({"x": torch.zeros(100_000)}, small / "x.safetensors")
    assert errno_of(caught.value) == errno.ENOSPC and errno.ENOSPC in TAKES_NOTHING
    assert errno_of(ValueError("os error")) is None and errno.EACCES not in TAKES_NOTHING


def test_the_command_line_exits_with_2_and_prints_no_traceback(command: Command) -> None:
    done = command("run", "configs/no_such.yaml", seconds=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "configs/quickstart.yaml" in done.stderr
