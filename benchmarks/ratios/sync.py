"""C6: new weights from a learner's process into a running engine, the whole way.

Ours lays the weights out in Ray's object store, hands them over, takes them in by vLLM's four phases, empties the prefix cache.
Against it: the same phases with a call of Ray for each tensor, which carries it; saving the model and starting an engine with it
(three times: it takes long); and a copy of the weights within this process, the least that a sync could take.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import ray
import torch

from actors.config import RolloutConfig
from actors.transfer import STORED, Live, lay_out
from benchmarks.ratios.engines import Saved, gap, local_ray, prompts, saved_model, start_engine
from benchmarks.ratios.frame import of_all_processes, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from tokens.shape import ModelShape
from tokens.weights import in_chunks

WORDS, RESTARTS = 240, 3
SHAPES = {
    False: ModelShape(hidden_size=320, intermediate_size=896, num_layers=16, num_heads=5, context_length=128),
    True: ModelShape(hidden_size=64, intermediate_size=96, num_layers=1, num_heads=1, context_length=64),
}
"""About 20 million weights in 146 tensors, or next to none."""


class Ways:
    """The ways to bring weights into one engine.

    Args:
        saved: the model.
        engine: handle of it.
        threads: of the engines that restarts start.
    """

    def __init__(self, saved: Saved, engine: Any, context_length: int, threads: int) -> None:
        self.saved, self.engine, self.context_length, self.threads = saved, engine, context_length, threads
        self.versions = count(1)
        self.weights = list(saved.model.state_dict().items())  # as a learner sends them: vLLM wants tied weights by both names
        self.copies = [torch.empty_like(tensor) for _, tensor in self.weights]

    def ours(self) -> None:
        """As a run does it."""
        parcels = lay_out(self.weights, STORED.chunk_bytes)
        ray.get(self.engine.load.remote(parcels, next(self.versions)))

    def per_tensor(self) -> None:
        """The same four phases, a call for each tensor."""
        loading = self.engine.load.remote(Live(), next(self.versions))
        ray.get(self.engine.ask.remote("start_weight_update"))
        for chunk in in_chunks(self.weights, 1):
            ray.get(self.engine.ask.remote("update_weights", {"update_info": {"chunk": chunk}}))
        ray.get(self.engine.ask.remote("finish_weight_update"))
        ray.get(loading)

    def memcpy(self) -> None:
        """Once through memory, into pages that are there."""
        with torch.no_grad():
            for copy, (_, tensor) in zip(self.copies, self.weights, strict=True):
                copy.copy_(tensor)

    def change(self) -> None:
        """Let the learner have other weights than any engine was ever given."""
        with torch.no_grad():
            for parameter in self.saved.model.parameters():
                parameter.mul_(1.25)

    def restart(self) -> None:
        """Save, and start another engine with it."""
        self.saved.model.save_pretrained(self.saved.folder)
        ray.kill(start_engine(self.saved, RolloutConfig(), self.context_length, self.threads))


def measure(settings: Settings) -> Iterator[Row]:
    """Against each."""
    shape = SHAPES[settings.small]
    with saved_model(shape, WORDS) as saved, local_ray():
        engine = start_engine(saved, RolloutConfig(max_new_tokens=16, temperature=1.0), shape.context_length, settings.threads)
        ways = Ways(saved, engine, shape.context_length, settings.threads)
        quick = take_turns(
            {"ours": ways.ours, "per tensor": ways.per_tensor, "memcpy": ways.memcpy}, settings.repetitions, of_all_processes
        )
        few = replace(settings, repetitions=min(RESTARTS, settings.repetitions))
        slow = take_turns({"ours": ways.ours, "restart": ways.restart}, few.repetitions, of_all_processes)
        ways.change()
        ways.ours()
        rollouts = ray.get(engine.sample.remote(prompts(4, 8, WORDS), 4, 0, 0))
        equality = f"the engine's log-probs to {gap(saved.model, rollouts):.0e} nats"
        num_bytes = sum(tensor.nbytes for _, tensor in ways.weights)
        figures = {
            "megabytes": round(num_bytes / 1e6, 1),
            "tensors": len(ways.weights),
            "megabytes_per_second": round(num_bytes / quick.seconds("ours") / 1e6),
        }
        least = statistics.median(took.wall for took in quick.took["memcpy"])
        limit = quick.ratio("memcpy", "per tensor").middle
        yield row(
            ("C6", "new weights into a running engine"), quick, ("ours", "per tensor"), settings, limit, equality, **figures
        )
        limit = least / slow.seconds("restart")
        yield row(("C6", "new weights, against a restart"), slow, ("ours", "restart"), few, limit, equality, **figures)
        yield row(("C6", "new weights, against memcpy"), quick, ("ours", "memcpy"), settings, 1.0, equality, **figures)
