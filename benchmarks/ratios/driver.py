"""C11: what the driver adds to its roles' work. Rollout actors that sleep, a learner that does nothing, the run's own scheduling.

1. Actors that sleep for a second each, asked at once: how long until the driver has all their samples, against that second.
2. A PPO step in which nobody has anything to do (sample, update, send, load), and a whole round of that kind, committed, each
   against as many calls of Ray and nothing else.
3. The prompts of a round's steps, drawn from a million, against shuffling a million once.
4. A million samples, step by step: a late step against an early one, and the driver's memory at the end and near the beginning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray

from actors.process import Identity
from actors.transfer import Parcels
from benchmarks.ratios.empty_round import empty_rounds
from benchmarks.ratios.engines import local_ray, prompts
from benchmarks.ratios.frame import Took, Turns, of_all_processes, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.sleepers import SleepingEngine, SleepingLearner
from cluster.console import Console
from cluster.fixed_pool import FixedPool
from cluster.roles import LearnerHandle, together
from cluster.rota import OwnDevices, Process
from cluster.sampling import draw
from cluster.waiting import Waiter
from tokens.records import Prompt, Rollout

SLEEP_S, PROMPTS, SAMPLES = 1.0, 8, 4
"""Seconds that an actor sleeps for a batch; prompts of it; responses to each."""
COUNTS = {False: (1, 4, 16, 64), True: (1, 4)}
"""Actors."""
STEPS, PROMPTS_PER_STEP = 20, 64
MANY = {False: (1_000_000, 250), True: (1_000, 4)}
"""Prompts or samples, and the steps that the samples come in; by whether it is to be small."""
AT_ONCE = 8
"""Actors that are started at a time: each imports torch, to know what a prompt is."""
OPTIONS: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"status": 1, "load": 1}}
MIB = 1 << 20


class Stage:
    """A pool of engines that sleep, a learner, and a driver that waits for them.

    Args:
        logs: directory.
    """

    def __init__(self, logs: Path) -> None:
        self.wait = Waiter(Console(), logs, 60.0, lambda span: None)
        self.wait.begin("round 0", 0)
        self.engines: list[Process] = []
        self.learner: Any = ray.remote(**OPTIONS)(SleepingLearner).remote(0.0)
        self.handle = LearnerHandle([Process(self.learner, Identity("learner-0", 0, ""))], 60.0, OwnDevices())

    def grow(self, number: int, seconds: float) -> FixedPool:
        """A pool of so many; the engines that are there stay."""
        while len(self.engines) < number:
            new: list[Any] = [
                ray.remote(**OPTIONS)(SleepingEngine).remote(seconds) for _ in range(min(AT_ONCE, number - len(self.engines)))
            ]
            ray.get([engine.sample.remote(prompts(1, 2, 8), 1, 0, 0, (0,)) for engine in new])
            first = len(self.engines)
            self.engines += [Process(engine, Identity(f"rollout-{first + i}", 0, "")) for i, engine in enumerate(new)]
        return FixedPool(self.engines, OwnDevices())

    def end(self) -> None:
        """Kill all of them."""
        for actor in (*(engine.actor for engine in self.engines), self.learner):
            ray.kill(actor)

    def sample(self, pool: FixedPool, asked: Sequence[Prompt], version: int = 0) -> list[Rollout]:
        """As a step does it."""
        return self.wait("sample", pool.sample(asked, SAMPLES, 0, version))

    def step(self, pool: FixedPool, asked: Sequence[Prompt]) -> None:
        """A PPO step without its scores, which are a call of the same kind as the update."""
        rollouts = self.sample(pool, asked)
        self.wait("policy", self.handle.update(rollouts, [0.0] * len(rollouts), None, 0))
        sending = self.handle.send(())
        self.wait("sync", together(sending, pool.load(sending.refs[0], 0, ())))

    def calls(self, asked: Sequence[Prompt]) -> None:
        """The calls of such a step, one after another."""
        engine = self.engines[0].actor
        rollouts = ray.get(engine.sample.remote(asked, SAMPLES, 0, 0, (0,) * len(asked)))
        ray.get(self.learner.update.remote(rollouts, [0.0] * len(rollouts), None, 0))
        parcels: Parcels = ray.get(self.learner.send.remote())
        ray.get(engine.load.remote(parcels, 0))


def measure(settings: Settings) -> Iterator[Row]:
    """All four."""
    yield drawing(settings)
    with TemporaryDirectory() as logs, local_ray():
        stage = Stage(Path(logs))
        pool = stage.grow(1, 0.0)
        yield empty_step(stage, pool, settings)
        yield empty_round(settings)
        yield from through(stage, pool, settings)
        stage.end()
        stage = Stage(Path(logs))
        for number in COUNTS[settings.small]:
            yield asleep(stage, stage.grow(number, SLEEP_S), number, settings)
        stage.end()


def asleep(stage: Stage, pool: FixedPool, number: int, settings: Settings) -> Row:
    """All actors sleep at once; the other way is the sleep itself."""
    asked = prompts(PROMPTS * number, 16, 64)
    ways: dict[str, Callable[[], object]] = {"driver": partial(stage.sample, pool, asked), "sleep": partial(time.sleep, SLEEP_S)}
    answers = stage.sample(pool, asked)
    expected = [(prompt.id, i) for prompt in asked for i in range(SAMPLES)]
    equality = "each sample once, in order" if [(r.prompt.id, r.sample) for r in answers] == expected else "SAMPLES ARE MISSING"
    turns = take_turns(ways, settings.repetitions)
    case = f"{number} rollout actor{'s' if number > 1 else ''}"
    figures = {
        "samples": len(expected),
        "driver_cpu_seconds": round(sum(t.cpu for t in turns.took["driver"]) / settings.repetitions, 4),
    }
    return row(("C11", case), turns, ("driver", "sleep"), settings, 1.0, equality, **figures)


def empty_step(stage: Stage, pool: FixedPool, settings: Settings) -> Row:
    """Nobody has anything to do."""
    asked = prompts(PROMPTS, 16, 64)
    ways = {"driver": partial(stage.step, pool, asked), "calls": partial(stage.calls, asked)}
    turns = take_turns(ways, max(settings.repetitions, 20 if not settings.small else 1), of_all_processes)
    few = replace(settings, repetitions=len(turns.load))
    return row(("C11", "empty step"), turns, ("driver", "calls"), few, 1.0, "the same calls")


def empty_round(settings: Settings) -> Row:
    """Nobody has anything to do in a whole round, from S_k to its commit."""
    with TemporaryDirectory() as name, empty_rounds(Path(name), OPTIONS) as (play, calls):
        turns = take_turns({"driver": play, "calls": calls}, settings.repetitions, of_all_processes)
    return row(("C11", "empty round"), turns, ("driver", "calls"), settings, 1.0, "the same calls")


def drawing(settings: Settings) -> Row:
    """A round's prompts."""
    many = MANY[settings.small][0]
    asked = prompts(1, 16, 64) * many
    rounds = iter(range(1 << 30))  # a round that was drawn before costs less

    def drawn() -> list[Prompt]:
        index = next(rounds)
        return [p for step in range(STEPS) for p in draw(0, asked, step * PROMPTS_PER_STEP, PROMPTS_PER_STEP, "policy", index)]

    def shuffled() -> list[Prompt]:
        return Random(0).sample(asked, many)

    number = len(drawn())
    turns = take_turns({"driver": drawn, "shuffle": shuffled}, settings.repetitions)
    place = ("C11", "a round's prompts from a million")
    return row(place, turns, ("driver", "shuffle"), settings, None, f"{number} prompts drawn in {STEPS} steps")


def through(stage: Stage, pool: FixedPool, settings: Settings) -> Iterator[Row]:
    """Samples of many steps."""
    many, steps = MANY[settings.small]
    asked = prompts(many // steps // SAMPLES, 16, 64)
    took, held, load, seen = [], [], [], 0
    for _ in range(steps + 1):
        began, cpu = time.perf_counter(), time.process_time()
        seen += len(stage.sample(pool, asked))
        took.append(Took(time.perf_counter() - began, time.process_time() - cpu))
        held.append(Took(psutil.Process().memory_info().rss / MIB, 0.0))
        load.append(round(os.getloadavg()[0], 2))
    tenth = max(1, steps // 10)
    few = replace(settings, repetitions=tenth)
    equality = f"{seen} samples came"
    for case, measured in (("a late step of a million samples", took), ("memory after a million samples", held)):
        turns = Turns({"late": tuple(measured[-tenth:]), "early": tuple(measured[1 : tenth + 1])}, (min(load), max(load)))
        yield row(("C11", case), turns, ("late", "early"), few, 1.0, equality, samples_per_step=many // steps)
