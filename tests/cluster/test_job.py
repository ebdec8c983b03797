"""``ray job submit`` on a real local cluster with a token: the run lands in the storage root and outlives the job."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.command import ROOT

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class LocalCluster:
    """A head node with a dashboard on loopback."""

    dashboard: str
    environment: dict[str, str]

    def submit(self, storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        runtime = json.dumps({"env_vars": {"RONDO_STORAGE": str(storage)}})
        job = ["job", "submit", "--address", self.dashboard, "--working-dir", ".", "--runtime-env-json", runtime, "--"]
        return subprocess.run(
            [str(BIN / "ray"), *job, "python", "-m", "cluster", *arguments],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def actors(self) -> list[str]:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.dashboard}/api/v0/actors?detail=1", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return [actor["name"] for actor in json.load(answer)["data"]["result"]["result"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH", "RONDO_STORAGE")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{BIN}:{environment['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = tmp_path_factory.mktemp("head") / "log"
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    start += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    with log.open("w") as output:
        head = subprocess.Popen(start, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(address):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield LocalCluster(address, environment)
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # without the token: 401
    except OSError:
        return False
    return True


def test_job_runs_and_its_report_outlives_it(cluster: LocalCluster, tmp_path: Path) -> None:
    first = cluster.submit(tmp_path, "run", "tests/cluster/tiny.yaml", "--name", "tiny-job")
    assert first.returncode == 0 and "succeeded" in first.stdout, first.stdout[-3000:] + first.stderr[-2000:]
    run = tmp_path / "runs" / "tiny-job"
    assert (run / "report.html").stat().st_size > 10_000
    assert len(json.loads((run / "ledger.json").read_text())["rounds"]) == 2
    assert {"tiny-job/rollout-0", "tiny-job/reward-0", "tiny-job/scorer-0", "tiny-job/learner-0"} <= set(cluster.actors())
    again = cluster.submit(tmp_path, "run", "tests/cluster/tiny.yaml", "--name", "tiny-job")
    assert again.returncode == 0 and "rounds are done" in again.stdout, again.stdout[-3000:]


def test_bad_input_fails_the_job_with_one_clear_message(cluster: LocalCluster, tmp_path: Path) -> None:
    done = cluster.submit(tmp_path, "run", "tests/cluster/tiny.yaml", "--rounds.num_rounds", "0")
    assert done.returncode == 1 and "error: " in done.stdout and "rounds.num_rounds" in done.stdout
    assert "Traceback" not in done.stdout


def test_without_the_token_nothing_is_accepted(cluster: LocalCluster) -> None:
    for path in ("/api/jobs/", "/api/v0/actors"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(cluster.dashboard + path, timeout=10)
