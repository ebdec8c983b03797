"""What a user watches: the run's numbers as metrics of Ray, which exports them to Prometheus while the driver lives."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.exported import EXPORTED, Exported, exported_as
from evaluation.timeline import DRIVER, Span

BEFORE = "start"
"""The tag ``round`` of what comes before the first round."""


def _made(metric: Exported) -> Any:
    tags = ("run", *metric.tags)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, list(metric.boundaries), tags)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, tags)


def role_of(process: str) -> str:
    """The role of a process, e.g. ``rollout`` of ``rollout-0``."""
    return process.rpartition("-")[0] or process


class Telemetry:
    """The metrics of one run, made once in its driver. Without a metrics agent on the cluster they go nowhere.

    Args:
        run: its name, the tag of everything.
        gpus: GPUs of one process, by role; what is not a role holds none.
    """

    def __init__(self, run: str, gpus: Mapping[str, float]) -> None:
        self.run, self.gpus = run, gpus
        self.metrics = {metric.name: _made(metric) for metric in EXPORTED}
        self.sums: dict[tuple[str, ...], float] = defaultdict(float)
        self.followed: dict[str, Callable[[], float]] = {}
        self.held: Callable[[], float] = lambda: 0.0
        self.first: float | None = None
        self.extra = 0.0
        self.looked = time.perf_counter()
        for role in (*gpus, DRIVER):
            self.set("rondo_role_failures", 0.0, role=role)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self.metrics[name].set(value, {"run": self.run} | tags)

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Add to a counter."""
        self.metrics[name].inc(amount, {"run": self.run} | tags)

    def observe(self, name: str, value: float) -> None:
        """Count a value in a histogram."""
        self.metrics[name].observe(value, {"run": self.run})

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Read a gauge's value whenever something ends, and at the end of the run."""
        self.followed[name] = read

    @contextlib.contextmanager
    def room(self, held: Callable[[], float]) -> Iterator[None]:
        """Around the wait for room on the cluster, after which the run holds GPUs; ``held`` tells how many."""
        began = time.perf_counter()
        self.set("rondo_room_wait_seconds", 0.0)
        yield
        self.looked = time.perf_counter()
        self.held = held
        self.set("rondo_room_wait_seconds", self.looked - began)

    def serve(self, engines: float) -> None:
        """So many engines serve now; those beyond the first number hold GPUs besides the placement group's."""
        self.refresh()
        self.first = engines if self.first is None else self.first
        self.extra = max(0.0, engines - self.first)
        self.set("rondo_pool_engines", engines)

    def failed(self, process: str) -> None:
        """Count a failure of a process."""
        role = role_of(process)
        self.set("rondo_role_failures", self._added(1.0, "rondo_role_failures", role), role=role)

    def row(self, index: int, values: Mapping[str, float | None]) -> None:
        """The numbers of a row of metrics.jsonl.

        Args:
            index: of the round; -1 is the SFT policy's.
            values: by the file's names.
        """
        for key, value in values.items():
            name, tags = exported_as(key)
            if name.startswith("rondo_evaluation_"):
                tags = {"round": BEFORE if index < 0 else str(index)}
            if value is not None:
                self.set(name, float(value), **tags)

    def span(self, span: Span) -> None:
        """A wait of the driver, or the work of a process, that is over."""
        place, seconds = BEFORE if span.round is None else str(span.round), span.end - span.start
        if span.who == DRIVER:
            total = self._added(seconds, "rondo_phase_seconds", place, span.what)
            self.set("rondo_phase_seconds", total, round=place, phase=span.what)
            if span.round is not None:
                self.set("rondo_round", span.round)
            self.refresh()
            return
        role = role_of(span.who)
        where = {"round": place, "phase": span.what, "role": role}
        total = self._added(seconds, "rondo_role_seconds", place, span.what, role)
        self.set("rondo_role_seconds", total, **where)
        self.set("rondo_gpu_seconds", total * self._gpus(role), **where)

    def refresh(self) -> None:
        """Set what is followed, and what grows by itself."""
        for name, read in self.followed.items():
            self.set(name, read())
        held, now = self.held() + self.extra * self._gpus("rollout"), time.perf_counter()
        self.set("rondo_gpus", held)
        self.set("rondo_held_gpu_seconds", self._added(held * (now - self.looked), "rondo_held_gpu_seconds"))
        self.looked = now

    def _gpus(self, role: str) -> float:
        return self.gpus[role] if role in self.gpus else 0.0

    def _added(self, amount: float, *key: str) -> float:
        self.sums[key] += amount
        return self.sums[key]
