"""An environment with TRL 1.12.0, the last that has a PPO trainer: a cache folder, made where it is not there.

It is one of its own, whose packages are TRL 1.12.0 alone; all else (torch, transformers, accelerate, datasets) it reads from the
environment that runs the benchmark, so that both sides compute with the same libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tokens.errors import UserError

VERSION = "1.12.0"
PATIENCE_S = 300.0
"""Longest that making it may take."""


class NotMade(UserError):
    """There is no such environment, and it could not be made."""


def cache() -> Path:
    """Where it lies: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rondo" / f"trl-{VERSION}"


def trl_python() -> Path:
    """The environment's interpreter.

    Returns:
        Its path, once the environment is whole.

    Raises:
        NotMade: if it is not there and cannot be made, as without a network.
    """
    place, libraries = cache(), sysconfig.get_path("purelib")
    python, made = place / "bin" / "python", place / "made-for"
    if made.is_file() and made.read_text() == libraries:
        return python
    _run("make an environment", [sys.executable, "-m", "venv", "--clear", str(place)])
    _run("install TRL", [str(python), "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={VERSION}"])
    (place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages" / "ours.pth").write_text(
        libraries
    )
    made.write_text(libraries)
    return python


def _run(what: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotMade(_words(what, str(error))) from error
    if done.returncode:
        raise NotMade(_words(what, (done.stderr or done.stdout).strip()))


def _words(what: str, got: str) -> str:
    last = got.splitlines()[-1] if got else "nothing"
    return (
        f"C7 compares with TRL {VERSION}, whose environment {cache()} is not there, and it could not {what}: {last}. Expected a "
        f"package index that pip reaches and room for it; run it where there is one, or leave C7 out (--only)"
    )
