"""A cluster on one machine whose autoscaler makes real Ray nodes: ray_config.yaml, with a fake provider in the cloud's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.command import ROOT
from tests.cluster.processes import end, free_port

BIN = Path(sys.executable).parent
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the fake provider knows no other
COMMANDS = [f"{part}setup_commands" for part in ("", "head_", "worker_")]
EMPTY_LISTS = [
    *COMMANDS, "initialization_commands", "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
    "rsync_exclude", "rsync_filter",
]  # fmt: skip
IDLE_S = 25
"""Longer than this machine needs to start three nodes, one after the other: one that waits for the others is idle."""


def fake(file: Path, gcs: str) -> dict[str, Any]:
    """A cluster file of ours with its node types, labels and limits, on nodes that this machine can play.

    Args:
        file: of ours.
        gcs: address of the head that will be.
    """
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    types = config["available_node_types"]
    types[HEAD_TYPE] = types.pop(config["head_node_type"]) | {"max_workers": 0}
    for name, kind in types.items():
        kind["node_config"] = {}
        kind.pop("docker", None)
        if name != HEAD_TYPE:
            kind["resources"] = {"CPU": 1, name: kind["resources"][name]}
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": gcs,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    replaced = {"provider": provider, "head_node_type": HEAD_TYPE, "idle_timeout_minutes": IDLE_S / 60, "docker": {}, "auth": {}}
    nothing = {key: [] for key in EMPTY_LISTS} | {"file_mounts": {}, "file_mounts_sync_continuously": False}
    return config | replaced | nothing


@dataclass
class Growing:
    """The head of such a cluster."""

    gcs: str
    environment: dict[str, str]
    client: Any
    """Ray's own, of the head."""
    seen: list[tuple[str, ...]] = field(default_factory=list)
    """The pools of the worker nodes, each time that they changed."""

    def workers(self) -> tuple[str, ...]:
        """The pools of the worker nodes that are alive, sorted; also written down."""
        now = tuple(sorted(pool for pool in self.pools() if pool != "head"))
        if not self.seen or self.seen[-1] != now:
            self.seen.append(now)
        return now

    def pools(self) -> list[str]:
        """The pools of all nodes that are alive, the head's too."""
        return [dict(node.labels)["pool"] for node in self.client.get_all_node_info().values() if node.state == 0]

    @contextmanager
    def driver(self, storage: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """``python -m cluster`` on this cluster, as a driver on its head; what it prints is STORAGE/printed."""
        with (storage / "printed").open("w") as output:
            run = subprocess.Popen(
                [sys.executable, "-m", "cluster", *arguments],
                cwd=ROOT, env=self.environment | {"RAY_ADDRESS": self.gcs, "RONDO_STORAGE": str(storage)},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield run
        finally:
            run.kill()
            run.wait()


@contextmanager
def growing(directory: Path, version: int) -> Iterator[Growing]:
    """Start such a cluster, and end it with all its nodes.

    Args:
        directory: for its file and logs.
        version: of Ray's autoscaler, 1 or 2.
    """
    from ray._private.services import get_node_ip_address
    from ray._raylet import GcsClient

    gcs = f"{get_node_ip_address()}:{free_port()}"
    file = directory / "cluster.yaml"
    file.write_text(yaml.safe_dump(fake(ROOT / "ray_config.yaml", gcs)))
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH", "RONDO_STORAGE")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head_environment = environment | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": str(version - 1),
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_agent_register_timeout_ms": "120000",
    }
    host, port = gcs.split(":")
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=0"]
    start += ["--labels=pool=head", f"--dashboard-agent-listen-port={free_port()}"]
    start += [f"--ray-client-server-port={free_port()}", "--include-dashboard=false", f"--autoscaling-config={file}"]
    log = directory / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(start, env=head_environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120

        def wait() -> None:
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

        while not _answers(host, int(port)):
            wait()
        cluster = Growing(gcs, environment, GcsClient(address=gcs))
        while not cluster.pools():
            wait()
        yield cluster
    finally:
        end(head)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
