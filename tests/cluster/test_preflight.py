"""The cluster looked at before any model is loaded: address and token, dashboard, namesakes, versions, storage."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import preflight
from cluster.console import Console
from cluster.preflight import Sight, all_nodes, check_address, check_dashboard, check_nodes, connect, installed, refuse_namesake
from cluster.waiting import Waiter
from evaluation.timeline import Span
from tokens.errors import UserError


class _Silent(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def dashboard(status: int) -> Iterator[int]:
    """Something that listens on all addresses and answers with ``status``; its port."""
    handler = type("Handler", (_Silent,), {"status": status})
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_open_dashboard_is_refused_unless_told() -> None:
    said: list[str] = []
    with dashboard(200) as port:
        with pytest.raises(UserError, match=r"open to the network.*token.*resources\.allow_open_dashboard"):
            check_dashboard(f"0.0.0.0:{port}", False, said.append)
        assert said == []
        check_dashboard(f"0.0.0.0:{port}", True, said.append)
        assert "warning" in said[0] and "open to the network" in said[0]
        check_dashboard(f"127.0.0.1:{port}", False, said.append)  # this machine's users only
        check_dashboard(f"[::1]:{port}", False, said.append)
        check_dashboard(f"localhost:{port}", False, said.append)
    check_dashboard(f"0.0.0.0:{port}", False, said.append)  # nobody listens any more
    check_dashboard("", False, said.append)  # the cluster has none
    assert len(said) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_dashboard_that_asks_for_a_token_may_listen_anywhere(status: int) -> None:
    said: list[str] = []
    with dashboard(status) as port:
        check_dashboard(f"0.0.0.0:{port}", False, said.append)
    assert said == []


def test_addresses_that_nobody_answers_at() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}.*RAY_ADDRESS"):
        check_address(f"127.0.0.1:{port}", print)
    assert time.monotonic() - began < 30
    with pytest.raises(UserError, match="ray job submit"):
        connect("ray://127.0.0.1:10001", False, print)


def test_a_token_that_others_can_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, said = tmp_path / "token", []
    token.write_text("x")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    preflight.warn_of_readable_token(said.append)
    assert said == [f"[yellow]note[/] other users of this machine may read Ray's token: chmod 600 {token}"]
    token.chmod(0o600)
    preflight.warn_of_readable_token(said.append)
    assert len(said) == 1


def test_what_a_node_has_and_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Sight("a", installed(), "word", True)
    root = Path("/shared/rondo")
    assert preflight._problems(good, "word", root, True) == []
    [old] = preflight._problems(replace(good, versions=installed() | {"vllm": "0.1", "python": "3.9.1"}), "word", root, True)
    assert "node a has python 3.9.1 (here" in old and "vllm 0.1 (here" in old and "lock file" in old
    [absent] = preflight._problems(replace(good, found=None, writes=False), "word", root, False)
    assert "node a does not see the storage root /shared/rondo" in absent
    [elsewhere] = preflight._problems(good, "word", root, False)  # a directory of the same name, on its own disk
    assert "does not see" in elsewhere
    [frozen] = preflight._problems(replace(good, writes=False), "word", root, False)
    assert "may not write to the storage root" in frozen


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_every_node_is_looked_at(two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, nodes = Waiter(Console(), tmp_path, 60), all_nodes()
    assert len(nodes) == 2
    check_nodes(nodes, tmp_path, wait)
    assert list(tmp_path.iterdir()) == [] and wait.seconds["preflight"] > 0
    monkeypatch.setattr(preflight, "installed", lambda: installed() | {"vllm": "9.9"})  # as if the driver had another
    with pytest.raises(UserError, match=r"node \S+ has vllm \S+ \(here 9\.9\).*; node \S+ has vllm"):
        check_nodes(nodes, tmp_path, wait)
    assert list(tmp_path.iterdir()) == []


def test_a_wait_does_not_go_by_the_clock(two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[Span] = []
    hours, right = itertools.cycle((3600.0, -3600.0)), time.time
    monkeypatch.setattr(time, "time", lambda: right() + next(hours))
    wait = Waiter(Console(), tmp_path, 60.0, spans.append)
    check_nodes(all_nodes(), tmp_path, wait)
    assert 0 < wait.seconds["preflight"] < 60 and len(spans) == 3


def test_namesakes(two_nodes: Cluster) -> None:
    @ray.remote(num_cpus=0)
    class Left:
        def beat(self) -> int:
            return 1

    said: list[str] = []
    refuse_namesake("mine", "rondo-mine", said.append, 0)
    group = placement_group([{"CPU": 1}], name="rondo-mine")
    with pytest.raises(UserError, match=r"placement group rondo-mine.*ray job stop.*another name"):
        refuse_namesake("mine", "rondo-mine", said.append, 0)
    refuse_namesake("min", "rondo-min", said.append, 0)
    assert said == []
    clearing = threading.Timer(1.0, remove_placement_group, [group])  # as a cluster does after a driver's death
    clearing.start()
    refuse_namesake("mine", "rondo-mine", said.append)
    clearing.join()
    assert len(said) == 1 and "waiting for the cluster to clear up" in said[0]
    actor = Left.options(name="mine/rollout-0", namespace="old", lifetime="detached").remote()
    assert ray.get(actor.beat.remote()) == 1
    with pytest.raises(UserError, match=r"the actor mine/rollout-0 \(namespace old\)"):
        refuse_namesake("mine", "rondo-mine", said.append, 0)
    ray.kill(actor)
    refuse_namesake("mine", "rondo-mine", said.append)
