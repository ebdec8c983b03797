"""What a user watches, on a real cluster: a job's metrics as a real Prometheus scrapes them, and what Grafana's panels show."""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from cluster.exported import EXPORTED, exported_as
from scripts.grafana import OUT, as_json
from tests.cluster.command import ROOT, Command
from tests.cluster.processes import free_port
from tests.cluster.test_job import LocalCluster, head_node

RUN = "watched"
OVERRIDES = ("--name", RUN, "--rounds.num_rounds", "1", "--reward.evaluate_every", "4")
SERIES = {series for metric in EXPORTED for series in metric.series}


@dataclass(frozen=True)
class Watched:
    """A job that has run, and what was seen of it.

    Args:
        cluster: that it ran on.
        prometheus: address of the server that watched it.
        log: what ``ray job submit`` printed.
        path: the run directory.
        began: Unix time, s.
    """

    cluster: LocalCluster
    prometheus: str
    log: str
    path: Path
    began: float

    def ask(self, path: str, **arguments: str | float) -> Any:
        """A question to Prometheus."""
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=20) as answer:
            return json.load(answer)["data"]

    def over_time(self, expr: str) -> list[float]:
        """Every value that an expression had while the job ran."""
        found = self.ask("query_range", query=expr, start=self.began, end=time.time(), step=1)["result"]
        return [float(value) for series in found for _, value in series["values"]]

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One round as a job on a cluster with a token, watched by Prometheus through the configuration that Ray writes."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on the PATH; Debian's package has it")
    folder = tmp_path_factory.mktemp("watched")
    session = Path(tempfile.mkdtemp(prefix="rondo-", dir="/tmp"))  # short: Ray puts sockets there
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # exported often, and kept for twice as long after the driver's end
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_metrics_report_interval_ms": "4000"}
    try:
        with head_node(folder / "head.log", options=[f"--temp-dir={session}"], **variables) as cluster:
            config = session / "session_latest" / "metrics" / "prometheus" / "prometheus.yml"
            with prometheus(config, folder) as address:
                began = time.time()
                done = cluster.submit(command.storage, "run", "tests/cluster/tiny.yaml", *OVERRIDES)
                assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
                found = Watched(cluster, address, done.stdout, command.storage / "runs" / RUN, began)
                wait_until_scraped(found)
                yield found
    finally:
        shutil.rmtree(session)


def wait_until_scraped(found: Watched) -> None:
    """The driver's last word reaches Prometheus after the job's end."""
    deadline = time.monotonic() + 20
    while max(found.over_time(f'ray_rondo_rounds_committed{{run="{RUN}"}}'), default=0.0) < 1.0:
        assert time.monotonic() < deadline, "the last values were not scraped"
        time.sleep(0.5)


