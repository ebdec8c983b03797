"""Runs of the real command, on a real local Ray with real vLLM engines, shared by the tests that look at them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.command import COLOCATED, HELD_OUT_DOMAINS, TINY, TWO_RANKS, TWO_SCORERS, Command

COMPILERS = ("g++", "gcc", "c++", "cc", "clang", "clang++")


@pytest.fixture(scope="session")
def path_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with the ordinary tools but no C or C++ compiler."""
    directory = tmp_path_factory.mktemp("bin")
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            plain = tool.name.split("-")[0]
            if plain not in COMPILERS and not tool.name.endswith(COMPILERS) and not (directory / tool.name).exists():
                (directory / tool.name).symlink_to(tool)
    assert all(shutil.which(name, path=str(directory)) is None for name in COMPILERS)
    return str(directory)


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory, path_without_compiler: str) -> Command:
    """The command line, on a machine without a compiler."""
    return Command(tmp_path_factory.mktemp("storage"), path_without_compiler)


@pytest.fixture(scope="session")
def tiny_run(command: Command) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two rounds of the tiny config, run once: the run directory and what the command printed."""
    done = command("run", str(TINY))
    assert done.returncode == 0, done.stdout + done.stderr
    return command.storage / "runs" / "tiny", done


@pytest.fixture(scope="session")
def ranks_run(command: Command) -> Path:
    """One round with two ranks each of learner and reward trainer and two scorers, colocated: the run directory."""
    done = command("run", str(TINY), "--name", "tiny-ranks", "--rounds.num_rounds", "1", *TWO_RANKS, *TWO_SCORERS, *COLOCATED)
    assert done.returncode == 0, done.stdout + done.stderr
    return command.storage / "runs" / "tiny-ranks"


@pytest.fixture(scope="session")
def pool_run(command: Command) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One round with two engines that sample ahead, on prompts of domains without preferences, judged by held-out reward models,
    after which it ends by itself: the run directory and what the command printed."""
    engines = ("--rollout.num_engines", "2", "--policy.max_lag", "1", "--policy.steps_per_round", "4")
    stop = ("--rounds.num_rounds", "5", "--rounds.stop.patience", "1", "--rounds.stop.min_delta", "1000")
    judges = ("--evaluation.judge", "held_out", "--evaluation.held_out_members", "2")
    done = command("run", str(TINY), "--name", "tiny-pool", *stop, *judges, *engines, *HELD_OUT_DOMAINS)
    assert done.returncode == 0, done.stdout + done.stderr
    return command.storage / "runs" / "tiny-pool", done


@pytest.fixture
def mounted() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a small file system in memory; needs the right to."""
    done: list[Path] = []

    def mount(place: Path, size: int) -> None:
        answer = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if answer.returncode:
            pytest.skip(f"may not mount a tmpfs here: {answer.stderr.strip()}")
        done.append(place)

    yield mount
    for place in done:
        subprocess.run(["umount", str(place)], check=True)
