"""Timing several ways to do one thing so that whatever else the machine does falls on all of them.

The ways take turns, in an order that is turned round each time; the first turn of each is not counted. What is reported is the
median of paired ratios: two times that lie side by side are compared, never two medians.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

Clock = Callable[[], float]
"""CPU seconds so far."""


@dataclass(frozen=True)
class Took:
    """One turn.

    Args:
        wall: seconds.
        cpu: seconds that threads computed meanwhile.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """Of the ratios of one way to another, turn by turn.

    Args:
        middle: median.
        least: of all.
        most: of all.
        cpu: median of the ratios of CPU seconds; None where the other took too little to be counted.
    """

    middle: float
    least: float
    most: float
    cpu: float | None


@dataclass(frozen=True)
class Turns:
    """How long each way took, turn by turn.

    Args:
        took: by the name of the way, as many of each.
        load: the machine's load average of one minute, after each turn of all.
    """

    took: Mapping[str, tuple[Took, ...]]
    load: tuple[float, ...] = field(default=())

    def seconds(self, way: str) -> float:
        """Median wall seconds of a way."""
        return statistics.median(each.wall for each in self.took[way])

    def ratio(self, ours: str, other: str) -> Spread:
        """ratio_i = wall_i(ours) / wall_i(other), i = 1..repetitions."""
        pairs = list(zip(self.took[ours], self.took[other], strict=True))
        ratios = [a.wall / b.wall for a, b in pairs]
        cpu = [a.cpu / b.cpu for a, b in pairs if b.cpu > 0]
        whole = len(cpu) == len(pairs)
        return Spread(statistics.median(ratios), min(ratios), max(ratios), statistics.median(cpu) if whole else None)


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Clock = time.process_time,
    prepare: Callable[[str], None] = lambda name: None,
) -> Turns:
    """Time the ways.

    Args:
        ways: by name; each does its work to the end.
        repetitions: turns that count, >= 1.
        clock: CPU seconds of whatever does the work: this process, or ``of_all_processes``.
        prepare: called with the name of the way before each of its turns; not timed.

    Raises:
        ValueError: if nothing is to be timed.
    """
    if not ways or repetitions < 1:
        raise ValueError(f"need at least one way and one repetition, got {len(ways)} and {repetitions}")
    took: dict[str, list[Took]] = {name: [] for name in ways}
    load: list[float] = []
    for repetition in range(repetitions + 1):
        for name in list(ways) if repetition % 2 else reversed(list(ways)):
            prepare(name)
            gc.collect()
            began, cpu_began = time.perf_counter(), clock()
            ways[name]()
            wall = time.perf_counter() - began
            if repetition:
                took[name].append(Took(wall, clock() - cpu_began))
        if repetition:
            load.append(round(os.getloadavg()[0], 2))
    return Turns({name: tuple(turns) for name, turns in took.items()}, tuple(load))


def of_all_processes() -> float:
    """CPU seconds of this process and all that it started, down to their children; those that have ended count as waited for."""
    total = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
