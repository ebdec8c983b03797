"""Ray tasks that fit models side by side: where they may run, what their processes are told, and the wait for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.config import Share
from actors.process import ProcessSetup, environment
from cluster.config import RunConfig
from cluster.console import Console
from cluster.growth import room_for_tasks
from cluster.placement import on_this_machine
from cluster.preflight import all_nodes, check_nodes
from cluster.storage import storage_root
from cluster.waiting import Pending, Waiter
from tokens.errors import UserError


def setup_of(share: Share, name: str, logs: Path) -> ProcessSetup:
    """What a process of a share is told.

    Args:
        share: of the machine.
        name: of the process.
        logs: directory of log files.
    """
    device = "cuda" if share.num_gpus else "cpu"
    return ProcessSetup(name, logs / f"{name}.log", share.threads, device, share.dtype, 0, 1, share.recompute_activations)


def share_of_a_fit(share: Share) -> Share:
    """The share of a fit that runs beside others: on CPUs, one for each of its threads, or what there is.

    ``num_cpus`` of a share is for roles that take turns. Fits are busy all the time: asking for less than they use, too many of
    them would start at once, and all would crawl. Asking for more than the largest machine has, or than anybody else leaves free,
    they would wait for ever.

    Args:
        share: of the config.
    """
    if share.num_gpus:
        return share
    largest = max((node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]), default=0.0)
    there = ray.available_resources()
    free = there["CPU"] if "CPU" in there else 0.0
    return share.model_copy(update={"num_cpus": max(share.num_cpus, min(float(share.threads), largest, free))})


def refuse_what_cannot_fit(config: RunConfig) -> None:
    """Stop where this machine can never hold what one stage asks for at once: a task would wait for ever.

    Raises:
        UserError: naming the share.
    """
    there = ray.cluster_resources()
    shares, workers = config.resources, config.strength.num_workers
    for name, share, count in (("reward", shares.reward, 1), ("scorer", shares.scorer, workers), ("learner", shares.learner, 1)):
        for key, asked in (("CPU", share.num_cpus * count), ("GPU", share.num_gpus * count)):
            held = there[key] if key in there else 0.0
            if asked > held + 1e-9:
                what = f"resources.{name}.num_{key.lower()}s" + (" times strength.num_workers" if count > 1 else "")
                raise UserError(
                    f"this machine has {held:g} {key}, {what} asks for {asked:g}: lower it, or connect to a larger cluster"
                )


def suited(config: RunConfig, console: Console, logs: Path, fixed: bool) -> RunConfig:
    """The config for the cluster that is connected to, which is looked at first.

    Args:
        config: of the command.
        console: to show progress on.
        logs: directory of log files.
        fixed: True for this machine alone, which never grows.

    Raises:
        UserError: if it can never hold a task, or its nodes are not fit for one.
    """
    if fixed:
        refuse_what_cannot_fit(config)
        return on_this_machine(config)
    check_nodes(all_nodes(), storage_root(config), Waiter(console, logs, config.resources.deadline_s))
    return config


def task_options(config: RunConfig, share: Share, setup: ProcessSetup) -> dict[str, Any]:
    """What Ray is told of a task.

    Args:
        config: of the command.
        share: of the machine, for one task.
        setup: of its process.
    """
    return {
        "num_cpus": share.num_cpus,
        "num_gpus": share.num_gpus,
        "label_selector": share.labels or None,
        "runtime_env": {"env_vars": environment(setup, config.data.allow_hub)},
    }


@dataclass(frozen=True, eq=False)
class Work:
    """Tasks that were handed to Ray.

    Args:
        command: that they belong to.
        phase: in which they fail, if they do.
        title: of the bar.
        unit: that the board counts in.
        refs: one a task.
        names: of the tasks, in the same order.
        board: ``actors.board.Board`` of all of them; ended when they are.
        share: of the machine, for one task.
        kind: of a task, in words, where there is no room for one.
        on_answer: called with each answer as it comes.
        log: name of the log file that they share; None where each has its own.
    """

    command: str
    phase: str
    title: str
    unit: str
    refs: tuple[Any, ...]
    names: tuple[str, ...]
    board: Any
    share: Share
    kind: str = "a fit"
    on_answer: Callable[[Any], None] = lambda answer: None
    log: str | None = None


def finish(config: RunConfig, console: Console, logs: Path, work: Work) -> list[Any]:
    """Wait for all tasks.

    Args:
        config: of the command.
        console: to show progress on.
        logs: directory of log files.
        work: the tasks.

    Returns:
        Their answers, in the order of ``work.refs``.

    Raises:
        UserError: what a task raised as such, or no room within ``resources.wait_limit_s``.
        RoleFailed: if a task failed, or its process died too often.
    """
    wait = Waiter(console, logs, config.resources.deadline_s)
    wait.begin(f"{work.command} {config.name}")
    with console.bar(work.title, work.unit) as bar:
        room = room_for_tasks(console.say, work.kind, work.share, config.resources.wait_limit_s)
        nodes = ("",) * len(work.refs)
        found: list[Any] = wait(
            work.phase, Pending(work.refs, work.names, nodes, list, (work.board,), work.on_answer, room, work.log), bar
        )
    ray.kill(work.board)
    return found
