"""A run whose engines come and go: a node appears while it samples, is killed while its engine has prompts, another appears."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster.load_config import load_config
from cluster.placement import weight_transfer
from cluster.run_directory import config_sha256
from evaluation.records import EvaluationRow, MetaRow, read_rows
from evaluation.timeline import DRIVER, read_timeline
from tests.cluster.command import ROOT, TINY, Command
from tests.cluster.processes import free_port
from tokens.errors import UserError

BIN = Path(sys.executable).parent
QUICK = json.dumps({"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3})
"""A node that says nothing is dead after 2 s; Ray's own setting is some 16 s."""
REQUEST = """
import sys, ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print((_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]").decode(), flush=True)
"""


@dataclass
class Nodes:
    """A head node with one CPU, and more nodes by hand."""

    directory: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", *arguments]
        log = (self.directory / f"node-{len(self.started)}").open("wb")
        node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        log.close()
        self.started.append(node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """A node that goes without a word, with all that runs there."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def requested(self) -> object:
        done = subprocess.run(
            [sys.executable, "-c", REQUEST, self.address], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def until_requested(self, wanted: list[dict[str, float]], seconds: float = 60) -> None:
        """Wait for a request: who holds it is started with the first one."""
        deadline = time.monotonic() + seconds
        while (found := self.requested()) != wanted:
            assert time.monotonic() < deadline, found


@pytest.fixture
def nodes(tmp_path: Path, command: Command) -> Iterator[Nodes]:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{command.path}"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RONDO_STORAGE": str(command.storage)}
    made = Nodes(tmp_path, environment)
    made.start("--head", f"--port={made.port}", "--include-dashboard=false", f"--system-config={QUICK}")
    yield made
    for node in reversed(made.started):
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(timeout=60)


class Watched:
    """A run in the background, and what it has written so far."""

    def __init__(self, nodes: Nodes, path: Path, *arguments: str) -> None:
        self.path, self.seen = path, 0
        environment = nodes.environment | {"RAY_ADDRESS": nodes.address}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "run", *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def rows(self) -> list[dict[str, object]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def until(self, event: str, engine: str) -> dict[str, object]:
        """Wait for an event of the pool that comes after the last one that was waited for."""
        found: list[tuple[int, dict[str, object]]] = []

        def look() -> bool:
            rows = list(enumerate(self.rows()))[self.seen :]
            found[:] = [(n, row) for n, row in rows if "event" in row and (row["event"], row["engine"]) == (event, engine)]
            return bool(found)

        self.wait(look)
        self.seen = found[0][0] + 1
        return found[0][1]

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.process.communicate()[0])
            time.sleep(0.05)

    def says(self, words: str) -> int:
        """How often the pool's log says something."""
        log = self.path / "logs" / "rollout-pool.log"
        return log.read_text().count(words) if log.is_file() else 0


def engine_on(node: subprocess.Popen[bytes]) -> psutil.Process:
    """The one process of a node that is a rollout engine."""
    below = psutil.Process(node.pid).children(recursive=True)
    (engine,) = [process for process in below if "RolloutEngine" in " ".join(process.cmdline())]
    return engine


def come_and_go(nodes: Nodes, run: Watched) -> str:
    """What happens to the run; returns what it said."""
    processes = run.path / "processes.json"
    run.wait(lambda: processes.is_file() and run.says("holds policy version 0") == 1)
    core = psutil.Process(json.loads(processes.read_text())["rollout-0"]["pid"])
    core.suspend()  # it gets a piece of the first batch, SFT's evaluation, and does not get on with it
    run.until("asked", "rollout-1")
    nodes.until_requested([{"CPU": 0.25}] * 5)
    node = nodes.start(f"--address={nodes.address}")
    joined = run.until("joined", "rollout-1")
    run.wait(lambda: run.says("rollout-1 answers") == 1)
    extra = engine_on(node)
    extra.suspend()
    core.resume()
    run.wait(lambda: run.says("rollout-1 takes") == 2)  # of S_0
    nodes.kill(node)
    extra.kill()
    assert run.until("died", "rollout-1")["node"] == joined["node"]
    assert run.until("asked", "rollout-1")["pool/engines"] == 1
    output = run.process.communicate(timeout=200)[0]
    assert run.process.returncode == 0, output
    return output


def test_a_run_whose_nodes_come_and_go(tiny_run: tuple[Path, object], command: Command, nodes: Nodes) -> None:
    fixed, path = tiny_run[0], command.storage / "runs" / "elastic"
    arguments = ["--name", "elastic", "--rounds.num_rounds", "1", "--rollout.max_engines", "2"]
    with Watched(nodes, path, str(TINY), *arguments) as run:
        output = come_and_go(nodes, run)
    assert "rollout-1 on node" in output and "died" in output
    batches = [row for row in run.rows() if row["phase"] == "pool" and "event" not in row]
    assert [row["pool/took_part"] for row in batches] == [2, 1, 1, 1, 1], "SFT's evaluation, S_0, two steps, the evaluation"
    assert [row["pool/redone"] for row in batches] == [0, 1, 0, 0, 0]
    nodes.until_requested([])
    for name in ("start/evaluation.parquet", "rounds/round_000/evaluation.parquet"):
        assert len(read_rows(path / name, EvaluationRow)) == 24
    ours, theirs = (read_rows(run_ / "start" / "evaluation.parquet", EvaluationRow) for run_ in (path, fixed))
    assert [(row.prompt_id, row.response) for row in ours] == [(row.prompt_id, row.response) for row in theirs]
    shifted, expected = (read_rows(run_ / "rounds" / "round_000" / "meta_rollouts.parquet", MetaRow) for run_ in (path, fixed))
    assert [(r.prompt_id, r.sample, r.token_ids) for r in shifted] == [(r.prompt_id, r.sample, r.token_ids) for r in expected]
    assert set(Counter(row.prompt_id for row in shifted).values()) == {3}
    spans = read_timeline(path / "timeline.jsonl")
    assert {"rollout-0", "rollout-1"} <= {span.who for span in spans if span.what == "evaluate" and span.who != DRIVER}
    left = [row for row in run.rows() if "event" in row and row["event"] == "left"]
    assert ["had not joined yet" in str(row["why"]) for row in left] == [True], "the one that was asked for in its place"


def test_what_an_elastic_pool_cannot_be() -> None:
    grows = ["--rollout.max_engines", "3"]
    with pytest.raises(UserError, match=r"rollout\.max_engines is 3 and rollout\.num_engines 4"):
        load_config(TINY, [*grows, "--rollout.num_engines", "4"])
    with pytest.raises(UserError, match=r"rollout\.max_engines is 3 and resources\.placement colocated"):
        load_config(TINY, [*grows, "--resources.placement", "colocated"])
    gpus = [f"--resources.{role}.num_gpus" for role in ("rollout", "learner")]
    on_gpus = [*grows, gpus[0], "1", gpus[1], "1"]
    with pytest.raises(UserError, match=r"rollout\.max_engines is 3 and rollout\.sync nccl"):
        load_config(TINY, [*on_gpus, "--rollout.sync", "nccl"])
    assert weight_transfer(load_config(TINY, on_gpus)) == "store"
    assert config_sha256(load_config(TINY, grows)) == config_sha256(load_config(TINY)), "a run may go on with another pool"
    assert weight_transfer(load_config(TINY, on_gpus[2:])) == "nccl"


def test_plan_names_the_engines_that_may_come(command: Command) -> None:
    done = command("plan", str(TINY), "--rollout.max_engines", "3")
    assert "up to 2 more engines (rollout.max_engines = 3), each 0.25 CPU" in " ".join(done.stdout.split())
