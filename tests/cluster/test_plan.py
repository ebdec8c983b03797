"""What would run where: arithmetic by hand, the shipped recipes, and shortfalls in words."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.load_config import load_config
from cluster.model_sizes import model_size, reward_size, size_of_shape
from cluster.plan import CPU_HEAD_SIZES, GIB, PROCESS, Bundle, Node, bundles, member_bundle, place, reward_bundles
from policy.sft import make_model
from sandbox.tokenizer import make_tokenizer
from tests.cluster.command import ROOT, TINY
from tokens.errors import UserError
from tokens.shape import ModelShape

HH_70B = ROOT / "configs" / "hh_70b.yaml"
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


def test_labels_are_honoured_where_nodes_have_them() -> None:
    asked = [replace(bundle(f"learner-{i}", 4, 1), labels={"pool": "trainer"}) for i in range(2)]
    trainer, other = Node(8, 1, 80 * GIB, 80 * GIB, {"pool": "trainer"}), Node(64, 8, 80 * GIB, 80 * GIB, {"pool": "rollout"})
    plan = place(asked, [other, trainer])
    assert plan.placed == (1, None)
    assert "learner-1 needs 4 CPU, 1 GPU" in plan.shortfalls[0] and "on pool=trainer; at most 4 CPU, 0 GPU" in plan.shortfalls[0]
    assert "on pool=trainer: none of the 1 nodes has these labels" in place(asked, [other]).shortfalls[0]
    unknown = replace(other, labels=None)
    assert place(asked, [unknown]).placed == (0, 0), "labels that are not known are not looked at"


def test_a_fraction_of_a_gpu_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    part = ["--resources.scorer.num_gpus", "0.5", "--resources.scorer.fraction_reason", "its models are small"]
    assert main(["plan", str(SANDBOX[0]), *part, "--node-cpus", "4", "--node-gpus", "1"]) == 0
    assert "0.5 of a GPU because its models are small" in " ".join(re.sub("[│ ]+", " ", capsys.readouterr().out).split())


def test_number_of_parameters_is_the_models_own() -> None:
    config = load_config(SANDBOX[0])
    model = make_model(make_tokenizer([f"w{i}" for i in range(508)]), config.sft.shape, seed=0)
    assert model_size(config).parameters == sum(p.numel() for p in model.parameters())
    assert model_size(load_config(HH_7B)).parameters == 6_738_415_616, "Llama-2 7B"


def test_grouped_heads_are_made_and_counted(tmp_path: Path) -> None:
    shape = ModelShape(hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2)
    tokenizer = make_tokenizer([f"w{i}" for i in range(508)])
    model = make_model(tokenizer, shape, seed=0)
    size = size_of_shape(shape, tied=True)
    assert size.parameters == sum(p.numel() for p in model.parameters()) and model.config.num_key_value_heads == 2
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert (size.layer, size.root) == (layer, size.parameters - 3 * layer)
    model.save_pretrained(tmp_path / "model")
    stored = model_size(load_config(TINY, ["--sft.model", str(tmp_path / "model")]))
    assert stored == size and stored.products == size.parameters
    config = load_config(TINY, ["--reward.base", str(tmp_path / "model"), "--reward.shape.num_layers", "9"])
    assert reward_size(config, size).products == 3 * layer + 64, "the directory is there, so its stand-in is not read"


def test_shapes_that_stand_in() -> None:
    config = load_config(HH_70B)
    policy = model_size(config)
    critic = reward_size(config, policy)
    assert policy.parameters == 70_553_706_496, "Llama-3 70B"
    assert critic.parameters == 8_030_261_248 - 128_256 * 4096, "Llama-3 8B without its head"
    assert policy.products == policy.parameters - 128_256 * 8192 and critic.products == critic.parameters - 128_256 * 4096
    for words, said in (
        (["--reward.shape.num_layers", "3"], "reward.base"),
        (["--reward.base", "X", "--reward.shape.num_layer", "3"], "did you mean num_layers"),
        (["--sft.shape.num_kv_heads", "3"], "num_heads must be a multiple of num_kv_heads, got 2 and 3"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(HH_7B if "kv" not in words[0] else TINY, words)


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


def test_a_model_passes_through_its_machines_memory() -> None:
    rank = replace(bundle("a", 1, gpus=1, memory=60 * GIB), host=20 * GIB)
    plan = place([rank, replace(rank, name="b")], [Node(4, 4, 30 * GIB, 80 * GIB)])
    assert plan.placed == (0, None) and "20.8 GiB of its machine's memory" in plan.shortfalls[0]
    seven, size = load_config(HH_7B), model_size(load_config(HH_7B))
    hosts = {b.name: b.host for b in bundles(seven, size)}
    critic = size.without_head().parameters
    assert hosts["learner-1"] == 4 * size.parameters and hosts["reward-0"] == 4 * critic and hosts["scorer-0"] == 2 * critic
    assert hosts["learner-0"] == 4 * size.parameters + 8 * (size.parameters + critic), "the policy and both optimizers"


def test_every_scorer_holds_all_members() -> None:
    config, alone = (load_config(HH_7B, ["--resources.scorer.num_ranks", str(number)]) for number in (3, 1))
    found, (one,) = ([b for b in bundles(each, model_size(each)) if b.role == "scorer"] for each in (config, alone))
    assert [replace(b, name=one.name) for b in found] == [one] * 3
    assert [b.name for b in found] == ["scorer-0", "scorer-1", "scorer-2"]


def test_70b_fits_on_eight_nodes_of_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["plan", str(HH_70B), "--nodes", "8", "--node-cpus", "112", "--node-gpus", "8", "--node-memory-gib", "2048"]
    for memory in ("80", "141"):
        assert main([*nodes, "--gpu-memory-gib", memory]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "70,553.7 M parameters" in printed and "7,504.9 M" in printed and "Asked of Ray: 548 CPU, 61 GPU" in printed
    config = load_config(HH_70B)
    plan = place(bundles(config, model_size(config)), (Node(112, 8, 2048 * GIB, 80 * GIB),) * 8)
    engines = [node for bundle, node in zip(plan.bundles, plan.placed, strict=True) if bundle.role == "rollout"]
    assert len(set(engines)) == 3, "an engine's eight GPUs are one node's"
    learners = [node for bundle, node in zip(plan.bundles, plan.placed, strict=True) if bundle.role == "learner"]
    assert max(learners.count(node) for node in set(learners)) == 7
    assert main([*nodes, "--gpu-memory-gib", "40"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "raise resources.learner.num_ranks" in printed and "lower scorer.num_members" in printed
    assert main([*nodes, "--gpu-memory-gib", "141", "--rollout.tensor_parallel", "1", "--resources.rollout.num_gpus", "1"]) == 1
    assert "raise rollout.tensor_parallel" in " ".join(capsys.readouterr().out.split())


def test_engines_over_several_gpus_are_asked_for_clearly() -> None:
    assert load_config(HH_7B, ["--rollout.tensor_parallel", "2", "--resources.rollout.num_gpus", "2"])
    for config, words, said in (
        (TINY, ["--rollout.tensor_parallel", "2"], "on the CPU an engine is one process"),
        (HH_7B, ["--rollout.tensor_parallel", "4"], "rollout.tensor_parallel is 4 and resources.rollout.num_gpus 1"),
        (HH_7B, ["--resources.rollout.num_gpus", "2"], "rollout.tensor_parallel is 1 and resources.rollout.num_gpus 2"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(config, words)
    three = load_config(HH_7B, ["--rollout.tensor_parallel", "3", "--resources.rollout.num_gpus", "3"])
    with pytest.raises(UserError, match="the policy has 32 heads"):
        bundles(three, model_size(three))


def test_plan_says_what_a_process_holds_and_how_long_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["plan", str(HH_7B), "--node-cpus", "64", "--node-gpus", "8", "--node-memory-gib", "1000", "--gpu-memory-gib", "141"]
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("policy optimizer", "MetaRM's copies", "512.0 KiB a token", "225 sequences of 1024 tokens", "they fit at once"):
        assert said in printed
    for said in ("sample: responses │ memory │ 6.91", "score │ compute │ 22.61", "policy: update │ compute │ 14.16", "an H200"):
        assert said in printed, printed
    assert "a lower bound at the assumed efficiency" in printed and "with policy.max_lag 1 or more" in printed
    assert main(["plan", str(SANDBOX[0]), "--node-cpus", "2", "--node-memory-gib", "8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Times are planned for GPUs only, and rollout, reward, scorer, learner would compute on CPUs" in printed
    assert "seconds" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mfu", "1.5"], "--mfu is 1.5: a share above 0 and at most 1"),
        (["--gpu-tflops", "0"], "--gpu-tflops is 0: a number above 0"),
        (["--mean-response", "600"], "--mean-response is 600: a number above 0 and at most rollout.max_new_tokens \\(512\\)"),
        (["--num-pairs", "0"], "--num-pairs is 0"),
        (["--gpu-tflop", "3"], "unknown key gpu_tflop"),
    ],
)
def test_options_that_make_no_sense(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(HH_7B), "--node-gpus", "8", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_plan_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'ray'}"
    code = f"import sys\nfrom cluster.cli import main\nmain(sys.argv[1:])\nassert not {heavy} & set(sys.modules)"
    command = [sys.executable, "-c", code, "plan", str(HH_7B), "--node-gpus", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{available_node_types: {head: {}, gpu: {}}, head_node_type: head, max_workers: 1}",
            "says nothing of its resources",
        ),
        ("{kind: RayJob, metadata: {}, spec: {}}", "is no whole RayJob: spec.rayClusterSpec is missing"),
        ("{kind: RayCluster, spec: {}}", "is no whole RayCluster: metadata is missing"),
    ],
)
def test_a_cluster_file_that_is_not_whole(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    assert main(["plan", str(TINY), "--cluster", str(tmp_path / "cluster.yaml")]) == 2
    assert words in capsys.readouterr().err


def test_the_names_of_a_cluster_file_do_not_style_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = "{resources: {CPU: 8, memory: 28000000000}, max_workers: 1}"
    text = f"{{available_node_types: {{head: {{}}, 'x[/][red]': {kind}}}, head_node_type: head, max_workers: 1}}"
    (tmp_path / "cluster.yaml").write_text(text)
    assert main(["plan", str(TINY), "--cluster", str(tmp_path / "cluster.yaml")]) == 0
    assert "1 x x[/][red]: 8 CPU" in capsys.readouterr().out


def test_plan_says_when_a_run_may_end_and_counts_its_judges(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds.stop.patience", "2", "--evaluation.judge", "held_out", "--evaluation.held_out_members", "4"]
    main(["plan", str(TINY), *words])
    said = " ".join(re.sub("[│ ]+", " ", capsys.readouterr().out).split())
    assert "It ends sooner once 2 round(s) in a row bring no better judgement by held-out reward models (rounds.stop)." in said
    assert "4 held-out reward models are fitted at the start, on the pairs of 20% of the prompts" in said
    assert "6 reward models, 4 of them held out" in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's import
def test_heads_that_vllm_has_no_attention_for_on_cpus() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
    config = load_config(TINY, ["--sft.shape.num_heads", "4"])
    with pytest.raises(UserError, match=r"heads are 16 wide .* for 32, 64, .* only: take another sft\.shape\.num_heads"):
        bundles(config, model_size(config))
    rollout = config.resources.rollout.model_copy(update={"num_gpus": 1})
    on_gpus = config.model_copy(update={"resources": config.resources.model_copy(update={"rollout": rollout})})
    assert bundles(on_gpus, model_size(on_gpus))
