"""A fixed number of rollout engines: one that dies is replaced while the others serve, and they do what it had."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import cycle, islice
from typing import Any

from actors.rollout import occurrences
from cluster.metrics import Metrics
from cluster.parts import Again
from cluster.rota import Process, Rota
from cluster.waiting import Pending, Waiter
from tokens.records import Prompt, Rollout

Call = Callable[[Process], Any]
"""Asks a process for something; gives the reference of the answer."""


class FixedPool:
    """The same places for engines from the first round to the last.

    Every batch is cut into as many parts as there are places, whoever samples them: what comes does not depend on who was there.

    Args:
        engines: in these places.
        rota: of the devices.
    """

    def __init__(self, engines: Sequence[Process], rota: Rota) -> None:
        self.engines, self.rota = engines, rota
        self.absent: set[str] = set()
        """Engines that do not serve: they are being replaced, or were given up."""
        self.leaving: set[str] = set()
        """Engines that are on a node about to go, and get no new work while others serve."""
        self.weights: Any = None
        self.version: int | None = None
        self.num_loads = 0
        """How often there were new weights. A version may come again with other weights, after a step was undone."""
        self.fitting: dict[str, Any] = {}
        """Of engines that do not serve: the answer that comes when they hold their weights. Samples do not queue behind loads."""

    @property
    def actors(self) -> Sequence[Any]:
        """Of all engines."""
        return [engine.actor for engine in self.engines]

    def serving(self) -> list[Process]:
        """The engines to ask; if none serves, those that will."""
        there = [engine for engine in self.engines if engine.identity.name not in self.absent]
        staying = [engine for engine in there if engine.identity.name not in self.leaving]
        return staying or there or list(self.engines)

    def leave(self, name: str) -> None:
        """An engine does not serve until it is there again."""
        self.absent.add(name)

    def come(self, name: str) -> None:
        """An engine serves again."""
        self.absent.discard(name)
        self.leaving.discard(name)
        self.fitting.pop(name, None)

    def refit(self, engine: Process) -> Any:
        """Give an engine that has just come the weights of now.

        Returns:
            Reference of an answer that comes when it holds them, or is up, where there are none yet.
        """
        name = engine.identity.name
        self.fitting[name] = (
            engine.actor.identity.remote() if self.version is None else engine.actor.load.remote(self.weights, self.version)
        )
        return self.fitting[name]

    def _pending(self, calls: Sequence[tuple[Process, Call]], combine: Callable[[list[Any]], Any]) -> Pending[Any]:
        asked = [engine for engine, _ in calls]

        def redo(who: str, parts: Collection[int]) -> dict[int, Again]:
            others = cycle(self.serving())
            return {part: _again(next(others), calls[part][1]) for part in sorted(parts)}

        return Pending(
            tuple(call(engine) for engine, call in calls),
            tuple(engine.identity.name for engine in asked),
            tuple(engine.identity.node for engine in asked),
            combine,
            tuple(dict.fromkeys(engine.actor for engine in asked)),
            redo=redo,
        )

    def load(self, weights: Any, version: int, after: Sequence[Any]) -> Pending[int]:
        """Give every engine that serves new weights; one that is being replaced is given them when it has come."""
        self.weights, self.version = weights, version
        self.num_loads += 1
        there = [engine for engine in self.engines if engine.identity.name not in self.absent] or list(self.engines)
        return self._pending([(engine, _load(weights, version, after)) for engine in there], min)

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> Pending[list[Rollout]]:
        """k responses to each prompt; every place has an equal part."""
        size, before = -(-len(prompts) // len(self.engines)), occurrences(prompts)
        parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
        moves = self.rota.turn("rollout")

        def call(part: slice) -> Call:
            given = (prompts[part], samples_per_prompt, seed, version, before[part])
            return lambda engine: engine.actor.sample.remote(*given, *self._fitted(engine))

        calls = list(zip(islice(cycle(self.serving()), len(parts)), map(call, parts), strict=True))
        return moves.before(self._pending(calls, lambda answers: [rollout for answer in answers for rollout in answer]))

    def _fitted(self, engine: Process) -> list[Any]:
        """What must have come before an engine can sample."""
        name = engine.identity.name
        return [self.fitting[name]] if name in self.fitting else []

    def report_to(self, wait: Waiter, metrics: Metrics) -> None:
        """Nobody comes or goes but in a lost one's place, which is written down there."""


def _load(weights: Any, version: int, after: Sequence[Any]) -> Call:
    return lambda engine: engine.actor.load.remote(weights, version, *after)


def _again(engine: Process, call: Call) -> Again:
    return Again(call(engine), engine.identity.name, engine.identity.node, engine.actor)
