"""C4: a MetaRM step, against a vanilla step, a deep copy of the model, and differentiating through theta'.

m is the shifted samples' tokens over the preference pairs'. All sequences have one length, so there is no padding on either side,
and an optimizer of learning rate 0 ends each step. Memory is measured in a process for each way, which is told to hand freed
tensors back at once: by how much it grows at most within a step.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.ratios.frame import Took, Turns, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.scenery import PAD, pairs, reward_model, sequences, weights_of
from benchmarks.strength_memory import Growth
from rm.config import Order, RewardConfig
from rm.metarm import metarm_gradient
from rm.model import RewardModel
from rm.objective import PreferenceObjective
from rm.shifted import ShiftedSamples
from tokens.ranks import ALONE

ETA, RESPONSES = 1e-3, 4
MIB = 1 << 20


class Steps:
    """The ways to make a step, on one model and one batch.

    Args:
        model: on its device.
        num_pairs: of the batch; a multiple of eight.
        length: tokens of every sequence.
        microbatch: sequences of a forward pass; None = all of the batch's.
    """

    def __init__(self, model: RewardModel, num_pairs: int, length: int, microbatch: int | None = None) -> None:
        self.model = model
        self.theta = list(self.model.parameters())
        self.reward, self.batch = RewardConfig(microbatch_size=microbatch or 2 * num_pairs), pairs(num_pairs, length)
        self.objective = PreferenceObjective(self.model, self.reward, PAD, ALONE, 0)
        whole = 2 * num_pairs // RESPONSES
        samples = sequences((whole + 1) * RESPONSES, length, length, seed=1)
        groups = [[(samples[g * RESPONSES][0], r) for _, r in samples[g * RESPONSES :][:RESPONSES]] for g in range(whole + 1)]
        self.shifted = ShiftedSamples(groups, self.model, self.reward, whole, 0, PAD, ALONE)
        self.groups = {1.0: self.shifted.groups[:whole], 0.25: self.shifted.groups[: whole // 4]}
        self.optimizer = torch.optim.AdamW(self.theta, lr=0.0, weight_decay=0.0)

    def vanilla(self) -> None:
        """gL at theta."""
        self.objective(self.batch).backward()  # type: ignore[no-untyped-call]
        self._end()

    def metarm(self, m: float, order: Order = 1) -> None:
        """Ours."""
        self._metarm(m, order)
        self._end()

    def deep_copy(self, m: float) -> None:
        """The same gradient by a twin that is moved."""
        self._deep_copy(m)
        self._end()

    def difference(self) -> float:
        """Largest difference of the two's gradients, as a share of the largest entry."""
        found = []
        for work in (partial(self._metarm, 1.0, 1), partial(self._deep_copy, 1.0)):
            work()
            found.append([p.grad for p in self.theta if p.grad is not None])
            self.optimizer.zero_grad()
        largest = max(float(g.abs().max()) for g in found[1])
        return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / largest

    def _metarm(self, m: float, order: Order) -> None:
        ascend, descend = partial(self.shifted.difference, self.groups[m]), partial(self.objective, self.batch)
        metarm_gradient(self.theta, ascend, descend, ETA, order=order)

    def _deep_copy(self, m: float) -> None:
        twin = copy.deepcopy(self.model)
        theta = list(twin.parameters())
        shifted = copy.copy(self.shifted)
        shifted.model = twin
        torch.autograd.backward(shifted.difference(self.groups[m]))
        with torch.no_grad():
            for parameter in theta:
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=ETA)
                parameter.grad = None
        torch.autograd.backward(PreferenceObjective(twin, self.reward, PAD, ALONE, 0)(self.batch))
        for own, moved in zip(self.theta, theta, strict=True):
            own.grad = moved.grad

    def _end(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.theta, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ways(self) -> dict[str, Callable[[], None]]:
        """By name."""
        return {
            "vanilla": self.vanilla,
            "metarm 1": partial(self.metarm, 1.0),
            "metarm 1/4": partial(self.metarm, 0.25),
            "deep copy": partial(self.deep_copy, 1.0),
            "second order": partial(self.metarm, 1.0, 2),
        }


def measure(settings: Settings) -> Iterator[Row]:
    """Time, then memory."""
    steps = Steps(reward_model(settings.small), 8, 16 if settings.small else 64)
    before = [p.detach().clone() for p in steps.theta]
    turns, difference = take_turns(steps.ways(), settings.repetitions), steps.difference()
    kept = sum(not torch.equal(a, b) for a, b in zip(before, steps.theta, strict=True))
    equality = f"gradients as a deep copy's to {difference:.0e} of the largest; {kept} weights differ after it"
    for case, names, limit in (
        ("MetaRM step, m = 1", ("metarm 1", "vanilla"), 2.0),
        ("MetaRM step, m = 1/4", ("metarm 1/4", "vanilla"), 1.25),
        ("MetaRM step, m = 1, against a deep copy", ("metarm 1", "deep copy"), 1.0),
        ("MetaRM step, m = 1, against second order", ("metarm 1", "second order"), 0.5),
    ):
        yield row(("C4", case), turns, names, settings, limit, equality)
    yield memory(settings, equality)


def memory(settings: Settings, equality: str) -> Row:
    """Of a MetaRM step against a vanilla one; the other ways' in the figures."""
    weights = weights_of(reward_model(settings.small)) * 4 / MIB
    grown = {way: grows(way, settings) for way in ("metarm 1", "vanilla", "deep copy", "second order")}
    turns = Turns({way: tuple(Took(each, 0.0) for each in found) for way, found in grown.items()}, (os.getloadavg()[0],))
    beyond = {way: (turns.seconds(way) - turns.seconds("vanilla")) / weights for way in grown if way != "vanilla"}
    limit = 1 + 2 * weights / turns.seconds("vanilla")
    figures = {"weights_mib": round(weights, 2), "beyond_vanilla_in_weights": {way: round(x, 2) for way, x in beyond.items()}}
    place = ("C4", "memory of a MetaRM step, m = 1")
    return row(place, turns, ("metarm 1", "vanilla"), settings, limit, equality, **figures)


def grows(way: str, settings: Settings) -> list[float]:
    """MiB by which a process grows at most in each of several steps of one way."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("MALLOC_MMAP_MAX_", None)
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    words = [way, str(settings.repetitions), str(settings.threads), *(["small"] if settings.small else [])]
    command, root = [sys.executable, "-m", "benchmarks.ratios.metarm_steps", *words], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def grow(way: str, repetitions: int, threads: int, small: bool) -> list[float]:
    """The same, in this process."""
    torch.set_num_threads(threads)
    work, found = Steps(reward_model(small), 8, 16).ways()[way], []
    for _ in range(repetitions + 1):
        with Growth() as growth:
            work()
        found.append(growth.most / MIB)
    return found[1:]  # the first makes the optimizer's moments


def main(arguments: Sequence[str]) -> None:
    """WAY REPETITIONS THREADS [small]: print what a process grows by."""
    print(json.dumps(grow(arguments[0], int(arguments[1]), int(arguments[2]), len(arguments) > 3)))


if __name__ == "__main__":
    main(sys.argv[1:])
