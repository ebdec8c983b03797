"""The rollout engines as one: what the loop sees of them, and a pool that grows while it samples. Chosen once, at set-up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.demand import Request
from actors.pool import NAME, ElasticEngines
from actors.seats import Event, Sampled, Seat
from cluster.config import RunConfig
from cluster.metrics import Metrics
from cluster.parts import Again
from cluster.rota import Moves, Process
from cluster.waiting import Pending, Room, Waiter
from tokens.records import Prompt, Rollout

CLOSE_S = 5.0
"""Longest wait for the pool to let its engines go when the run ends; then they are ended anyway."""


class RolloutPool(Protocol):
    """The engines as one."""

    @property
    def actors(self) -> Sequence[Any]:
        """Handles of the engines that are there for the whole run."""
        ...

    def load(self, weights: Any, version: int, after: Sequence[Any]) -> Pending[int]:
        """Give every engine new weights as policy ``version``.

        Args:
            weights: a ``Delivery``, or a reference to one.
            version: of the policy.
            after: references that must be there first.
        """
        ...

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> Pending[list[Rollout]]:
        """k responses to each prompt, prompt by prompt, shared out over the engines."""
        ...

    def report_to(self, wait: Waiter, metrics: Metrics) -> None:
        """Where engines that come and go are written down, as they do."""
        ...


class Places(Protocol):
    """Where processes are put; see ``cluster.stage.Stage``."""

    def respawn(self, process: Process, incarnation: int) -> None:
        """Ask for another process in the place of one."""

    def room(self, name: str) -> Room:
        """A wait for room for one process."""

    def spare(self, name: str, incarnation: int) -> Any:
        """Ask for a process that may take over a place, on any node that stays."""

    def take_over(self, process: Process, spare: Any, incarnation: int) -> None:
        """Put a spare process in the place of one, which is ended."""

    def release(self, actor: Any) -> None:
        """End a process."""


class ElasticPool:
    """Engines of the placement group, and extra ones while the run samples; see ``actors.pool``.

    Args:
        process: of the pool.
        engines: of the placement group.
        make: asks for a process of the pool, for those engines, given its incarnation.
        room: makes a wait for room, for the time in which no engine serves.
        say: prints a line.
    """

    def __init__(
        self,
        process: Process,
        engines: Sequence[Process],
        make: Callable[[int], Any],
        room: Callable[[], Room],
        say: Callable[[str], None],
    ) -> None:
        self.process, self.engines, self.make, self.room, self.say = process, engines, make, room, say
        self.note: Callable[[Mapping[str, float | str]], None] = lambda values: None
        self.weights: Any = None
        self.version: int | None = None
        self.fitting: tuple[Any, ...] = ()
        """What a process that has come in another's place must have done before it samples."""

    @property
    def actors(self) -> Sequence[Any]:
        """Of the placement group's engines, as they began."""
        return [engine.actor for engine in self.engines]

    def _pending(self, call: Callable[[Any], Any], combine: Callable[[list[Any]], Any], **more: Any) -> Pending[Any]:
        identity = self.process.identity

        def redo(who: str, parts: Collection[int]) -> dict[int, Again]:
            now = self.process
            return {0: Again(call(now.actor), now.identity.name, now.identity.node, now.actor)}

        return Pending((call(self.process.actor),), (identity.name,), (identity.node,), combine, redo=redo, **more)

    def respawn(self, places: Places, incarnation: int) -> None:
        """Another process of the pool, and other engines: those that it had asked for went with it, the others work for it."""
        ray.kill(self.process.actor)
        for engine in self.engines:
            places.respawn(engine, engine.identity.incarnation + 1)
        self.process.actor = self.make(incarnation)
        self.process.identity = replace(self.process.identity, pid=0, node="", incarnation=incarnation)

    def refit(self) -> Any:
        """Have a process that has just come begin to serve, with the weights of now.

        Returns:
            Reference of an answer that comes when it does.
        """
        ref = self.process.actor.start.remote()
        if self.version is not None:
            ref = self.process.actor.load.remote(self.weights, self.version)
        self.fitting = (ref,)
        return ref

    def shrink(self) -> Moves:
        """Back to what the placement group holds."""
        identity = self.process.identity
        return Moves((self.process.actor.close_phase.remote(),), (identity.name,), (identity.node,))

    def load(self, weights: Any, version: int, after: Sequence[Any]) -> Pending[int]:
        """Give every engine new weights, and those that join before the next."""
        self.weights, self.version = weights, version
        return self._pending(lambda actor: actor.load.remote(weights, version), lambda answers: int(answers[0]))

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> Pending[list[Rollout]]:
        """k responses to each prompt; every engine takes a piece when it has none. The pool grows, if it has not yet."""
        more = {
            "progress_of": (self.process.actor,), "room": self.room(), "spans": _spans, "on_answer": self._note_batch,
        }  # fmt: skip
        return self._pending(
            lambda actor: actor.sample.remote(prompts, samples_per_prompt, seed, version, *self.fitting),
            lambda answers: answers[0].rollouts,
            **more,
        )

    def _note_batch(self, sampled: Sampled) -> None:
        took_part = len({work.engine for work in sampled.work})
        self.note({"pool/engines": sampled.engines, "pool/took_part": took_part, "pool/redone": sampled.redone})

    def report_to(self, wait: Waiter, metrics: Metrics) -> None:
        """Say and write down who comes and goes, in whatever the driver waits for."""
        self.note = lambda values: metrics.pool(wait.round, wait.step, values)

        def on_answer(events: Sequence[Event]) -> None:
            for event in events:
                self.note({"pool/engines": event.engines, "pool/wanted": event.wanted, **words_of(event)})
                if event.kind not in ("asked", "left"):
                    self.say(f"  {in_words(event)}")
            listen()

        def listen() -> None:
            told = {"on_answer": on_answer, "spans": lambda _: (), "news": True}
            wait.watch("pool", self._pending(lambda actor: actor.news.remote(), lambda answers: answers[0], **told))

        listen()

    def close(self) -> None:
        """End the extra engines and take the request for their nodes back."""
        with contextlib.suppress(RayActorError, GetTimeoutError):  # it is ended anyway, and the request runs out
            ray.get(self.process.actor.close.remote(), timeout=CLOSE_S)
        ray.kill(self.process.actor)


