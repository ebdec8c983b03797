"""What would run where: arithmetic by hand, the shipped recipes, and shortfalls in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.load_config import load_config
from cluster.plan import (
    GIB,
    PROCESS,
    Bundle,
    ModelSize,
    Node,
    activations,
    bundles,
    member_bundle,
    model_size,
    place,
    reward_bundles,
)
from policy.sft import make_model
from sandbox.tokenizer import make_tokenizer
from tests.cluster.command import ROOT, TINY
from tokens.shape import ModelShape

HH_7B = ROOT / "configs" / "hh_7b.yaml"
SANDBOX = [ROOT / "configs" / name for name in ("quickstart.yaml", "new_domain.yaml", "hh_tiny.yaml")]


def bundle(name: str, cpus: float, gpus: float = 0.0, memory: int = 0) -> Bundle:
    return Bundle("learner", name, cpus, gpus, memory, "a test")


@pytest.mark.parametrize("num_cpus", [1, 2])
@pytest.mark.parametrize("config", SANDBOX, ids=lambda path: path.stem)
def test_sandbox_recipes_fit_on_one_and_on_two_cores(config: Path, num_cpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--node-cpus", str(num_cpus), "--node-memory-gib", "8"]) == 0
    assert "Everything fits" in capsys.readouterr().out


def test_7b_fits_on_eight_large_gpus_and_says_what_is_short_on_smaller_ones(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["plan", str(HH_7B), "--node-cpus", "64", "--node-gpus", "8", "--node-memory-gib", "1000"]
    assert main([*machine, "--gpu-memory-gib", "141"]) == 0
    assert "Everything fits" in capsys.readouterr().out
    assert main([*machine, "--gpu-memory-gib", "80"]) == 1
    assert "raise resources.reward.num_ranks" in capsys.readouterr().out
    assert main([*machine[:-4], "--node-gpus", "4", "--gpu-memory-gib", "141", "--node-memory-gib", "1000"]) == 1
    assert "0 GPU" in capsys.readouterr().out


def test_number_of_parameters_is_the_models_own() -> None:
    config = load_config(SANDBOX[0])
    model = make_model(make_tokenizer([f"w{i}" for i in range(508)]), config.sft.shape, seed=0)
    assert model_size(config).parameters == sum(p.numel() for p in model.parameters())
    assert model_size(load_config(HH_7B)).parameters == 6_738_415_616, "Llama-2 7B"


def test_memory_by_hand() -> None:
    words = ["--meta.enabled", "false", "--resources.learner.recompute_activations", "false"]
    config = load_config(HH_7B, words)
    size = ModelSize(parameters=1_000_000, num_layers=2, hidden_size=100, vocab_size=1000)
    memory = {b.name: b.memory for b in bundles(config, size)}
    assert memory["rollout-0"] == 2 * 1_000_000  # bfloat16 weights
    assert memory["scorer-0"] == 4 * 2 * 1_000_000
    # learner: policy and critic with AdamW, reference, over 4 ranks; 4 sequences of 1024 tokens of 2 layers of 34 * 100; logits
    per_rank = (2 * 16_000_000 + 2_000_000) / 4
    assert memory["learner-0"] == int(per_rank + 34 * 4 * 1024 * 2 * 100 * 2 + 3 * 4 * 4 * 1024 * 1000)


def test_recomputing_keeps_one_value_per_token_and_layer() -> None:
    size = ModelSize(parameters=0, num_layers=10, hidden_size=8, vocab_size=7)
    share = load_config(HH_7B).resources.reward  # two ranks, bfloat16, recompute
    kept, layer = 6 * 16 * 10, 34 * 2 * 16  # 12 sequences of 16 tokens over two ranks; two at once
    assert activations(size, share, 12, 16, 2, with_logits=False) == (kept + layer) * 8 * 2


def test_placing() -> None:
    nodes = [Node(2, 0, 8 * GIB, 80 * GIB), Node(4, 1, 8 * GIB, 80 * GIB)]
    plan = place([bundle("a", 2), bundle("b", 1, gpus=1, memory=60 * GIB), bundle("c", 3)], nodes)
    assert plan.placed == (0, 1, 1) and not plan.shortfalls
    crowded = place([bundle("a", 3), bundle("b", 3)], nodes[1:])
    assert crowded.placed == (0, None)
    assert "b needs 3 CPU" in crowded.shortfalls[0] and "at most 1 CPU" in crowded.shortfalls[0]
    too_large = place([bundle("a", 1, gpus=1, memory=79 * GIB)], nodes)
    assert "more than 90% of its 1 GPU" in too_large.shortfalls[0] and "resources.learner.num_ranks" in too_large.shortfalls[0]
    full = place([bundle("a", 0.1, memory=8 * GIB - PROCESS + 1)], nodes[:1])
    assert full.placed == (None,), "a process needs memory of its own"
    assert place([], []).shortfalls == ()


def test_shape_must_suit_the_engine() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        ModelShape(hidden_size=100, num_heads=4)


def test_members_are_planned_whole_whatever_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(TINY, ["--data.denoise.method", "flip", "--resources.reward.num_ranks", "2"])
    size = model_size(config)
    member = member_bundle(config, size)
    assert member is not None and (member.num_cpus, member.num_gpus) == (0.25, 0.0)
    (alone,) = reward_bundles(load_config(TINY), size, metarm=False)
    assert member.memory == alone.memory > reward_bundles(config, size, metarm=False)[0].memory
    assert member_bundle(load_config(TINY), size) is None
    assert member_bundle(load_config(TINY, ["--data.denoise.method", "flip", "--data.denoise.strength", "x"]), size) is None
    seven = ["plan", str(HH_7B), "--node-cpus", "64", "--node-gpus", "8", "--node-memory-gib", "1000", "--gpu-memory-gib", "141"]
    assert main([*seven, "--data.denoise.method", "flip"]) == 0 and "10 fits of the ensemble" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*seven[:-2], "--gpu-memory-gib", "120", "--data.denoise.method", "flip"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Before that, for data.denoise" in printed and "10 fits of the ensemble" in printed
    assert "set strength.members to lora, or name strengths in data.denoise.strength" in printed
