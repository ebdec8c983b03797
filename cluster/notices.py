"""Notices that a node is about to go: spot capacity that is taken back, or a node that is drained before it is removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from ray.exceptions import RpcError

from actors.demand import draining_nodes, time_left
from actors.process import Identity

LOOK_EVERY_S = 5.0


class Notices:
    """Says once of each node that is about to go which processes of the run will be lost with it.

    Args:
        identities: gives those of the processes that the run cannot do without, as they are now.
        say: prints a line.
        warn: told of the nodes that are about to go, and have some of these processes, at each look.
    """

    def __init__(
        self, identities: Callable[[], Sequence[Identity]], say: Callable[[str], None], warn: Callable[[Collection[str]], None]
    ) -> None:
        self.identities, self.say, self.warn = identities, say, warn
        self.looked = time.monotonic()
        self.known: set[str] = set()

    def __call__(self) -> None:
        """Look, if the last look was a while ago."""
        if time.monotonic() - self.looked < LOOK_EVERY_S:
            return
        self.looked = time.monotonic()
        try:
            found = endangered(self.identities())
        except RpcError as error:
            self.say(f"[yellow]note[/] which nodes are about to go was not learned: {error}")
            return
        self.warn(found.keys())
        for node, line in found.items():
            if node not in self.known:
                self.say(f"[yellow]note[/] {line}")
            self.known.add(node)


def endangered(identities: Sequence[Identity]) -> dict[str, str]:
    """Which processes will be lost with nodes that are about to go.

    Args:
        identities: to look for.

    Returns:
        A line for each such node, by its id.
    """
    lines = {}
    for node, deadline in draining_nodes().items():
        names = [identity.name for identity in identities if identity.node == node]
        if names:
            left = time_left(deadline, time.time())
            lines[node] = f"node {node[:8]} is being drained and goes {left}; there: {', '.join(names)}"
    return lines
