"""``ray job submit`` on real local clusters: submit, stop, submit again; what a run leaves outlives its job."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cluster.command import ROOT, TINY, Command
from tests.cluster.processes import end, free_port

BIN = Path(sys.executable).parent


DEPLOY = ROOT / "cluster" / "deploy"
HARD = (
    "run", str(TINY.relative_to(ROOT)), "--name", "tiny-job", "--policy.steps_per_round", "3", "--scorer.refresh", "each_round",
    "--policy.reference", "previous", "--policy.kl.controller", "adaptive",
)  # fmt: skip
"""Two rounds in which as much as can be is renewed with the round, and must be there again after a pause."""

LONG = ("--policy.steps_per_round", "2000")


@dataclass(frozen=True)
class LocalCluster:
    """A head node with a dashboard on loopback."""

    dashboard: str
    environment: dict[str, str]
    head: str

    def job(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``ray job ...``."""
        return subprocess.run(
            [str(BIN / "ray"), "job", arguments[0], "--address", self.dashboard, *arguments[1:]],
            cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def submit(
        self, storage: Path, *arguments: str, options: Sequence[str] = (), environment: str = "runtime_env.yaml"
    ) -> subprocess.CompletedProcess[str]:
        """Submit the command line, as docs/jobs.md says."""
        there = ["--working-dir", ".", "--runtime-env", str(DEPLOY / environment), *options]
        return self.job("submit", *there, "--", "python", "-m", "cluster", *arguments, "--storage", str(storage))

    def start(self, storage: Path, *arguments: str) -> str:
        """Submit and do not wait; the job's id."""
        done = self.submit(storage, *arguments, options=["--no-wait"])
        found = re.search(r"raysubmit_\w+", done.stdout)
        assert done.returncode == 0 and found, done.stdout + done.stderr
        return found[0]

    def ask(self, path: str, method: str = "GET") -> Any:
        """A question to the dashboard's own API."""
        headers = {}
        if self.environment["RAY_AUTH_MODE"] == "token":
            headers = {"Authorization": f"Bearer {Path(self.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def actors(self) -> list[dict[str, str]]:
        return list(self.ask("/api/v0/actors?detail=1")["data"]["result"]["result"])


def wait_until(true: Callable[[], bool], what: Callable[[], str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def spans(run: Path, *wanted: object) -> int:
    """How often the driver has waited for a phase of a round's step."""
    if not (run / "timeline.jsonl").exists():
        return 0
    lines = (json.loads(line) for line in (run / "timeline.jsonl").read_text().splitlines() if line.endswith("}"))
    return sum((line["what"], line["who"], line["round"], line["step"]) == wanted for line in lines)


def policy_rows(run: Path) -> list[dict[str, float]]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "time"} for row in rows if row["phase"] == "policy"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One that asks for a token."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with head_node(tmp_path_factory.mktemp("head") / "log", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) as head:
        yield head


@contextmanager
def head_node(log: Path, binaries: Path = BIN, options: Sequence[str] = (), **variables: str) -> Iterator[LocalCluster]:
    """Start a cluster of one node, and end it."""
    port, dashboard = free_port(), free_port()
    ours = ("RAY_ADDRESS", "PYTHONPATH", "RONDO_STORAGE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"PATH": f"{binaries}:{environment['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", **variables}
    start = [str(binaries / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    own = tempfile.mkdtemp(
        prefix="rj-"
    )  # Ray gives a job the cluster that last began in its directory; short, as sockets' paths are
    start += [f"--temp-dir={own}", *options]
    with log.open("w") as output:
        head = subprocess.Popen(start, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(address):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield LocalCluster(address, environment, f"127.0.0.1:{port}")
    finally:
        end(head)
        shutil.rmtree(own, ignore_errors=True)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # without the token: 401
    except OSError:
        return False
    return True


def test_a_stopped_job_goes_on_within_its_round_and_comes_to_the_same_bits(
    cluster: LocalCluster, command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny-job"
    job = cluster.start(tmp_path, *HARD)

    def log() -> str:
        return str(cluster.ask(f"/api/jobs/{job}/logs")["logs"])

    wait_until(lambda: spans(run, "sample", "driver", 1, 0) == 1, log)
    cluster.ask(f"/api/jobs/{job}/stop", "POST")  # what `ray job stop` sends once it has started
    stop = cluster.job("stop", job)
    assert stop.returncode == 0 and "stopped" in stop.stdout, stop.stdout + stop.stderr
    assert cluster.ask(f"/api/jobs/{job}")["status"] == "STOPPED"
    said = re.search(r"stopped: round 2 is saved after step (\d) of 3; the same command continues there", log())
    assert said, log()
    done = int(said[1])
    draft = run / "rounds" / ".round_001.partial"
    assert sorted(path.name for path in draft.iterdir()) == [
        f"after_000{done}_steps",
        "calibration.json",
        "journal.jsonl",
        "members",
        "meta_rollouts.parquet",
        "reward",
        "shifted.parquet",
        "steps",
    ]
    assert [(row["round"], row["step"]) for row in policy_rows(run)] == [(0, 0), (0, 1), (0, 2), *((1, k) for k in range(done))]
    ours = [actor for actor in cluster.actors() if actor["name"].startswith("tiny-job/")]
    assert {actor["state"] for actor in ours} == {"DEAD"}, "the room is given back"

    again = cluster.submit(tmp_path, *HARD)
    assert again.returncode == 0 and "succeeded" in again.stdout, again.stdout[-3000:] + again.stderr[-2000:]
    assert f"goes on after step {done} of 3" in again.stdout and "Round 1 of 2" not in again.stdout
    assert (run / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in (run / "rounds").iterdir()) == ["round_000", "round_001"]
    whole = command(*HARD)  # without a cluster, and in one go
    assert whole.returncode == 0, whole.stdout + whole.stderr
    other = command.storage / "runs" / "tiny-job"
    assert policy_rows(run) == policy_rows(other)
    first, second = (json.loads((each / "ledger.json").read_text())["rounds"] for each in (run, other))
    for key in ("round", "policy_version", "reward", "evaluation"):
        assert [entry[key] for entry in first] == [entry[key] for entry in second], key
    for name in ("policy/model", "reward/model", "critic/model", "members/1/model", "learner"):
        left, right = (load_file(each / "rounds" / "round_001" / f"{name}.safetensors") for each in (run, other))
        assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left), name

    finished = cluster.submit(tmp_path, *HARD)
    assert finished.returncode == 0 and "rounds are done" in finished.stdout, finished.stdout[-3000:]
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in log() + again.stdout + again.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    names = {actor["name"] for actor in cluster.actors()}
    assert {"tiny-job/rollout-0", "tiny-job/reward-0", "tiny-job/scorer-0", "tiny-job/learner-0"} <= names


def test_bad_input_fails_the_job_with_one_clear_message(cluster: LocalCluster, tmp_path: Path) -> None:
    bad = ("run", str(TINY.relative_to(ROOT)), "--rounds.num_rounds", "0")
    done = cluster.submit(tmp_path, *bad, options=["--submission-id", "bad"])
    assert done.returncode == 1 and "error: " in done.stdout and "rounds.num_rounds" in done.stdout
    assert "Traceback" not in done.stdout
    line = next(line for line in (ROOT / "docs" / "jobs.md").read_text().splitlines() if "driver_exit_code)" in line)
    words = shlex.split(line.replace("http://127.0.0.1:8265", cluster.dashboard).replace("raysubmit_...", "bad"))
    code = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=60, check=True)
    assert code.stdout.strip() == "2", "the code of the command line itself"


def test_a_driver_without_the_token_is_told_so(cluster: LocalCluster, command: Command, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    wrong.chmod(0o600)
    cases: tuple[tuple[dict[str, str], str], ...] = (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, and this process sends none"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "asks for a token, and it does not take the one that this process sends"),
    )
    storage = ["--storage", str(command.storage), "--name", "told"]
    for variables, words in cases:
        done = subprocess.run(
            [sys.executable, "-m", "cluster", "run", str(TINY), *storage],
            cwd=ROOT, env=cluster.environment | {"RAY_ADDRESS": cluster.head} | variables,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stdout + done.stderr
        assert Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text() not in done.stdout + done.stderr


def test_without_the_token_nothing_is_accepted(cluster: LocalCluster, tmp_path: Path) -> None:
    for path in ("/api/jobs/", "/api/v0/actors"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(cluster.dashboard + path, timeout=10)
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
        refused = cluster.job("submit", "--no-wait", "--", "true", **variables)
        assert refused.returncode != 0 and "submitted successfully" not in refused.stdout
        assert "uthenticat" in refused.stdout + refused.stderr, refused.stdout + refused.stderr
    assert "true" not in [job["entrypoint"] for job in cluster.ask("/api/jobs/")]


def test_without_token_mode_jobs_run_and_stop_too(command: Command, tmp_path: Path) -> None:
    run = command.storage / "runs" / "tiny-open"
    with head_node(tmp_path / "log", RAY_AUTH_MODE="disabled") as head:
        job = head.start(command.storage, "run", str(TINY.relative_to(ROOT)), "--name", "tiny-open", *LONG)
        wait_until(lambda: spans(run, "policy", "driver", 0, 0) > 0, lambda: str(head.ask(f"/api/jobs/{job}/logs")["logs"]))
        assert head.job("stop", job).returncode == 0
        assert head.ask(f"/api/jobs/{job}")["status"] == "STOPPED"
        said = str(head.ask(f"/api/jobs/{job}/logs")["logs"])
    saved = re.search(r"stopped: round 1 is saved after step (\d+) of 2000", said)
    assert saved and (run / "rounds" / ".round_000.partial" / f"after_{int(saved[1]):04d}_steps" / "manifest.json").exists(), said
