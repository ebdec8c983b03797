"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
TWO_RANKS = ("--resources.learner.num_ranks", "2", "--resources.reward.num_ranks", "2")
TWO_SCORERS = ("--resources.scorer.num_ranks", "2")
COLOCATED = ("--resources.placement", "colocated")
"""On the CPU nothing moves, but all roles rest, wake and share bundles as they do on GPUs."""
HELD_OUT_DOMAINS = (
    "--meta.prompts", "sandbox:held_out", "--policy.prompts", "sandbox:held_out",
    "--evaluation.num_prompts", "8", "--meta.num_prompts", "16",
)  # fmt: skip
"""Prompts of the sandbox's domains that have no preferences, and as few as they are."""


SECRETS = {
    "OPENAI_API_KEY": "sentinel-of-the-endpoint",
    "HF_TOKEN": "sentinel-of-the-hub",
    "AWS_SECRET_ACCESS_KEY": "sentinel-of-the-store",
    "RAY_AUTH_TOKEN": "5e9714e1" * 8,
    "WANDB_API_KEY": "sentinel-of-a-tracker",
}
"""What every command of the tests finds in its environment, where a test does not set it, and must never show."""


@dataclass(frozen=True)
class Command:
    """``python -m cluster`` with a storage root of its own."""

    storage: Path
    path: str

    def __call__(self, *arguments: str, seconds: float = 400, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = SECRETS | {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
        environment |= {"RONDO_STORAGE": str(self.storage), "PATH": self.path}
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