class prometheus:  # noqa: N801
    """A Prometheus server that reads Ray's configuration, scraping more often."""

    def __init__(self, rays: Path, folder: Path) -> None:
        config = yaml.safe_load(rays.read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"

    def __enter__(self) -> str:
        options = [f"--config.file={self.folder / 'prometheus.yml'}", f"--storage.tsdb.path={self.folder / 'data'}"]
        with (self.folder / "prometheus.log").open("w") as log:
            self.server = subprocess.Popen(
                ["prometheus", *options, f"--web.listen-address={self.address}"], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 30
        while not ready(self.address):
            assert self.server.poll() is None and time.monotonic() < deadline, (self.folder / "prometheus.log").read_text()
            time.sleep(0.2)
        return f"http://{self.address}"

    def __exit__(self, *raised: object) -> None:
        self.server.terminate()
        self.server.wait(timeout=30)


def ready(address: str) -> bool:
    """True if Prometheus answers queries."""
    try:
        return bool(urllib.request.urlopen(f"http://{address}/-/ready", timeout=2).status == 200)
    except OSError:
        return False


def test_every_number_of_the_run_is_scraped(watched: Watched) -> None:
    written: dict[tuple[str, str], set[float]] = {}
    for row in watched.rows():
        for key, value in row.items():
            if key not in ("time", "round", "step", "phase") and value is not None and math.isfinite(value):
                name, tags = exported_as(key)
                labels = "".join(f', {tag}="{text}"' for tag, text in tags.items())
                written.setdefault((name, labels), set()).add(float(value))
    assert len(written) > 60
    for (name, labels), values in written.items():
        seen = watched.over_time(f'ray_{name}{{run="{RUN}"{labels}}}')
        assert seen, f"{name} is not there"
        assert all(any(math.isclose(value, one, rel_tol=1e-9) for one in values) for value in set(seen)), name


def test_time_counts_and_engines_are_scraped(watched: Watched) -> None:
    def last(expr: str) -> float:
        return watched.over_time(expr)[-1]

    rows = [row for row in watched.rows() if row["phase"] == "policy"]
    ledger = json.loads((watched.path / "ledger.json").read_text())["rounds"][0]
    of_run = f'run="{RUN}"'
    for phase, seconds in ledger["seconds"].items():
        if phase != "commit":  # its wait ends the round, and the ledger is written meanwhile
            assert last(f'ray_rondo_phase_seconds{{{of_run}, round="0", phase="{phase}"}}') == pytest.approx(seconds, abs=0.5)
    assert last(f"ray_rondo_pool_engines{{{of_run}}}") == 1 and last(f"ray_rondo_pairs{{{of_run}}}") == 128
    assert last(f"ray_rondo_updates_total{{{of_run}}}") == len(rows) == 2
    assert last(f"ray_rondo_rollouts_total{{{of_run}}}") == 2 * 16 * 2
    assert last(f"ray_rondo_rollout_tokens_total{{{of_run}}}") == sum(row["policy/tokens"] for row in rows)
    assert last(f"ray_rondo_step_seconds_count{{{of_run}}}") == 2
    roles = {role: last(f'sum(ray_rondo_role_seconds{{{of_run}, round="0", role="{role}"}})') for role in ("rollout", "learner")}
    assert all(0 < seconds < time.time() - watched.began for seconds in roles.values())
    assert last(f"sum(ray_rondo_role_failures{{{of_run}}})") == last(f"sum(ray_rondo_gpu_seconds{{{of_run}}})") == 0


def test_every_panel_of_the_dashboard_shows_something(watched: Watched) -> None:
    board = json.loads(OUT.read_text())
    assert watched.ask("label/run/values", **{"match[]": "ray_rondo_rounds"}) == [RUN]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) > 30
    for panel in panels:
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names and all(name in SERIES for name in names if name.startswith("ray_rondo_")), target
            assert watched.over_time(target["expr"].replace("$run", RUN)), f"{panel['title']}: {target['expr']} is empty"


def test_the_dashboard_is_what_the_script_writes_and_grafanas_own_types_read_it() -> None:
    text = OUT.read_text()
    assert text == as_json()
    board = Dashboard.from_json(json.loads(text))
    assert board.uid == "rondo" and [variable.name for variable in board.templating.list_val] == ["datasource", "run"]
    panels = board.panels or []
    assert [panel.id_val for panel in panels] == list(range(1, len(panels) + 1))
    assert all(panel.grid_pos.x + panel.grid_pos.w <= 24 for panel in panels)
    for row, following in zip(panels, panels[1:], strict=False):  # each row is full, and begins a new line
        assert following.grid_pos.x == (row.grid_pos.x + row.grid_pos.w) % 24


def test_actors_have_names_and_say_what_they_do(watched: Watched) -> None:
    actors = watched.cluster.ask("/api/v0/actors?detail=1")["data"]["result"]["result"]
    described = {actor["name"]: actor["repr_name"] for actor in actors if actor["name"].startswith(f"{RUN}/")}
    assert described[f"{RUN}/rollout-0"] == "rollout-0 (samples from the policy with vLLM)"
    assert described[f"{RUN}/scorer-0"] == "scorer-0 (scores responses with the reward ensemble)"
    assert {f"{RUN}/reward-0", f"{RUN}/learner-0"} <= set(described) and all("(" in text for text in described.values())
    groups = watched.cluster.ask("/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
    assert [group["name"] for group in groups] == [f"rondo-{RUN}"]


def test_the_documentation_lists_what_is_exported() -> None:
    lines = (ROOT / "docs" / "dashboard.md").read_text().splitlines()
    table = {
        cells[0].strip(" `"): cells[2].strip()
        for line in lines
        if (cells := line.strip("| ").split(" | "))[0].startswith("`ray_")
    }
    assert table == {documented(metric.series): metric.description for metric in EXPORTED}


def documented(series: tuple[str, ...]) -> str:
    """A metric's name in the table."""
    return series[0].removesuffix("_bucket")


def test_every_key_that_can_be_written_has_a_metric() -> None:
    keys = set[str]()
    for folder in ("cluster", "actors", "policy", "rm"):
        for path in (ROOT / folder).rglob("*.py"):
            keys |= set(re.findall(r'"((?:policy|sample|sync|reward|scores|dpo)/[A-Za-z_]+)"', path.read_text()))
    assert len(keys) > 25
    names = {metric.name for metric in EXPORTED}
    assert {exported_as(key)[0] for key in keys} <= names
    from policy.metrics import UpdateMetrics

    assert {exported_as(f"policy/{name}")[0] for name in UpdateMetrics.__dataclass_fields__} <= names
    assert exported_as("validation/agreement/ece") == ("rondo_validation_ece", {"set": "agreement"})
    assert len(names) == len(EXPORTED)
