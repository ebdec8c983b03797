"""What is measured, the most important first: a user with ten minutes of a GPU gets the beginning of this list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.gpu import checkpoints, ensembles, logprobs, metarm, mismatch, moves, ppo, reward
from benchmarks.gpu.rows import Place, Row, Scene

Needs = Literal["torch", "cuda", "vllm"]
Measure = Callable[[Scene], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """What is measured in one go.

    Args:
        places: ids and cases of the rows that it gives, in order.
        against: what the ratio of each is to; "" where there is none.
        seconds: that it should take on an H200, a guess: what is begun must fit into what is left of the budget.
        measure: gives the rows.
        needs: torch alone, on any device; a GPU; or vLLM and Ray beside it (on the CPU too, where it is small).
    """

    places: tuple[Place, ...]
    against: str
    seconds: float
    measure: Measure
    needs: Needs = "torch"

    @property
    def ids(self) -> tuple[str, ...]:
        """Of its cases."""
        return tuple(dict.fromkeys(number for number, _ in self.places))


def _engine(size: str, scene: Scene) -> Iterator[Row]:
    from benchmarks.gpu.engine import engine  # which imports Ray

    return engine(size, scene)


def _rounds(size: str, scene: Scene) -> Iterator[Row]:
    from benchmarks.gpu.rounds import rounds  # likewise

    return rounds(size, scene)


def _reward(size: str, number: int, seconds: float, recompute: bool, rank: int = 0) -> Part:
    case = f"reward step, {size}, {number} pairs of 1,024 tokens{', LoRA' if rank else ''}{', recomputed' if recompute else ''}"
    return Part((("G1", case),), "", seconds, partial(reward.whole, size, case, number, 1024, recompute, rank))


def _layouts(size: str, seconds: float) -> Part:
    places = tuple(("G1", f"reward step, {size}, {layout}") for layout in ("by length", "packed"))
    return Part(places, "batches as they come, by transformers", seconds, partial(reward.layouts, size, 16))


def _ppo(size: str, seconds: float, recompute: bool = False, rank: int = 0) -> Part:
    case = f"PPO step, {size}, packed{', LoRA' if rank else ''}{', recomputed' if recompute else ''}"
    return Part((("G1", case),), "", seconds, partial(ppo.update, size, case, recompute, rank))


def _metarm(size: str, seconds: float, recompute: bool) -> Part:
    end = ", recomputed" if recompute else ""
    places = tuple(("G2", f"MetaRM step, {size}, {name}{end}") for name in metarm.SHARES)
    return Part(places, "a vanilla step", seconds, partial(metarm.steps, size, recompute))


def _named(number: str, cases: tuple[str, ...], against: str, seconds: float, measure: Measure, needs: Needs = "torch") -> Part:
    return Part(tuple((number, case) for case in cases), against, seconds, measure, needs)


LINK, READING = "the link to the host at its measured speed", "reading and writing the bytes once"
PARTS = (
    _reward("8B", 8, 40, recompute=True),
    _metarm("1B", 25, recompute=False),
    _layouts("1B", 20),
    _named("G4", ("log-probs over 151,936 ids", "entropies over 151,936 ids"), "full float32 log-softmax", 10, logprobs.chunked),
    _named(
        "G3", tuple(f"scoring by 4 {form}, 1B" for form in ensembles.LIMITS), "4 whole models on the device", 25,
        partial(ensembles.scoring, "1B"),
    ),
    _named(
        "G9", tuple(f"trainer's log-probs, 0.5B, {layout}" for layout in mismatch.LAYOUTS), "padded batches of eight", 25,
        partial(mismatch.views, "0.5B"),
    ),
    _ppo("1B", 20),
    Part(
        (("G5", "decoding, 0.5B"), ("G6", "new weights into the engine, 0.5B"), ("G7", "engine sleeps and wakes, 0.5B")),
        "bytes at the device's measured speed", 120, partial(_engine, "0.5B"), "vllm",
    ),
    _named(
        "G10", ("checkpoint, 0.1B", "copy into pinned host memory, 0.1B"), "the copy, and the link", 40,
        partial(checkpoints.stall, "0.1B"),
    ),
    _metarm("1B", 25, recompute=True),
    _named("G7", ("learner rests and wakes, 1B",), LINK, 25, partial(moves.cycle, "1B"), "cuda"),
    _named(
        "G6", ("weights packed for the store, 1B", "weights copied by another process, 1B"), f"{LINK}; {READING}", 35,
        partial(moves.out, "1B"), "cuda",
    ),
    _reward("8B", 16, 50, recompute=True),
    _reward("8B", 16, 40, recompute=False, rank=reward.RANK),
    _ppo("8B", 50, recompute=True, rank=reward.RANK),
    _reward("3B", 16, 25, recompute=True),
    _reward("0.5B", 16, 12, recompute=False),
    _ppo("0.5B", 15),
    _ppo("3B", 45, recompute=True),
    _layouts("0.5B", 15),
    _named(
        "G8", tuple(f"PPO step of a run, 0.5B, {way}" for way in ("in turn", "side by side", "one batch ahead")),
        "roles that take turns", 600, partial(_rounds, "0.5B"), "vllm",
    ),
)  # fmt: skip
"""Each case once."""
NUMBERS = tuple(f"G{number}" for number in range(1, 11))
"""All ids."""
