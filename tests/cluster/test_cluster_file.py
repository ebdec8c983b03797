"""The cluster files are ones that Ray accepts, on which the roles can be placed, and in which no door stands open."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.load_config import load_config
from cluster.model_sizes import model_size
from cluster.node_types import impossible, of_cluster_file
from cluster.plan import GIB, Node, bundles, place
from tests.cluster.command import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
VMS = [ROOT / "ray_config.yaml", DEPLOY / "gcp.yaml"]
GPU_GIB = {"L4": 24, "L40S": 48, "H100": 80, "H200": 141}
NO_PLACEHOLDERS = {
    "CPU", "GPU", "SPOT", "TERMINATE", "PERSISTENT", "NVIDIA", "RONDO_STORAGE", "RAY_AUTH_MODE", "RAY_HEAD_IP",
    "PYTHONPATH", "RAY_JOB_STOP_WAIT_TIME_S",
}  # fmt: skip
"""Words in capitals that mean something to Ray, to a cloud or to Rondo as they stand."""


def read(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text())
    assert isinstance(tree, dict)
    return tree


def prepared(path: Path) -> dict[str, Any]:
    """A cluster file as Ray's autoscaler reads it; what is wrong with it is raised."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = read(path)
    if "kind" in tree:
        cluster = tree if tree["kind"] == "RayCluster" else {"metadata": tree["metadata"], "spec": tree["spec"]["rayClusterSpec"]}
        return dict(_derive_autoscaling_config_from_ray_cr(cluster))
    config: dict[str, Any] = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


