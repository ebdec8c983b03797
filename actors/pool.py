"""A pool of engines that come and go while it samples: one process that hands out work, and keeps the places for engines filled.

Every place has a task of its own: bring an engine in, serve from the pieces of all batches until it has to leave or dies, and
again. All tasks run in one thread, so what stands between two awaits happens at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, RpcError

from actors.demand import NAME as DEMAND
from actors.demand import NAMESPACE, Request, demand, draining_nodes, time_left
from actors.handout import MOST_TRIES, HandOut, Piece
from actors.process import Identity, Progress, log_to
from actors.seats import Chair, EngineFailed, EngineLost, Event, Kind, NoEngines, Sampled, Seat, Work, in_words
from actors.transfer import Parcels
from tokens.guards import BadNumber
from tokens.records import Prompt, Rollout

log = logging.getLogger(__name__)

NAME = "rollout-pool"
POLL_S = 2.0
"""How often the cluster is asked which nodes are about to go, and is told what the run needs."""
LEASE_S = 6.0
"""How long the request for nodes outlives a run that was killed."""
MOST_FAILURES = 3
"""Engines in a row that may fail in one place before they have answered anything; after that it stays empty for the phase."""
UNREACHABLE_S = 30.0
"""How long an engine that Ray calls unavailable, not dead, is asked again for its name or to load."""
ASK_AGAIN_S = 0.5
PHASE_OVER = "the sampling phase is over"


@dataclass
class _Asked:
    """A batch that somebody waits for."""

    answer: asyncio.Future[Sampled]
    work: list[Work] = field(default_factory=list)
    redone: int = 0


@ray.remote(num_cpus=0)
class ElasticEngines:
    """The pool.

    Args:
        log_path: file that it logs to.
        run: whose it is.
        seats: for engines; those of the placement group first.
        engines: that sit there already, in the seats' order.
        identities: of these.
        request: what the whole run needs while it samples.
        deadline_s: longest that an engine may go without progress; one that does is ended, and its place filled again.
        incarnation: of this process; what another one before it has named may be there for a while.
    """

    def __init__(
        self,
        log_path: Path,
        run: str,
        seats: Sequence[Seat],
        engines: Sequence[Any],
        identities: Sequence[Identity],
        request: Request,
        deadline_s: float,
        incarnation: int = 1,
    ) -> None:
        log_to(log_path)
        self.incarnation = incarnation
        self.run, self.request, self.deadline_s = run, request, deadline_s
        self.chairs = [Chair(seat) for seat in seats]
        for chair, engine, identity in zip(self.chairs, engines, identities, strict=False):  # the extra seats are empty
            chair.engine, chair.identity, chair.engines, chair.wanted = engine, identity, 1, True
        self.handout = HandOut(len(seats))
        self.asked: dict[int, _Asked] = {}
        self.parcels: Parcels | None = None
        self.version: int | None = None
        self.num_loads = 0
        self.events: list[Event] = []
        self.drained: dict[str, float] = {}
        self.open = False
        self.broken: BaseException | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.change = asyncio.Condition()

    def __repr__(self) -> str:
        return NAME

    async def start(self) -> Identity:
        """Begin to serve with the engines that are there."""
        for chair in self.chairs:
            if chair.wanted:
                chair.task = self._run(self._man(chair))
        self.tasks = [self._run(self._watch_nodes()), self._run(self._ask_for_nodes())]
        return await self.identity()

    async def identity(self) -> Identity:
        """Name, process and node."""
        return Identity(NAME, os.getpid(), ray.get_runtime_context().get_node_id())

    async def vigil(self) -> None:
        """Never answers; see ``Role.vigil``."""
        await asyncio.Event().wait()

    async def close_phase(self) -> None:
        """Sampling is over: the extra engines end, and the request for their nodes with them."""
        if not self.open:
            return
        self.open = False
        leaving = [chair for chair in self.chairs if chair.seat.extra]
        for chair in leaving:
            chair.wanted, chair.leaving = False, PHASE_OVER
            if not chair.serving and chair.task is not None:
                chair.task.cancel()
        await self._tell_all()
        tasks = [chair.task for chair in leaving if chair.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        for chair in leaving:
            if chair.task is not None and chair.task.cancelled():
                await self._note("left", chair, f"{PHASE_OVER}, it had not joined yet")
        await self._release()

    async def close(self) -> None:
        """The run is over."""
        for task in self.tasks:
            task.cancel()
        await self.close_phase()

    async def load(self, parcels: Parcels, version: int) -> int:
        """Give every engine new weights, also those that join later.

        Args:
            parcels: the weights; they are kept until the next ones come.
            version: of the policy.
        """
        self._check()
        self.parcels, self.version, self.num_loads = parcels, version, self.num_loads + 1
        await asyncio.gather(*(self._reload(chair) for chair in self.chairs if chair.serving))
        return version

    async def sample(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int, *fitted: object
    ) -> Sampled:
        """k responses to each prompt, prompt by prompt; the arguments are those of ``RolloutEngine.sample``.

        The first batch after ``close_phase`` begins a sampling phase: the extra engines are asked for.

        Args:
            fitted: answers of what must have happened before; Ray waits for them, while calls may overtake each other.

        Raises:
            EngineFailed: if an engine raised something.
            BadNumber: if that was a log-prob that is not finite.
            NoEngines: if engines keep dying over a piece, or none is left.
        """
        self._check()
        self._open_phase()
        number = self.handout.add(prompts, samples_per_prompt, seed, version)
        asked = self.asked[number] = _Asked(asyncio.get_running_loop().create_future())
        self._refuse_if_nobody_comes()
        await self._tell_all()
        return await asked.answer

    async def news(self) -> list[Event]:
        """Who came and went since this was last asked; waits until there is something."""
        async with self.change:
            await self.change.wait_for(lambda: bool(self.events))
            told, self.events = self.events, []
            return told

    async def progress(self) -> Progress:
        """How far the batches under way are; ``waiting`` while there is work and no engine."""
        done, total, tokens = self.handout.samples
        return Progress(done, total, "samples", tokens, waiting=bool(total) and not self._serving())

    def _open_phase(self) -> None:
        """Sampling begins, or goes on: fill every place."""
        if self.open:
            return
        self.open = True
        for chair in self.chairs:
            if chair.task is None or chair.task.done():
                chair.failures, chair.wanted, chair.leaving = 0, True, ""
                chair.task = self._run(self._man(chair))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure fails whatever is asked for: nobody waits for it."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        self.broken = task.exception()
        log.error("%s is broken", NAME, exc_info=self.broken)
        for number in list(self.asked):
            self._fail(number, RuntimeError(f"{NAME}: {type(self.broken).__name__}: {self.broken}"))

    def _check(self) -> None:
        if self.broken is not None:
            raise RuntimeError(f"{NAME}: {type(self.broken).__name__}: {self.broken}") from self.broken

    async def _tell_all(self) -> None:
        async with self.change:
            self.change.notify_all()

    def _serving(self) -> int:
        return sum(chair.serving for chair in self.chairs)

    async def _note(self, kind: Kind, chair: Chair, why: str = "") -> None:
        node = "" if chair.identity is None else chair.identity.node
        wanted = sum(each.wanted for each in self.chairs)
        event = Event(kind, chair.seat.name, node, why, self._serving(), wanted)
        log.info("%s %s (node %s): %s; %d engines serve", event.engine, kind, node[:8] or "unknown", why or "-", event.engines)
        self.events.append(event)
        await self._tell_all()

    async def _man(self, chair: Chair) -> None:
        """Keep a place filled as long as it is wanted."""
        try:
            while chair.wanted:
                kind: Kind = "left"
                try:
                    await self._bring_in(chair)
                    await self._serve(chair)
                    why = chair.leaving or chair.draining
                except EngineLost as lost:
                    kind, why = "died", str(lost)
                    chair.failures += 1
                await self._see_off(chair, kind, why)
                if chair.failures >= MOST_FAILURES:
                    chair.wanted = False
                    await self._note("given up", chair, f"{chair.failures} engines in a row failed there; the last: {why}")
        finally:
            self._empty(chair)
            self._refuse_if_nobody_comes()

    async def _bring_in(self, chair: Chair) -> None:
        """An engine on its place, with the weights of now. No await lies between the last look at the version and serving."""
        first = chair.engine is not None
        if not first:
            async with self.change:  # a bundle of the placement group stays on its node until that has gone
                await self.change.wait_for(lambda: chair.identity is None or chair.seat.extra or not self._drains(chair))
            chair.identity, chair.engines = None, chair.engines + 1
            name = chair.seat.name_of(self.incarnation, chair.engines)
            chair.engine = chair.seat.actor_class.options(name=name, **chair.seat.options).remote(*chair.seat.arguments)
            await self._note("asked", chair)
        if chair.identity is None or not chair.identity.node:  # else it served already when this pool was made
            chair.identity = await self._answer_at_last(chair.engine.identity)
        while chair.num_loads != self.num_loads:  # a version may come again with other weights, after a step was undone
            number = self.num_loads
            try:
                chair.version = await self._answer_at_last(chair.engine.load, self.parcels, self.version)
                chair.num_loads = number
            except RayTaskError as error:
                raise EngineLost(f"it could not load policy version {self.version}: {in_words(error)}") from error
        chair.serving = True
        log.info("%s serves and holds policy version %s", chair.seat.name, chair.version)
        if not first:
            await self._note("joined", chair, f"with policy version {chair.version}")

    async def _serve(self, chair: Chair) -> None:
        while (piece := await self._next(chair)) is not None:
            began = time.time()
            log.info("%s takes %s", chair.seat.name, piece)
            try:
                given = (piece.prompts, piece.samples_per_prompt, piece.seed, piece.version, piece.occurrences)
                rollouts = await self._at_work(chair, chair.engine.sample.remote(*given))
            except EngineLost as lost:
                self._redo(piece, chair, lost)
                raise
            except RayTaskError as error:
                wrong = (
                    error.cause if isinstance(error.cause, BadNumber) else EngineFailed(f"{chair.seat.name}: {in_words(error)}")
                )
                self._fail(piece.batch, wrong)
            else:
                chair.failures = 0
                log.info("%s answers %s", chair.seat.name, piece)
                self._take_in(piece, rollouts, Work(chair.seat.name, began, time.time()))

    async def _next(self, chair: Chair) -> Piece | None:
        """The next piece for an engine, once it holds the weights of now; None when it has to leave.

        Raises:
            EngineLost: if it died while it had nothing to sample.
        """
        async with self.change:
            await self.change.wait_for(lambda: bool(chair.lost) or self._must_leave(chair) or self._may_take(chair))
            if chair.lost:
                raise EngineLost(chair.lost)
            return None if self._must_leave(chair) else self.handout.take()

    def _must_leave(self, chair: Chair) -> bool:
        """An engine on a node that is about to go leaves once another serves; the last one stays as long as it can."""
        others = any(each.serving and not each.draining for each in self.chairs if each is not chair)
        return bool(chair.leaving) or (bool(chair.draining) and others)

    def _may_take(self, chair: Chair) -> bool:
        """Work that was asked for after new weights is not done with what an engine holds while they are on their way."""
        return self.handout.waiting and chair.num_loads == self.num_loads

    async def _reload(self, chair: Chair) -> None:
        engine, version, number = chair.engine, self.version, self.num_loads
        try:
            loaded = await self._answer_at_last(engine.load, self.parcels, version)
        except EngineLost as lost:
            if chair.engine is engine:  # else another one sits there by now
                chair.lost = str(lost)
                await self._tell_all()
        else:
            if chair.engine is engine:
                chair.version, chair.num_loads = loaded, number
                log.info("%s holds policy version %s", chair.seat.name, chair.version)
                await self._tell_all()

    async def _at_work(self, chair: Chair, ref: Any) -> Any:
        """An engine's answer to a piece.

        Raises:
            RayTaskError: what the engine raised.
            EngineLost: if it died, or went too long without progress.
        """
        answer = asyncio.ensure_future(self._answer(ref))
        said, moved = Progress(0, 0, ""), time.monotonic()
        while not (await asyncio.wait([answer], timeout=POLL_S))[0]:
            asked = asyncio.ensure_future(self._answer(chair.engine.progress.remote()))
            heard, _ = await asyncio.wait([answer, asked], timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if asked in heard and asked.exception() is None and asked.result() != said:
                said, moved = asked.result(), time.monotonic()
            asked.cancel()
            if time.monotonic() - moved > self.deadline_s:
                answer.cancel()
                raise EngineLost(f"no progress for {self.deadline_s:g} s (resources.deadline_s)")
        return answer.result()

    async def _answer_at_last(self, method: Any, *arguments: Any) -> Any:
        """An engine's answer to a call that may come twice, asked for again as long as it only cannot be reached.

        Raises:
            RayTaskError: what the engine raised.
            EngineLost: as ``_answer``; also if it could not be reached for ``UNREACHABLE_S``.
        """
        until = time.monotonic() + UNREACHABLE_S
        while True:
            try:
                return await self._answer(method.remote(*arguments))
            except EngineLost as lost:
                if not isinstance(lost.__cause__, ActorUnavailableError) or time.monotonic() > until:
                    raise
                log.warning("asked again: %s", lost)
                await asyncio.sleep(ASK_AGAIN_S)

    @staticmethod
    async def _answer(ref: Any) -> Any:
        """An engine's answer.

        Raises:
            RayTaskError: what the engine raised.
            EngineLost: if its process or node died, or what it made died with it.
        """
        try:
            return await ref
        except RayTaskError:
            raise
        except RayError as error:
            words = " ".join(str(error).split())
            raise EngineLost(f"{'' if isinstance(error, RayActorError) else type(error).__name__ + ': '}{words}") from error

    def _take_in(self, piece: Piece, rollouts: list[Rollout], work: Work) -> None:
        whole = self.handout.done(piece, rollouts)
        if piece.batch in self.asked:
            self.asked[piece.batch].work.append(work)
            self.asked[piece.batch].redone += bool(piece.lost)
        if whole is not None:
            asked = self.asked.pop(piece.batch)
            asked.answer.set_result(Sampled(whole, tuple(asked.work), self._serving(), asked.redone))

    def _redo(self, piece: Piece, chair: Chair, lost: EngineLost) -> None:
        again = self.handout.again(piece, chair.seat.name)
        if len(again.lost) >= MOST_TRIES:
            names = ", ".join(prompt.id for prompt in piece.prompts[:3])
            self._fail(
                piece.batch,
                NoEngines(f"{len(again.lost)} engines died over the same {len(piece.prompts)} prompts ({names}, ...): {lost}"),
            )

    def _fail(self, number: int, error: BaseException) -> None:
        """Fail a batch, once; pieces of it that are still out come back for nothing."""
        if number in self.asked:
            self.handout.drop(number)
            self.asked.pop(number).answer.set_exception(error)

    def _refuse_if_nobody_comes(self) -> None:
        """Fail what is asked for when every place is empty and stays so."""
        if self.asked and not any(chair.wanted for chair in self.chairs):
            for number in list(self.asked):
                self._fail(number, NoEngines("no engine is left, and none could be started"))

    async def _see_off(self, chair: Chair, kind: Kind, why: str) -> None:
        self._end(chair)
        await self._note(kind, chair, why)

    def _empty(self, chair: Chair) -> None:
        self._end(chair)
        chair.identity = None

    @staticmethod
    def _end(chair: Chair) -> None:
        """End the engine, also one that still waits for room. The chair remembers its node until another one comes."""
        if chair.engine is not None:
            ray.kill(chair.engine)
        chair.engine, chair.version, chair.num_loads, chair.serving = None, None, 0, False
        chair.draining, chair.lost = "", ""

    def _drains(self, chair: Chair) -> bool:
        return chair.identity is not None and chair.identity.node in self.drained

    async def _watch_nodes(self) -> None:
        """Engines on nodes that are about to go get no new work."""
        while True:
            try:
                self.drained = await asyncio.to_thread(draining_nodes)
            except RpcError as error:
                log.warning("which nodes are about to go was not learned: %s", error)
            for chair in self.chairs:
                if chair.serving and self._drains(chair) and not chair.draining:
                    assert chair.identity is not None
                    left = time_left(self.drained[chair.identity.node], time.time())
                    chair.draining = f"its node is being drained and goes {left}"
                    await self._note("draining", chair, chair.draining)
            await self._tell_all()
            await asyncio.sleep(POLL_S)

    async def _ask_for_nodes(self) -> None:
        """Keep the request for nodes alive while the phase is open; see ``actors.demand``."""
        while True:
            if self.open:
                try:
                    await demand().hold.remote(self.run, self.request, LEASE_S)
                except RayError as error:  # it ends itself when nobody asks: the next one is another. And it is only a hint
                    log.warning("the request for nodes is made again: %s", error)
            await asyncio.sleep(POLL_S)

    async def _release(self) -> None:
        try:
            await asyncio.wait_for(ray.get_actor(DEMAND, NAMESPACE).release.remote(self.run), LEASE_S)
        except (ValueError, RayError, TimeoutError) as error:  # not there, or not to be had: the request runs out by itself
            log.warning("the request for nodes was not released: %s", error)
