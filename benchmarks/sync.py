"""New weights into a running engine on the CPU: how the size of the pieces matters, and what a restart costs.

    python -m benchmarks.sync

The whole way is timed: lay the weights out in Ray's object store, hand them over, vLLM's four phases, empty the prefix cache.
Sizes are interleaved, their order turned round each time; medians. One piece a tensor is what a naive sync does; the
restart (saving included) is what one does without a sync. At the end the engine's log-probs are compared with the model's.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch

from actors.transfer import Parcels, lay_out
from benchmarks.roles import gap, start_engine, timed
from cluster.run_directory import versions
from policy.sft import make_model
from sandbox.tokenizer import make_tokenizer
from tokens.records import Prompt
from tokens.shape import ModelShape

SHAPE = ModelShape(hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, context_length=128)
SIZES = {"one tensor": 1, "1 MiB": 1 << 20, "16 MiB": 16 << 20, "256 MiB": 256 << 20}
REPETITIONS = 7
RESULTS = Path(__file__).parent / "results" / "sync.jsonl"


def sync(engine: Any, model: Any, chunk_bytes: int, version: int) -> Parcels:
    """The whole way."""
    parcels = lay_out(model.named_parameters(), chunk_bytes)
    ray.get(engine.load.remote(parcels, version))
    return parcels


def main() -> None:
    """Measure, print, and append to the results."""
    torch.set_num_threads(2)
    tokenizer = make_tokenizer([f"w{i}" for i in range(240)])
    model = make_model(tokenizer, SHAPE, seed=0).eval()
    seconds: dict[str, list[float]] = {name: [] for name in SIZES}
    parts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        saving, _ = timed(lambda: model.save_pretrained(directory))
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
        starting, engine = timed(lambda: start_engine(directory))
        num_bytes = 0
        for repetition in range(REPETITIONS + 1):  # the first is a warm-up
            for size in list(SIZES) if repetition % 2 else list(SIZES)[::-1]:
                took, parcels = timed(lambda: sync(engine, model, SIZES[size], repetition))  # noqa: B023
                parts[size], num_bytes = len(parcels.refs), parcels.num_bytes
                if repetition:
                    seconds[size].append(took)
        rollouts = ray.get(engine.sample.remote([Prompt("p", "", (1, *range(4, 20)))], 4, 0, REPETITIONS))
        difference = gap(model, rollouts)
        ray.shutdown()
    common = {"bytes": num_bytes, "logprob_gap": difference, "versions": versions()}
    rows: list[dict[str, Any]] = [
        {"id": "sync", "pieces": size, "number": parts[size], "seconds": statistics.median(took), "seconds_min": min(took),
         "seconds_max": max(took), "bytes_per_second": num_bytes / statistics.median(took), **common}
        for size, took in seconds.items()
    ]  # fmt: skip
    rows.append({"id": "sync", "pieces": "restart", "number": 1, "seconds": saving + starting, **common})
    for row in rows:
        rate = f", {row['bytes_per_second'] / 1e6:.0f} MB/s" if "bytes_per_second" in row else ""
        print(f"sync of {num_bytes / 1e6:.1f} MB, {row['pieces']} ({row['number']}): {row['seconds']:.4g} s{rate}")
    print(f"largest difference of a log-prob: {difference:.1e} nats")
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
