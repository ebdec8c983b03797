"""docs/deploy.md: what can run here runs, what cannot says so, and what it says of `ray` and of Rondo is at least understood."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cluster.cli import main
from cluster.load_config import load_config
from tests.cluster.command import ROOT

PAGE = ROOT / "docs" / "deploy.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
MARK = "# not run here: "


def commands(run: bool) -> list[str]:
    return [
        line
        for block in BLOCKS
        if block.startswith(MARK) != run
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip


def test_every_block_is_run_or_says_why_not() -> None:
    assert PAGE.read_text().count("\n```") == 2 * len(BLOCKS), "all blocks are commands"
    assert len(commands(run=True)) >= 3 and len(commands(run=False)) >= 20


@pytest.mark.parametrize("command", [line for line in commands(run=True) if "-m cluster" in line])
def test_commands_of_rondo_that_run_here(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "cluster"]
    assert main(words[3:]) == 0
    assert "Everything fits." in capsys.readouterr().out


def test_the_other_commands_that_run_here(tmp_path: Path) -> None:
    others = [line for line in commands(run=True) if "-m cluster" not in line]
    assert others == ["ray get-auth-token --generate"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}
    ray = str(Path(sys.executable).with_name("ray"))
    done = subprocess.run([ray, *shlex.split(others[0])[1:]], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) >= 32


def parsed(words: list[str]) -> dict[str, object]:
    """Options and arguments of a command of `ray`, as its own parser reads them."""
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    return command.make_context(str(command.name), list(words)).params


@pytest.mark.parametrize("command", [line for line in commands(run=False) if line.startswith("ray ")])
def test_ray_understands_its_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = parsed(shlex.split(command)[1:])
    if "cluster_config_file" in params:
        assert (ROOT / str(params["cluster_config_file"])).is_file()
    if "submit" in command:
        entrypoint = params["entrypoint"]
        assert isinstance(entrypoint, tuple) and entrypoint[:4] == ("python", "-m", "cluster", "run")
        config = load_config(ROOT / entrypoint[4], entrypoint[5:])
        assert config.storage == "/mnt/rondo" and all(
            share.labels for share in (config.resources.rollout, config.resources.reward, config.resources.learner)
        )


def test_files_that_are_named_are_there() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"(?:cluster/deploy|configs)/[\w.-]+\.\w+", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    missing = [name for name in named if not ((ROOT / name).exists() or (PAGE.parent / name).exists())]
    assert not missing
