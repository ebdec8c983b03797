"""Signs of life: every process is asked now and then how far it is, which it answers whatever else it does."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.rota import Process

EVERY_S = 1.0


class Pulse:
    """When each process last gave a sign of life.

    Args:
        processes: by name.
    """

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self.processes = processes
        self.heard = dict.fromkeys(processes, time.monotonic())
        self.asked: dict[str, Any] = {}
        self.looked = 0.0

    def look(self, silent: Collection[str]) -> None:
        """Hear who has answered, and ask again; the silent ones are not up yet.

        Args:
            silent: names.
        """
        now = time.monotonic()
        if now - self.looked < EVERY_S:
            return
        self.looked = now
        for name, process in self.processes.items():
            if name in silent:
                self.asked.pop(name, None)
                self.heard[name] = now
            elif name not in self.asked:
                self.asked[name] = process.actor.progress.remote()
            elif ray.wait([self.asked[name]], timeout=0)[0]:
                ref = self.asked.pop(name)
                try:
                    ray.get(ref)
                except RayError:
                    continue  # whoever waits for it learns why
                self.heard[name] = now
                self.asked[name] = process.actor.progress.remote()

    def silent_s(self, name: str) -> float:
        """Seconds since a process's last sign of life."""
        return time.monotonic() - self.heard[name]
