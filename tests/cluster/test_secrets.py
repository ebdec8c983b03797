"""No secret of the environment is in what a run writes or prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.command import SECRETS


def files_with(secret: str, folder: Path) -> list[str]:
    """Files under a folder that hold a text as it is. Parquet compresses, but holds rollouts and scores alone."""
    wanted = secret.encode()
    return [str(path) for path in folder.rglob("*") if path.is_file() and wanted in path.read_bytes()]


def test_a_run_shows_no_secret(tiny_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, done = tiny_run
    storage = run.parents[1]
    assert files_with("num_rounds", run) and list((run / "logs").iterdir())  # the search finds what is there
    for name, secret in SECRETS.items():
        assert files_with(secret, storage) == [], name
        assert secret not in done.stdout + done.stderr, name
