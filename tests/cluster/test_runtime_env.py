"""The files for ``ray job submit --runtime-env``: what Ray makes of them, and an environment that a node builds from the lock."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from tests.cluster.command import ROOT, TINY
from tests.cluster.test_job import DEPLOY, LocalCluster, head_node

FILES = sorted(DEPLOY.glob("runtime_env*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_takes_the_file_and_it_names_no_machine(file: Path) -> None:
    text = file.read_text()
    settings = RuntimeEnv(**yaml.safe_load(text))
    assert int(settings.env_vars()["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60, "a step and a save take longer than Ray's 3 s"
    assert not re.search(r"://|(^|[\s\"'=])/\w|~/|@", text), "no host, no path of one machine"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_built_environment_is_the_lock_and_nothing_that_a_resolver_adds(kind: str) -> None:
    uv = yaml.safe_load((DEPLOY / f"runtime_env_{kind}.yaml").read_text())["uv"]
    assert uv["packages"] == [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/requirements-{kind}.txt"]
    assert "--no-deps" in uv["uv_pip_install_options"]
    assert f'UV_VERSION = "{uv["uv_version"].removeprefix("==")}"' in (ROOT / "scripts" / "setup.py").read_text()
    assert any(line.startswith("ray==") for line in (ROOT / f"requirements-{kind}.txt").read_text().splitlines())


@pytest.fixture
def bare_cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A node that has Ray and no more."""
    base, lock = tmp_path / "base", ROOT / "requirements-cpu.txt"
    subprocess.run([sys.executable, "-m", "venv", str(base)], check=True)
    install = [str(base / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(lock), "ray[default]==2.60.0"]
    subprocess.run(install, check=True)
    configured = subprocess.run(
        [str(base / "bin" / "python"), "-m", "pip", "config", "get", "global.find-links"],
        capture_output=True,
        text=True,
        check=False,
    )
    links = os.environ.get("UV_FIND_LINKS") or configured.stdout.strip()
    torch = {"UV_FIND_LINKS": links} if links else {"UV_TORCH_BACKEND": "cpu"}
    session = tempfile.mkdtemp(prefix="ray")  # the sockets' names must be short, and 4 GB must not stay
    try:
        options = ("--temp-dir", session)
        with head_node(tmp_path / "log", base / "bin", options, RAY_AUTH_MODE="disabled", **torch) as head:
            yield head
    finally:
        shutil.rmtree(session)


@pytest.mark.slow
def test_a_node_with_nothing_but_ray_builds_the_environment_and_runs_a_round(bare_cluster: LocalCluster, tmp_path: Path) -> None:
    small = ("--name", "built", "--rounds.num_rounds", "1", "--policy.steps_per_round", "1")
    done = bare_cluster.submit(tmp_path, "run", str(TINY.relative_to(ROOT)), *small, environment="runtime_env_cpu.yaml")
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout[-5000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "built" / "report.html").exists()