class PhaseRota:
    """Every role has devices of its own, and the pool is large while it samples and small while the reward model trains.

    Args:
        pool: that grows and shrinks.
    """

    def __init__(self, pool: ElasticPool) -> None:
        self.pool = pool

    def turn(self, role: str) -> Moves:
        """The reward trainer's turn ends a sampling phase; the next batch that is asked for begins one."""
        return self.pool.shrink() if role == "reward" else Moves()

    def meet(self) -> Moves:
        """Nothing moves for a sync."""
        return Moves()

    def came(self, name: str) -> None:
        """Nothing to remember."""


def elastic_pool(
    config: RunConfig, seats: Sequence[Seat], engines: Sequence[Process], request: Request, logs: Path, say: Callable[[str], None]
) -> ElasticPool:
    """Start the process of an elastic pool, on the driver's node: it must not be lost with one that is given back.

    Args:
        config: of the run.
        seats: for engines.
        engines: of the placement group.
        request: what the run needs while it samples.
        logs: directory of log files.
        say: prints a line.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ElasticEngines

    def make(incarnation: int) -> Any:
        return actor.options(scheduling_strategy=here).remote(
            logs / f"{NAME}.log",
            f"{config.name}/{ray.get_runtime_context().get_job_id()}",
            seats,
            [engine.actor for engine in engines],
            [engine.identity for engine in engines],
            request,
            config.resources.deadline_s,
            incarnation,
        )

    handle, asked = make(1), request.bundles[-1]
    process = Process(handle, ray.get(handle.start.remote()))
    return ElasticPool(process, engines, make, lambda: Room(say, asked, config.resources.wait_limit_s), say)


def in_words(event: Event) -> str:
    """One line on an engine that came or went."""
    where = f" on node {event.node[:8]}" if event.node else ""
    why = f" ({event.why})" if event.why else ""
    verb = {"draining": "gets no new work", "given up": "is given up until the next sampling phase"}
    what = verb[event.kind] if event.kind in verb else event.kind
    return f"{NAME}: {event.engine}{where} {what}{why}; {event.engines} of {event.wanted} engines serve"


def words_of(event: Event) -> dict[str, str]:
    """What a row of metrics.jsonl says of an engine that came or went, beside its numbers."""
    return {"event": event.kind, "engine": event.engine, "node": event.node, "why": event.why}


def _spans(sampled: Sampled) -> list[tuple[str, float, float]]:
    return [(work.engine, work.start, work.end) for work in sampled.work]
