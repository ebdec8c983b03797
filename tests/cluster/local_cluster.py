"""A real Ray cluster of one node on free ports, with a dashboard on loopback, and its end."""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.command import ROOT

BIN = Path(sys.executable).parent
OURS = ("RAY_ADDRESS", "PYTHONPATH", "RONDO_STORAGE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class LocalCluster:
    """A head node.

    Args:
        dashboard: its address.
        environment: of processes that talk to it.
    """

    dashboard: str
    environment: dict[str, str]

    def submit(self, storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line as a job, and wait for it."""
        runtime = json.dumps({"env_vars": {"RONDO_STORAGE": str(storage)}})
        job = ["job", "submit", "--address", self.dashboard, "--working-dir", ".", "--runtime-env-json", runtime, "--"]
        return subprocess.run(
            [str(BIN / "ray"), *job, "python", "-m", "cluster", *arguments],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def ask(self, path: str) -> Any:
        """A question to the dashboard's own API."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_token(path: Path) -> Path:
    """A file with a token that only its owner reads."""
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


@contextmanager
def head_node(log: Path, options: Sequence[str] = (), **variables: str) -> Iterator[LocalCluster]:
    """Start a cluster of one node, and end it."""
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", **variables}
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    start += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", *options]
    with log.open("w") as output:
        head = subprocess.Popen(start, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{address}/api/version"):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield LocalCluster(address, environment)
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()


def answers(address: str) -> bool:
    """True if somebody listens, were it to ask for a token."""
    try:
        urllib.request.urlopen(address, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
