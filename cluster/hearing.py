"""How far processes say that they are, each for itself: one that is silent hides nobody, and is not hidden by others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.process import Progress


class Hearing:
    """What processes last said of their progress, and since when each has said the same; both by Ray's id of the actor."""

    def __init__(self) -> None:
        self.said: dict[str, Progress] = {}
        self.since: dict[str, float] = {}
        self._asked: dict[str, Any] = {}

    def listen(self, actors: Sequence[Any], timeout: float = 0.0) -> list[Progress]:
        """Hear who has answered, and ask again.

        Args:
            actors: to ask.
            timeout: longest wait for those that were asked before, s.

        Returns:
            What each of them last said, of those that have said anything.
        """
        by_id = {actor._actor_id.hex(): actor for actor in actors}
        asked = {self._asked[who]: who for who in by_id if who in self._asked}
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=timeout)[0] if asked else []:
            who = asked[ref]
            del self._asked[who]
            try:
                progress = ray.get(ref)
            except RayActorError:  # the work's own reference tells what happened
                continue
            if who not in self.said or self.said[who] != progress:
                self.said[who], self.since[who] = progress, time.perf_counter()
        for who, actor in by_id.items():
            if who not in self._asked:
                self._asked[who] = actor.progress.remote()
        return [self.said[who] for who in by_id if who in self.said]
