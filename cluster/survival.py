"""A run that makes good what it loses, put together: what it is told, and where that is written down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from cluster.config import RunConfig
from cluster.console import Console
from cluster.metrics import Metrics
from cluster.notices import Notices
from cluster.placement import weight_transfer
from cluster.pool import Places
from cluster.recovery import Recovery
from cluster.replacing import Fault, Replacing
from cluster.roles import Roles
from cluster.run_directory import RunDirectory
from cluster.waiting import Pending, Waiter
from tokens.durable import write_file


def survival(
    config: RunConfig,
    directory: RunDirectory,
    places: Places,
    roles: Roles,
    load_learner: Callable[[], Pending[None]],
    wait: Waiter,
    console: Console,
    metrics: Metrics,
) -> Recovery:
    """Have a run make good what it loses from now on.

    Args:
        config: of the run.
        directory: of the run.
        places: where its processes are put.
        roles: that there are.
        load_learner: asks a learner that has just come to load its models.
        wait: waits for them.
        console: shows what happens.
        metrics: writes it down.

    Returns:
        What plays something until it is done.
    """

    def note(fault: Fault) -> None:
        words = {"event": fault.event, "node": fault.node, "why": fault.why}
        metrics.fault(wait.round, wait.step, fault.process, words, fault.values)

    def identified() -> None:
        there = [process.identity for process in {**by_name, **processes.processes}.values()]
        ids = {each.name: {"pid": each.pid, "node": each.node, "incarnation": each.incarnation} for each in there}
        write_file(directory.path / "processes.json", json.dumps({"driver": {"pid": os.getpid()}, **ids}, indent=1))

    def look() -> None:
        notices()
        recover.look()

    by_name = {process.identity.name: process for process in roles.processes}
    separate = weight_transfer(config) == "store"
    processes = Replacing(places, roles, wait, load_learner, separate, note, console.say, identified)
    recover = Recovery(config.faults, processes, directory.path)
    notices = Notices(lambda: [process.identity for process in roles.processes], console.say, recover.moving.warned)
    wait.look = look
    identified()
    return recover
