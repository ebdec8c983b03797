"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")


@dataclass(frozen=True)
class Command:
    """``python -m cluster`` with a storage root of its own."""

    storage: Path
    path: str

    def __call__(self, *arguments: str, seconds: float = 400, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
        environment |= {"RONDO_STORAGE": str(self.storage), "PATH": self.path}
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
