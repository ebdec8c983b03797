"""What an elastic pool keeps of each place for an engine, and what it tells of those that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayTaskError

from actors.process import Identity
from tokens.records import Rollout

Kind = Literal["asked", "joined", "left", "draining", "died", "given up"]


@dataclass(frozen=True)
class Seat:
    """A place for an engine.

    Args:
        name: of the engine there, e.g. ``rollout-2``.
        extra: True outside the placement group: filled only while the run samples.
        actor_name: what Ray calls the first engine.
        actor_class: ``RolloutEngine``.
        options: what Ray is told of the actor.
        arguments: of its ``__init__``.
    """

    name: str
    extra: bool
    actor_name: str
    actor_class: Any
    options: Mapping[str, Any]
    arguments: tuple[Any, ...]

    def name_of(self, pool: int, number: int) -> str:
        """What Ray calls an engine that the pool asks for; no name is given twice, by the pool or by whoever made it.

        Args:
            pool: incarnation of the pool's process.
            number: of the engine among those of this place.
        """
        return self.actor_name if (pool, number) == (1, 1) else f"{self.actor_name}.{pool}.{number}"


@dataclass(frozen=True)
class Event:
    """An engine that comes or goes.

    Args:
        kind: what happened.
        engine: its name.
        node: where it runs; "" where that is not known yet.
        why: in words; may be empty.
        engines: that serve now.
        wanted: places that are to be filled now.
    """

    kind: Kind
    engine: str
    node: str
    why: str
    engines: int
    wanted: int


@dataclass(frozen=True)
class Work:
    """A piece that an engine has answered: who, and from when to when, Unix time, s."""

    engine: str
    start: float
    end: float


@dataclass(frozen=True)
class Sampled:
    """A batch.

    Args:
        rollouts: k of each prompt, prompt by prompt.
        work: who sampled them.
        engines: that serve when it is done.
        redone: pieces that an engine died over, and another one sampled.
    """

    rollouts: list[Rollout]
    work: tuple[Work, ...]
    engines: int
    redone: int


class EngineLost(RuntimeError):
    """An engine's process or node has died."""


class EngineFailed(RuntimeError):
    """An engine refused a piece of a batch, or could not make it."""


class NoEngines(RuntimeError):
    """A batch cannot be sampled: its engines die."""


def in_words(error: RayTaskError) -> str:
    """What an engine raised."""
    return f"{type(error.cause).__name__}: {error.cause}"


@dataclass
class Chair:
    """A place and who is on it."""

    seat: Seat
    engine: Any = None
    identity: Identity | None = None
    version: int | None = None
    num_loads: int = 0
    wanted: bool = False
    serving: bool = False
    leaving: str = ""
    draining: str = ""
    lost: str = ""
    failures: int = 0
    engines: int = 0
    task: asyncio.Task[None] | None = None