@pytest.mark.parametrize("path", VMS, ids=lambda path: path.name)
def test_ray_accepts_the_cluster_files(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared(path)
    with pytest.raises(Exception, match="ppo"):
        validate_config(prepare_config(read(path) | {"ppo": 1}))


@pytest.mark.parametrize("path", VMS, ids=lambda path: path.name)
def test_the_head_trains_nothing_and_the_dashboard_is_not_open(path: Path) -> None:
    config = read(path)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("path", VMS, ids=lambda path: path.name)
def test_every_node_gets_the_token_and_no_file_holds_it(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"] == {"/home/rondo/.ray/auth_token": "~/.ray/auth_token"}
    for kind in ("head", "worker"):
        command = config[f"{kind}_start_ray_commands"][-1]
        assert re.match(r"RAY_AUTH_MODE=token (RAY_health_check_[a-z_]+=\d+ )*ray start", command)
        assert command.count("RAY_health_check_") == (3 if kind == "head" else 0), "it is the head that looks after the others"
        assert config[f"{kind}_setup_commands"] == ["chmod 600 ~/.ray/auth_token"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"], "jobs and `ray exec` need it too"
    assert "RAY_AUTH_TOKEN=" not in path.read_text()


def words_of(tree: Any) -> set[str]:
    """Words of two capitals and more, in keys and values; comments are not among them."""
    if isinstance(tree, dict):
        return {word for key, value in tree.items() for word in words_of(key) | words_of(value)}
    if isinstance(tree, list):
        return {word for value in tree for word in words_of(value)}
    return set(re.findall(r"\b[A-Z][A-Z_]*[A-Z]\b", str(tree)))


def test_what_must_be_set_stands_on_the_page() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    found = set()
    for path in (
        *VMS,
        *(DEPLOY / name for name in ("raycluster.yaml", "rayjob.yaml", "storage.yaml", "head-fault-tolerance.yaml")),
    ):
        placeholders = words_of(read(path)) - NO_PLACEHOLDERS
        assert all(f"`{word}`" in page for word in placeholders), (path.name, placeholders)
        found |= placeholders
    assert found == {"REGISTRY", "IMAGE_ID", "FILE_SYSTEM_ID", "PROJECT_ID", "FILESTORE_ADDRESS", "STORAGE_CLASS"}


def test_every_machine_has_an_image_with_a_driver_for_cuda_13() -> None:
    assert re.search(r"^cuda-toolkit==13\.", (ROOT / "requirements-gpu.txt").read_text(), re.MULTILINE), "580 is CUDA 13's oldest"
    for kind in read(VMS[0])["available_node_types"].values():
        assert kind["node_config"]["ImageId"] == "IMAGE_ID", "Ray's own default has a driver of 2022"
    for kind in read(VMS[1])["available_node_types"].values():
        image = kind["node_config"]["disks"][0]["initializeParams"]["sourceImage"]
        assert int(image.rpartition("nvidia-")[2]) >= 580
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert page.count("NVIDIA driver 580 or later") == 2, "for machines and for Kubernetes"


@pytest.mark.parametrize("path", [*VMS, DEPLOY / "raycluster.yaml", DEPLOY / "rayjob.yaml"], ids=lambda path: path.name)
def test_nodes_come_and_go(path: Path) -> None:
    config = prepared(path)
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert all(kind["labels"]["pool"] == name for name, kind in workers.items())
    assert 0 < config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("path", [*VMS, DEPLOY / "raycluster.yaml"], ids=lambda path: path.name)
def test_the_roles_of_the_7b_recipe_fit_the_node_types(path: Path) -> None:
    config = load_config(ROOT / "configs" / "hh_7b.yaml")
    asked = bundles(config, model_size(config))
    types = of_cluster_file(prepared(path))
    assert {bundle.labels["pool"] for bundle in asked} == {"rollout", "trainer", "scorer"} < {kind.name for kind in types}
    assert impossible(asked, types) == ()
    nodes = []
    for kind in types:
        assert kind.labels is not None
        gpus, label = (kind.resources["GPU"], "ray.io/accelerator-type") if "GPU" in kind.resources else (0.0, "")
        gpu_memory = GPU_GIB[kind.labels[label]] * GIB if gpus else 0
        nodes += [Node(kind.resources["CPU"], gpus, int(kind.resources["memory"]), gpu_memory, kind.labels)] * kind.max_count
    plan = place(asked, nodes)
    assert plan.shortfalls == (), "GPU memory and the machines' memory too"
    big = load_config(ROOT / "configs" / "hh_70b.yaml")
    assert "rollout-0 to 2 need 16 CPU, 8 GPU on pool=rollout, and no node type can hold that" in impossible(
        bundles(big, model_size(big)), types
    )[0]  # fmt: skip


def test_the_quickstart_fits_the_cpu_nodes() -> None:
    roles = ("rollout", "reward", "scorer", "learner")
    pool = [word for role in roles for word in (f"--resources.{role}.labels.pool", "cpu")]
    config = load_config(ROOT / "configs" / "quickstart.yaml", pool)
    for path in (*VMS, DEPLOY / "raycluster.yaml", DEPLOY / "rayjob.yaml"):
        assert impossible(bundles(config, model_size(config)), of_cluster_file(prepared(path))) == ()


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kubernetes_pods(name: str) -> None:
    tree = read(DEPLOY / name)
    assert tree["apiVersion"] == "ray.io/v1"
    spec = tree["spec"] if tree["kind"] == "RayCluster" else tree["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    lock = (ROOT / "requirements-cpu.txt").read_text()
    assert f"\nray=={spec['rayVersion']}\n" in lock, "KubeRay decides by it what Ray can do"
    claim = read(DEPLOY / "storage.yaml")
    assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {"name": "rondo", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in pod["volumes"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], "what Ray counts on is there"
        assert {"name": "RONDO_STORAGE", "value": "/mnt/rondo"} in container["env"]
        assert {"name": "rondo", "mountPath": "/mnt/rondo"} in container["volumeMounts"]


def test_the_dashboard_of_a_raycluster_is_on_loopback_and_a_rayjob_submits_through_a_service() -> None:
    head = read(DEPLOY / "raycluster.yaml")["spec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "dashboard-host": "127.0.0.1"} and "serviceType" not in head
    job = read(DEPLOY / "rayjob.yaml")["spec"]
    assert "serviceType" not in job["rayClusterSpec"]["headGroupSpec"], "no address outside the Kubernetes cluster"
    assert job["shutdownAfterJobFinishes"] is True and job["backoffLimit"] > 0
    assert "-m cluster run configs/quickstart.yaml" in job["entrypoint"]
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RONDO_STORAGE"] == "/mnt/rondo"


def test_fault_tolerance_is_a_patch_of_the_raycluster() -> None:
    patch = read(DEPLOY / "head-fault-tolerance.yaml")
    assert set(patch) == {"spec"} and set(patch["spec"]) == {"gcsFaultToleranceOptions"}
    options = patch["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] and set(options["redisPassword"]) == {"valueFrom"}, "a Secret, never the password"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_are_linted_and_run_as_nobody_special(kind: str) -> None:
    path = DEPLOY / f"Dockerfile.{kind}"
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(lint), "--failure-threshold", "info", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert "\nUSER 1000\n" in text and f"setup.py {kind}" in text
    assert f"/{path.relative_to(ROOT)} " in text.replace("-f ", "/"), "its own first lines say how to build it"
    packages = re.findall(r"--no-install-recommends \\\n(.*?)\\\n", text)[0].split()
    assert {"rsync", "openssh-client", "wget"} <= set(packages), (
        "`ray up` needs the first two, KubeRay's probes up to 1.5 the last"
    )


def test_an_image_gets_the_code_and_nothing_else_of_a_checkout() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*" and lines[-1] == "**/__pycache__"
    assert all(line.startswith("!") for line in lines[1:-1])
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    needed = packages | {"configs", "scripts", "LICENSE", "requirements-cpu.txt", "requirements-gpu.txt"}
    assert {line[1:] for line in lines[1:-1]} == needed and {"cluster", "tokens"} < packages
    for kind in ("cpu", "gpu"):
        copies = re.findall(r"^COPY --chown=rondo:rondo (.*) \S+$", (DEPLOY / f"Dockerfile.{kind}").read_text(), re.MULTILINE)
        assert {source for copy in copies for source in copy.split()} == needed & {
            "requirements-cpu.txt",
            "requirements-gpu.txt",
            "scripts",
        } | {"."}


def test_plan_takes_a_cluster_file(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(ROOT / "configs" / "hh_70b.yaml"), "--cluster"]
    assert main([*plan, str(VMS[0])]) == 1
    said = capsys.readouterr().out
    assert "8 x rollout: 8 CPU, 1 GPU; 2 x trainer: 192 CPU, 8 GPU" in said
    assert "rollout-0 needs 16 CPU, 8 GPU" in said and "on pool=rollout; at most 8 CPU, 1 GPU" in said
    for path, wrong in (
        (ROOT / "configs" / "hh_7b.yaml", "is no cluster file: available_node_types is missing"),
        (DEPLOY / "storage.yaml", "is a PersistentVolumeClaim: a RayCluster or RayJob is expected"),
        (DEPLOY / "nowhere.yaml", "there is no config file"),
    ):
        assert main([*plan, str(path)]) == 2
        assert wrong in capsys.readouterr().err
