"""G5, G6 and G7 with vLLM: one engine as a run starts it, beside a policy of the same weights in this process on the same GPU.

Decoding is held against the bytes that it must read (the weights at each step, and the keys and values so far), new weights
by ``ipc`` against reading and writing them once, sleep and wake against the link to the host. On the CPU there is neither
``ipc`` nor sleep: the weights travel through the store, and a rest does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from actors.config import RolloutConfig
from actors.process import Identity, ProcessSetup, engine_environment
from actors.rollout import RolloutEngine
from actors.transfer import Live, TransferSetup, make_sender
from benchmarks.gpu.device import Kind, Measured, measured
from benchmarks.gpu.models import SHAPES, Shape, language_model
from benchmarks.gpu.rows import Row, Scene, floor_row
from cluster.console import Console
from cluster.fixed_pool import FixedPool
from cluster.rota import OwnDevices, Process
from cluster.waiting import Waiter
from sandbox.tokenizer import make_tokenizer
from tokens.ranks import ALONE
from tokens.records import Prompt, Rollout

SIZES = {False: (128, 128, 512, 2048), True: (2, 6, 8, 64)}
"""Prompts, tokens of each, most tokens of a response, and the context; by whether it is to be small."""
GPU_SHARE, DEADLINE_S = 0.4, 600.0
"""Of the GPU's memory, vLLM's; longest wait of one end of a transfer for the other."""


def cache_bytes(shape: Shape) -> int:
    """Bytes of a token's keys and values in bfloat16: 2 * L * h * kv_heads / heads * 2."""
    return 4 * shape.layers * shape.hidden * shape.kv_heads // shape.heads


def decode_floor(shape: Shape, prompt: int, lengths: list[int], bandwidth: float) -> float:
    """Seconds that decoding takes at least, all sequences side by side: at each step the weights are read, and of every sequence
    that goes on the cache of what it has so far.

    Args:
        shape: of the model, in bfloat16.
        prompt: tokens of each prompt.
        lengths: of the responses.
        bandwidth: bytes/s.
    """
    weights = 2 * shape.with_logits * max(lengths)
    cached = sum(prompt * r + r * (r - 1) // 2 for r in lengths)
    return (weights + cache_bytes(shape) * cached) / bandwidth


@contextmanager
def ready(size: str, kind: Kind, limit: int, context: int, transfer: TransferSetup) -> Iterator[tuple[Any, Any, Path]]:
    """An engine on the device, the policy that it was made from, and their folder.

    Args:
        size: of the policy.
        kind: of the device.
        limit: most tokens of a response.
        context: longest prompt with its response.
        transfer: how weights travel.
    """
    dtype = "bfloat16" if kind == "cuda" else "float32"
    policy = language_model(size, kind, getattr(torch, dtype))
    with TemporaryDirectory() as name:
        folder = Path(name)
        policy.save_pretrained(folder)
        make_tokenizer([f"w{i}" for i in range(240)]).save_pretrained(folder)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2, num_gpus=int(kind == "cuda"))
        try:
            setup = ProcessSetup("rollout-0", folder / "log", 1, kind, dtype, 0, 1, False, shares_device=True)
            environment = {"env_vars": engine_environment(setup, False)}
            config = RolloutConfig(temperature=1.0, max_new_tokens=limit, gpu_memory_utilization=GPU_SHARE)
            actor: Any = RolloutEngine
            options = actor.options(num_cpus=1, num_gpus=int(kind == "cuda"), runtime_env=environment)
            engine = options.remote(setup, folder, config, context, transfer)
            ray.get(engine.identity.remote())
            yield engine, policy, folder
        finally:
            ray.shutdown()


def engine(size: str, scene: Scene) -> Iterator[Row]:
    """Decoding, new weights, sleep; by one engine.

    Args:
        size: of the policy.
        scene: of the measurement.
    """
    kind, small, roofs = scene.device.kind, scene.settings.small, scene.device.roofs
    number, prompt, limit, context = SIZES[small]
    name = "tiny" if small else size
    transfer = TransferSetup(
        "ipc" if kind == "cuda" else "store", "bfloat16" if kind == "cuda" else "float32", deadline_s=DEADLINE_S
    )
    asked = [Prompt(f"p{i}", "", tuple(4 + (i * 7 + j) % 200 for j in range(prompt))) for i in range(number)]
    with ready(name, kind, limit, context, transfer) as (actor, policy, folder):
        pool = FixedPool([Process(actor, Identity("rollout-0", 0, ""))], OwnDevices())
        wait = Waiter(Console(), folder, DEADLINE_S, lambda span: None)
        wait.begin("round 0", 0)
        sender = make_sender(lambda: ALONE.stream(policy), ALONE, [actor], transfer)
        versions = count(1)

        def sync() -> None:
            if transfer.backend == "store":
                ray.get(actor.load.remote(sender.send(), next(versions)))
                return
            loading = actor.load.remote(Live(), next(versions))
            sender.send()
            ray.get(loading)

        def sample() -> list[Rollout]:
            return wait("sample", pool.sample(asked, 1, 0, 0))

        def sleep() -> None:
            ray.get(actor.rest.remote(("weights", "kv_cache")))
            ray.get(actor.wake.remote(("weights", "kv_cache")))

        sync()
        lengths = [len(r.response_ids) for r in sample()]
        work: dict[str, Callable[[], object]] = {"sample": sample, "sync": sync}
        prepare = partial(_fresh, sync)
        found = _timed(scene, work, prepare)
        num_bytes = sum(p.nbytes for p in policy.parameters())
        floor = decode_floor(SHAPES[name], prompt, lengths, roofs.bandwidth)
        tokens, seconds = sum(lengths), found.turns.seconds("sample")
        figures = {
            "sequences": number,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_ms": 1000 * seconds / max(lengths),
        }
        yield floor_row(("G5", f"decoding, {size}"), found, "sample", floor, **figures)
        speed = num_bytes / 1e9 / found.turns.seconds("sync")
        floor = 2 * num_bytes / roofs.bandwidth
        figures = {"gb": num_bytes / 1e9, "gb_per_second": speed}
        yield floor_row(("G6", f"new weights into the engine, {size}"), found, "sync", floor, backend=transfer.backend, **figures)
        found = _timed(scene, {"sleep": sleep})
        floor = num_bytes / roofs.to_host + num_bytes / roofs.from_host
        yield floor_row(("G7", f"engine sleeps and wakes, {size}"), found, "sleep", floor, gb=num_bytes / 1e9)


def _timed(scene: Scene, ways: Mapping[str, Callable[[], object]], prepare: Callable[[str], None] = lambda way: None) -> Measured:
    """Turns; without peaks, since the memory that counts is of another process."""
    found = measured(scene.device.kind, ways, scene.settings.repetitions, prepare)
    return replace(found, peaks=dict.fromkeys(found.peaks))


def _fresh(sync: Callable[[], None], way: str) -> None:
    """Before it samples the engine gets its weights anew, which empties the prefix cache."""
    if way == "sample":
        sync()
