"""Engines of an elastic pool, without Ray: their names, and the weights that they come with."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from actors.demand import Request
from actors.pool import ElasticEngines
from actors.process import Identity
from actors.seats import Seat
from actors.transfer import Parcels


def seat() -> Seat:
    return Seat("rollout-0", False, "run/rollout-0", None, {}, ())


def test_no_name_is_given_twice() -> None:
    names = [seat().name_of(pool, number) for pool in (1, 2) for number in (1, 2, 3)]
    of_the_maker = [f"run/rollout-0.{incarnation}" for incarnation in (2, 3)]
    assert len({*names, *of_the_maker}) == 8 and names[0] == "run/rollout-0"


class Engine:
    """Loads when it is told to."""

    def __init__(self) -> None:
        self.load = self
        self.given: list[tuple[Any, int]] = []
        self.gate = asyncio.Event()

    async def remote(self, parcels: Any, version: int) -> int:
        self.given.append((parcels, version))
        await self.gate.wait()
        return version


def test_a_version_that_came_again_with_other_weights_is_loaded_again(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    before, after = Parcels((), 1), Parcels((), 2)

    async def scene() -> None:
        engine: Any = Engine()
        pool: Any = ElasticEngines.__ray_metadata__.modified_class(  # type: ignore[attr-defined]
            tmp_path / "log", "run", [seat()], [engine], [Identity("rollout-0", 1, "node")], Request((), ()), 60.0
        )
        await pool.load(before, 5)
        coming = asyncio.create_task(pool._bring_in(pool.chairs[0]))
        await asyncio.sleep(0)
        await pool.load(after, 5)  # a step was undone while the engine loads
        engine.gate.set()
        await coming
        assert engine.given == [(before, 5), (after, 5)] and pool.chairs[0].serving

    try:
        asyncio.run(scene())
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
