"""Which processes share a bundle: disaggregated (each has its own) or colocated (all roles take turns on the same GPUs).

Arithmetic without Ray: ``plan`` prints it, ``run`` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.config import Backend
from cluster.config import RunConfig
from cluster.plan import GIB, PROCESS, Bundle


@dataclass(frozen=True)
class Seat:
    """Where one process runs.

    Args:
        bundle: index of its bundle.
        num_gpus: what the process itself asks Ray for.
    """

    bundle: int
    num_gpus: float


@dataclass(frozen=True)
class Placement:
    """What the placement group holds, and who sits where.

    Args:
        bundles: to ask for.
        seats: by name of the process.
    """

    bundles: tuple[Bundle, ...]
    seats: Mapping[str, Seat]


def disaggregated(processes: Sequence[Bundle]) -> Placement:
    """Each process in a bundle of its own."""
    return Placement(tuple(processes), {process.name: Seat(i, process.num_gpus) for i, process in enumerate(processes)})


def colocated(processes: Sequence[Bundle]) -> Placement:
    """Process i of every role in bundle i, which holds a whole GPU; each of them asks for an equal fraction of it.

    On the GPU there is as much at a time as the largest of them needs, and the others rest in the host's memory. Without GPUs
    the bundles are the same, and nothing moves.
    """
    groups: dict[int, list[Bundle]] = {}
    for process in processes:
        groups.setdefault(int(process.name.rpartition("-")[2]), []).append(process)
    seats = {
        process.name: Seat(index, _fraction(len(group)) if process.num_gpus else 0.0)
        for index, group in groups.items()
        for process in group
    }
    return Placement(tuple(_shared(index, groups[index]) for index in range(len(groups))), seats)


PLACEMENTS: Mapping[str, Callable[[Sequence[Bundle]], Placement]] = {"disaggregated": disaggregated, "colocated": colocated}


def placed(config: RunConfig, processes: Sequence[Bundle]) -> Placement:
    """The placement that the config asks for.

    Args:
        config: of the run.
        processes: and what each needs.
    """
    return PLACEMENTS[config.resources.placement](processes)


def on_this_machine(config: RunConfig) -> RunConfig:
    """The config without label selectors: a Ray of its own has one node, and no labels but Ray's.

    Args:
        config: of the run.
    """
    shares = config.resources
    roles = {"rollout": shares.rollout, "reward": shares.reward, "scorer": shares.scorer, "learner": shares.learner}
    bare = {role: share.model_copy(update={"labels": {}}) for role, share in roles.items()}
    return config.model_copy(update={"resources": shares.model_copy(update=bare)})


def _fraction(number: int) -> float:
    """The share of a GPU that ``number`` processes can each have; Ray counts in ten-thousandths."""
    return math.floor(10_000 / number) / 10_000


def _shared(index: int, group: Sequence[Bundle]) -> Bundle:
    names, needs = ", ".join(process.name for process in group), [process.memory for process in group]
    others = (len(group) - 1) * PROCESS
    largest = max(group, key=lambda process: process.memory)
    cpus = sum(process.num_cpus for process in group)
    if not group[0].num_gpus:
        parts = tuple(part for process in group for part in process.parts)
        return Bundle("shared", f"shared-{index}", cpus, 0.0, sum(needs), names, parts, others, group[0].labels)
    why = (
        f"{names} in turn, {_fraction(len(group)):g} GPU each, so that Ray puts all of them on this one; "
        f"up to {sum(needs) / GIB:.1f} GiB rest in host memory"
    )
    resting = others + sum(needs) + max(process.host for process in group)
    return Bundle("shared", f"shared-{index}", cpus, 1.0, largest.memory, why, largest.parts, resting, group[0].labels)


def weight_transfer(config: RunConfig) -> Backend:
    """How weights reach the engines: ``rollout.sync``, or what fits the placement where that is ``auto``.

    Args:
        config: of the run.
    """
    shares, rollout = config.resources, config.rollout
    if rollout.sync != "auto":
        return rollout.sync
    if rollout.max_engines is not None or not (shares.rollout.num_gpus and shares.learner.num_gpus):
        return "store"  # which an engine that joins later can read as well
    if shares.placement == "disaggregated":  # NCCL refuses two processes on one GPU
        return "nccl" if min(shares.rollout.num_gpus, shares.learner.num_gpus) >= 1 else "store"
    return "ipc" if rollout.num_engines <= shares.learner.num_ranks else "store"
