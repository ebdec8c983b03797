"""What runs ask the autoscaler for beyond what waits to be placed, and which nodes it is about to take away.

Ray keeps one request for resources in a cluster: whoever asks replaces it, and it outlives whoever asked. So one small actor
holds the requests of all runs, each for some seconds only. A run that is gone, however it ended, no longer asks.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

NAMESPACE = "rondo"
NAME = "demand"
TICK_S = 0.5
"""How often it is looked whether a request has run out."""
HEAD = {"node:__internal_head__": 0.001}
"""Only the head node has this resource: where the actor lives, so that no other node is kept for it."""


@dataclass(frozen=True)
class Request:
    """What one run wants the whole cluster to be large enough for.

    Args:
        bundles: resources of each process, those that run already with them: the request is a floor, not an addition.
        labels: that the node of each must have.
    """

    bundles: tuple[Mapping[str, float], ...]
    labels: tuple[Mapping[str, str], ...]


@dataclass
class _Held:
    request: Request
    until: float = field(default=0.0)


@ray.remote(num_cpus=0, max_restarts=0)
class Demand:
    """Holds the requests, and ends itself when there is none."""

    def __init__(self) -> None:
        self.held: dict[str, _Held] = {}
        self.watching: asyncio.Task[None] | None = None
        self.asking = asyncio.Lock()

    async def hold(self, run: str, request: Request, for_s: float) -> None:
        """Ask for as much as this run needs, until ``for_s`` seconds from now; to be repeated before they are over.

        Args:
            run: whose request it is; it replaces what was held for it.
            request: what it wants.
            for_s: how long it stands without being repeated.
        """
        news = run not in self.held or self.held[run].request != request
        self.held[run] = _Held(request, time.monotonic() + for_s)
        if news:
            await self._ask()
        if self.watching is None:
            self.watching = asyncio.create_task(self._watch())

    async def release(self, run: str) -> None:
        """Ask for nothing more in the name of this run."""
        if self.held.pop(run, None) is not None:
            await self._ask()

    async def _ask(self) -> None:
        from ray.autoscaler.sdk import request_resources

        async with self.asking:  # the last to ask must be the one that knows most
            requests = [held.request for held in self.held.values()]
            bundles = [dict(bundle) for request in requests for bundle in request.bundles]
            labels = [dict(selector) for request in requests for selector in request.labels]
            await asyncio.to_thread(request_resources, bundles=bundles, bundle_label_selectors=labels)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            late = [run for run, held in self.held.items() if held.until < time.monotonic()]
            for run in late:
                del self.held[run]
            if late:
                await self._ask()
            async with self.asking:  # not before the last word has reached the autoscaler
                if not self.held:
                    ray.kill(ray.get_runtime_context().current_actor)


def demand() -> Any:
    """The cluster's ``Demand``; made where there is none."""
    return Demand.options(  # type: ignore[attr-defined]
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, resources=HEAD
    ).remote()


def draining_nodes() -> dict[str, float]:
    """The nodes that are to go: spot capacity that is taken back, or nodes that the autoscaler or a person removes.

    Returns:
        By the node's id: when it goes, Unix time, s; 0 where no time is given.
    """
    draining = _client(ray.get_runtime_context().gcs_address).get_draining_nodes(timeout=5.0)
    return {node: deadline / 1000 for node, deadline in draining.items()}


@functools.cache
def _client(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=address)


def time_left(deadline: float, now: float) -> str:
    """In words, how long a draining node still has.

    Args:
        deadline: Unix time, s; 0 = none was given.
        now: Unix time, s.
    """
    return f"in {max(0.0, deadline - now):.0f} s" if deadline else "at a time that was not said"
