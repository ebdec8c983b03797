"""Somebody who stays connected to the cluster and answers questions about it, or fills its store; one JSON line each.

python -m benchmarks.faults.observer HOST:PORT
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

from benchmarks.faults.nodes import Nodes, with_parent

ANSWER_S = 180.0


def serve(address: str) -> None:
    """Answer questions from standard input until it ends."""
    import ray
    from ray import _raylet
    from ray.util.placement_group import placement_group_table

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints what it has to say of lost nodes, also when it is told not to
    ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="observer")
    client: Any = _raylet
    gcs = client.GcsClient(address=address)
    held: list[Any] = []

    class Squatter:
        def fill(self, mib: int) -> int:
            import numpy

            self.held = [ray.put(numpy.zeros(8 << 20, dtype=numpy.uint8)) for _ in range(mib // 8)]
            return len(self.held)

    remote: Any = ray.remote(Squatter)

    def room() -> dict[str, Any]:
        groups = [group["state"] for group in placement_group_table().values()]
        named = [f"{actor['namespace']}/{actor['name']}" for actor in ray.util.list_named_actors(all_namespaces=True)]
        return {"free": ray.available_resources(), "total": ray.cluster_resources(), "named": named, "groups": groups}

    def nodes() -> dict[str, bool]:
        return {node["NodeID"]: node["Alive"] for node in ray.nodes()}

    def fill(label: str, mib: int) -> int:
        held.append(remote.options(num_cpus=0, label_selector={"pool": label}).remote())
        return int(ray.get(held[-1].fill.remote(mib), timeout=120))

    def spilled() -> float:
        from ray._private import internal_api

        told = internal_api.memory_summary(address, stats_only=True)
        return sum(float(mib) for mib in re.findall(r"Spilled (\d+) MiB", told))

    def release() -> None:
        for squatter in held:
            ray.kill(squatter)
        held.clear()

    def drain(node: str, seconds: float) -> bool:
        import time

        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        took, why = gcs.drain_node(node, reason, "fault bench", int((time.time() + seconds) * 1000))
        if not took:
            raise RuntimeError(str(why))
        return bool(took)

    answers: dict[str, Any] = {"room": room, "nodes": nodes, "fill": fill, "spilled": spilled, "release": release, "drain": drain}
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(answers[what](*arguments)), file=replies, flush=True)


class Observer:
    """The same, from the bench's side.

    Args:
        nodes: the cluster.
    """

    def __init__(self, nodes: Nodes) -> None:
        from benchmarks.faults.play import ROOT

        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.observer", nodes.address],
            cwd=ROOT, env=nodes.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=partial(with_parent, signal.SIGKILL),
        )  # fmt: skip
        self._answer()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Ask, and wait for the answer.

        Args:
            what: room, nodes, fill, spilled, release or drain.
            arguments: of that.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        there, _, _ = select.select([self.process.stdout], [], [], ANSWER_S)
        line = self.process.stdout.readline() if there else ""
        if not line:
            raise RuntimeError("the observer has lost the cluster")
        return json.loads(line)

    def room_is_back(self) -> list[str]:
        """What a run has left in the cluster, in words; none if all is as before."""
        seen: Mapping[str, Any] = self.ask("room")
        free, total = seen["free"], seen["total"]
        kept = [key for key in total if key == "CPU" and (key not in free or abs(free[key] - total[key]) > 1e-6)]
        left = [f"{key}: {free[key] if key in free else 0.0:g} of {total[key]:g} free" for key in kept]
        left += [f"actor {name}" for name in seen["named"]]
        return left + [f"placement group {state}" for state in seen["groups"] if state != "REMOVED"]

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.process:
            self.process.kill()


if __name__ == "__main__":
    serve(sys.argv[1])
