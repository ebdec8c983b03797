"""G8: whole rounds on one GPU: roles that take turns on it, and roles side by side, on-policy and sampling one batch ahead.

Real runs of ``configs/quickstart.yaml`` with a policy of half a billion weights made from scratch, all five roles on the
GPU. Seconds of a PPO step are read from the runs' timelines, and so is what share of the driver's waiting each phase has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.rows import Place, Row, Scene
from benchmarks.overlap import REAL, seconds_per_step
from cluster.load_config import load_config
from cluster.storage import storage_root
from evaluation.timeline import DRIVER, Span, read_timeline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
ROLES = ("rollout", "reward", "scorer", "learner")
SHARE, WHY = "0.25", "all roles of a measurement lie on one GPU, whose memory holds them"
STEPS = 6


def place(size: str, way: str) -> Place:
    """Id and case of a way."""
    return "G8", f"PPO step of a run, {size}, {way}"


WAYS = {"in turn": ("colocated", 0), "side by side": ("disaggregated", 0), "one batch ahead": ("disaggregated", 1)}
"""Placement and ``policy.max_lag``."""


def words(size: str, way: str, cuda: bool) -> list[str]:
    """Options of a run.

    Args:
        size: of the policy.
        way: of ``WAYS``.
        cuda: whether the roles have the GPU.
    """
    shape, (placement, max_lag) = SHAPES[size], WAYS[way]
    sizes = {
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_layers": shape.layers, "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
    }  # fmt: skip
    found = [*REAL, "--policy.steps_per_round", str(STEPS), "--policy.max_lag", str(max_lag)]
    for name, value in sizes.items():
        found += [f"--sft.shape.{name}", str(value)]
    if not cuda:
        return found
    found += ["--resources.placement", placement, "--rollout.gpu_memory_utilization", "0.3", "--rollout.parity_bound", "1.0"]
    found += ["--rollout.sync", "ipc" if placement == "colocated" else "store"]
    for role in ROLES:
        share = ["1"] if placement == "colocated" else [SHARE, f"--resources.{role}.fraction_reason", WHY]
        found += [f"--resources.{role}.dtype", "bfloat16", f"--resources.{role}.num_gpus", *share]
    return found


def shares(spans: Sequence[Span]) -> dict[str, float]:
    """Of the driver's waiting within PPO steps, by phase.

    Args:
        spans: of a run.
    """
    waits = [span for span in spans if span.who == DRIVER and span.step is not None]
    whole = sum(span.end - span.start for span in waits)
    phases = dict.fromkeys(span.what for span in waits)
    return {f"share_{what}": sum(s.end - s.start for s in waits if s.what == what) / whole for what in phases}


def rounds(size: str, scene: Scene) -> Iterator[Row]:
    """A run of each way; ratios are to roles that take turns.

    Args:
        size: of the policy.
        scene: of the measurement.
    """
    cuda, first = scene.device.kind == "cuda", 0.0
    for way in WAYS:
        name = f"bench-gpu-{os.getpid()}-{way.replace(' ', '-')}"
        options = [*words("tiny" if scene.settings.small else size, way, cuda), "--name", name]
        subprocess.run([sys.executable, "-m", "cluster", "run", str(CONFIG), *options], check=True, cwd=ROOT)
        spans = read_timeline(storage_root(load_config(CONFIG, options)) / "runs" / name / "timeline.jsonl")
        seconds = seconds_per_step(spans)
        first = first or seconds
        yield Row(*place(size, way), seconds=seconds, ratio=seconds / first, figures={"steps": STEPS, **shares(spans)})
