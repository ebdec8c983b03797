"""Ray's own calls lost on the way there, on the way back, or in between: each must be applied once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from benchmarks.faults.bench import ONE, Bench, shm
from benchmarks.faults.play import Run
from benchmarks.faults.record import Outcome

CELLS = ("F48", "F49", "F50")
ATTEMPTS = 4
METHODS: Mapping[str, Sequence[str]] = {
    "F48": ("CoreWorkerService.grpc_client.PushTask",),
    "F50": (
        "ray::rpc::ActorInfoGcsService.grpc_client.RegisterActor",
        "ray::rpc::ActorInfoGcsService.grpc_client.CreateActor",
        "ray::rpc::PlacementGroupInfoGcsService.grpc_client.CreatePlacementGroup",
        "ray::rpc::InternalKVGcsService.grpc_client.InternalKVGet",
        "ray::rpc::NodeInfoGcsService.grpc_client.GetAllNodeInfo",
    ),
}
LOSS: Mapping[str, int] = {"num_failures": 40, "req_failure_prob": 4, "resp_failure_prob": 4, "in_flight_failure_prob": 2}
"""In a hundred: a tenth in all. Of the driver's calls to every role; a role is one of many that are called."""
INJECTED = "Inject RPC"
"""What Ray writes into the log of the caller's process for each call that it loses."""


def calls(bench: Bench, wanted: Sequence[str] = CELLS) -> None:
    """Lose a tenth of the driver's calls: to the roles, and to the head of the cluster.

    Args:
        bench: where.
        wanted: cells to play.
    """
    for cell, methods in METHODS.items():
        if cell not in wanted:
            continue
        baseline, before, name = bench.baseline("baseline-one", *ONE), shm(), bench.fresh(f"calls-{cell.lower()}")
        variables = {"RAY_testing_rpc_failure": json.dumps({method: dict(LOSS) for method in methods})}
        variables["RAY_BACKEND_LOG_LEVEL"] = "info"
        starts, said, lost = 0, list[str](), 0
        while True:
            starts += 1
            with bench.run(name, *ONE, variables=variables) as run:
                code = run.end()
                lost += lost_calls(bench, run)
                said += [line.text for line in run.said if "failed in" in line.text or "unavailable" in line.text.lower()]
            if code == 0 or starts == ATTEMPTS:
                break
        held = bench.held(run, baseline, [], before, *ONE)
        note = f"{starts} starts of the command; {lost} calls or answers lost; "
        note += said[0][:160] if said else "none was missed by the run"
        wrong = [] if lost else ["Ray lost no call, so that nothing was shown"]
        figures = {"starts": float(starts), "lost_calls": float(lost)}
        for name_ in ("F48", "F49") if cell == "F48" else (cell,):
            bench.record.outcome(Outcome(name_, None, None, None, "nothing", note, figures), held.also({"I6": wrong}))


def lost_calls(bench: Bench, run: Run) -> int:
    """Calls and answers of a driver that Ray lost on purpose, as its log counts them.

    Args:
        bench: whose cluster has the logs.
        run: of the driver.
    """
    logs = (bench.nodes.directory / "ray" / "session_latest" / "logs").glob(f"python-core-driver-*_{run.process.pid}.log")
    return sum(line.count(INJECTED) for log in logs for line in log.read_text(errors="replace").splitlines())
