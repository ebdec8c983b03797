"""A cluster of several Ray nodes on this machine, each a process group of its own, so that one can be lost without a word."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import psutil

BIN = Path(sys.executable).parent
TUNED: Mapping[str, int] = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 250,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Ray's own health checks find a node that is silent after some 16 s; these after 3.75 s at most."""
STORE_BYTES = 150_000_000
JOIN_S = 90.0
JOINED, STARTS = "Running subprocesses are monitored", 4
"""What ``ray start --block`` says once the cluster knows the node; how often one is started that does not come so far (Ray gives
it 30 s, which a busy machine may not keep)."""
HELD_BACK = ("RAY_ADDRESS", "PYTHONPATH", "RONDO_STORAGE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def with_parent(number: int) -> None:
    """In a new process: get a signal when the process that started it dies, so that nothing is left of a bench that is killed."""
    ctypes.CDLL(None).prctl(1, number)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    """One Ray node.

    Args:
        process: ``ray start --block``, the leader of a session of its own.
        labels: that it was started with.
        num_cpus: that it claims to have.
        log: what it printed.
        lost: whether it was killed.
    """

    process: subprocess.Popen[bytes]
    labels: Mapping[str, str]
    num_cpus: int
    log: Path
    lost: bool = False

    @property
    def joined(self) -> bool:
        """Whether the cluster knows it."""
        return JOINED in self.log.read_text()

    def decided(self) -> bool:
        """Whether it is known that it has come, or that it does not."""
        return self.joined or self.process.poll() is not None

    def family(self) -> list[psutil.Process]:
        """The node's own processes and the workers in it; none once it is gone."""
        try:
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def raylet(self) -> psutil.Process:
        """The process that speaks for the node."""
        return next(process for process in self.family() if process.name() == "raylet")

    def node_id(self) -> str:
        """Ray's id of it, as its raylet was told."""
        told = [word.split("=", 1)[1] for word in self.raylet().cmdline() if word.startswith(("--node_id=", "--node-id="))]
        return told[0] if told else ""

    def kill(self) -> None:
        """Lose the machine: every process of the node at once, those that are stopped too."""
        self.lost = True
        family = self.family()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait()

    def end(self) -> None:
        """An orderly end."""
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in psutil.wait_procs(family, timeout=5)[1]:
            process.kill()


class Nodes:
    """The head, which holds the driver and no role, and the nodes that joined it.

    Args:
        variables: environment of all nodes and of the drivers.
        system: Ray's settings of the whole cluster; ``TUNED`` or none.
        num_cpus: of the head; 0 leaves the roles to the other nodes.
    """

    def __init__(self, variables: Mapping[str, str], system: Mapping[str, int] = TUNED, num_cpus: int = 0) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rf-"))  # short: paths of sockets are
        self.port = free_port()
        ours = {key: value for key, value in os.environ.items() if key not in HELD_BACK}
        self.environment = ours | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **variables}
        self.environment["PATH"] = f"{BIN}:{self.environment['PATH']}"
        self.nodes: list[Node] = []
        self.system, self.num_cpus = system, num_cpus

    def __enter__(self) -> Nodes:
        try:
            settings = [f"--system-config={json.dumps(dict(self.system))}"] if self.system else []
            head = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.directory}/ray"]
            self._start([*head, "--node-ip-address=127.0.0.1", *settings], self.num_cpus, {"pool": "head"})
            self._until(lambda: _answers(self.port), "the head does not answer")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    @property
    def head(self) -> Node:
        """The first node."""
        return self.nodes[0]

    def add(self, pool: str, num_cpus: int = 1, wait: bool = True) -> Node:
        """Start a node.

        Args:
            pool: value of its label.
            num_cpus: that it claims to have.
            wait: False goes on at once; ``settle`` waits later.
        """
        node = self._start([f"--address={self.address}"], num_cpus, {"pool": pool})
        if not wait:
            return node
        self.settle()
        return self.nodes[-1]

    def settle(self) -> None:
        """Wait until every node that was started is there; one that could not come is started again.

        Raises:
            RuntimeError: if one does not come.
        """
        for _ in range(STARTS):
            mine = [node for node in self.nodes[1:] if not node.lost]
            for node in mine:
                self._until(partial(Node.decided, node), "a node does not start")
            failed = [node for node in mine if not node.joined]
            if not failed:
                return
            for node in failed:
                node.lost = True
                node.end()
                self._start([f"--address={self.address}"], node.num_cpus, node.labels)
        raise RuntimeError(f"a node does not come: {self.nodes[-1].log.read_text()}")

    def alive(self) -> list[Node]:
        """Nodes that were not killed."""
        return [node for node in self.nodes if node.process.poll() is None]

    def ask(self, program: str, *arguments: str, seconds: float = 120) -> str:
        """Run a small program that is connected to the cluster; what it printed.

        Args:
            program: Python; ``ray`` is imported and connected.
            arguments: in ``sys.argv[1:]``.
            seconds: longest wait.
        """
        preamble = "import sys, json, ray\nray.init(address=sys.argv.pop(1), log_to_driver=False, configure_logging=False)\n"
        done = subprocess.run(
            [sys.executable, "-c", preamble + program, self.address, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the cluster did not answer: {done.stderr[-2000:]}")
        return done.stdout

    def _start(self, arguments: Sequence[str], num_cpus: int, labels: Mapping[str, str]) -> Node:
        words = [f"{key}={value}" for key, value in labels.items()]
        command = [str(BIN / "ray"), "start", "--block", f"--num-cpus={num_cpus}", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--labels={','.join(words)}", f"--dashboard-agent-listen-port={free_port()}", *arguments]
        log = self.directory / f"node-{len(self.nodes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(with_parent, signal.SIGTERM),
            )
        self.nodes.append(Node(process, labels, num_cpus, log))
        return self.nodes[-1]

    def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + JOIN_S
        while not true():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {self.nodes[-1].log.read_text()}")
            time.sleep(0.1)

    def _end(self) -> None:
        for node in reversed(self.nodes):
            node.end()
        shutil.rmtree(self.directory, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
