"""The set-up script's decisions, without installing anything, and the lock files that it installs."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "setup.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rondo_setup", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_script()

GOOD = setup.Machine(
    system="Linux",
    architecture="x86_64",
    python=(3, 8),
    glibc=(2, 28),
    avx2=True,
    memory_bytes=6 * 10**9,
    disk_bytes=8 * 10**9,
)


def test_preflight_accepts_the_smallest_machine() -> None:
    assert setup.preflight(GOOD, "cpu") == []


@pytest.mark.parametrize(
    ("change", "got", "needs"),
    [
        ({"system": "Darwin"}, "Darwin", "needs Linux"),
        ({"architecture": "aarch64"}, "aarch64", "needs x86_64"),
        ({"avx2": False}, "no AVX2", "AVX2"),
        ({"glibc": None}, "another C library", "needs glibc 2.28"),
        ({"glibc": (2, 17)}, "glibc 2.17", "needs glibc 2.28"),
        ({"python": (3, 7)}, "3.7", "needs 3.8"),
        ({"memory_bytes": 4 * 10**9}, "4.0 GB", "needs 6 GB"),
        ({"disk_bytes": 7 * 10**9}, "7.0 GB free", "needs 8 GB"),
    ],
)
def test_preflight_names_what_is_wrong(change: dict[str, object], got: str, needs: str) -> None:
    (problem,) = setup.preflight(GOOD._replace(**change), "cpu")
    assert got in problem
    assert needs in problem
    assert "\n" not in problem


def test_preflight_names_every_problem_at_once() -> None:
    machine = GOOD._replace(architecture="aarch64", memory_bytes=10**9, disk_bytes=0)
    assert len(setup.preflight(machine, "cpu")) == 3


def test_preflight_asks_more_disk_for_the_gpu() -> None:
    assert len(setup.preflight(GOOD, "gpu")) == 1
    assert setup.preflight(GOOD._replace(disk_bytes=25 * 10**9, avx2=False), "gpu") == []


def test_this_machine_is_measured() -> None:
    machine = setup.this_machine(ROOT)
    assert machine.system == "Linux"
    assert machine.python == sys.version_info[:2]
    assert 10**8 < machine.memory_bytes < 10**15
    assert machine.disk_bytes > 0


def test_a_bad_machine_stops_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requirements-cpu.txt").write_text("torch==2.13.0+cpu\n")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "this_machine", lambda root: GOOD._replace(system="Windows"))
    assert setup.main(["cpu"]) == 2
    assert "error: unsupported system: got Windows" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["requirements-cpu.txt"]


def test_unknown_extra_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["tpu"]) == 2
    assert "cpu|gpu" in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A root whose .venv was completed for its CPU lock."""
    lock = tmp_path / "requirements-cpu.txt"
    lock.write_text("torch==2.13.0+cpu\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / ".rondo-stamp").write_text(setup.stamp_text("cpu", lock))
    return tmp_path


def test_a_finished_environment_is_reused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a finished environment was touched")

    for name in ("find_uv", "make_venv", "install", "this_machine"):
        monkeypatch.setattr(setup, name, never)
    monkeypatch.setattr(setup, "ROOT", finished)
    assert setup.main([]) == 0


def test_what_makes_an_environment_stale(finished: Path) -> None:
    venv, lock = finished / ".venv", finished / "requirements-cpu.txt"
    assert setup.is_current(venv, "cpu", lock)
    assert not setup.is_current(venv, "gpu", lock)
    lock.write_text("torch==2.14.0+cpu\n")
    assert not setup.is_current(venv, "cpu", lock)
    lock.write_text("torch==2.13.0+cpu\n")
    (venv / "bin" / "python").unlink()
    assert not setup.is_current(venv, "cpu", lock)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / ".rondo-stamp").unlink()
    assert not setup.is_current(venv, "cpu", lock)


def test_an_interrupted_install_leaves_no_stamp(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "requirements-cpu.txt").write_text("torch==2.14.0+cpu\n")

    def interrupted(*arguments: object) -> None:
        assert not (finished / ".venv" / ".rondo-stamp").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "ROOT", finished)
    monkeypatch.setattr(setup, "this_machine", lambda root: GOOD)
    monkeypatch.setattr(setup, "find_uv", lambda root: "uv")
    monkeypatch.setattr(setup, "install", interrupted)
    assert setup.main(["cpu"]) == 130
    assert not (finished / ".venv" / ".rondo-stamp").exists()


def test_without_a_word_the_installed_extra_stays(finished: Path) -> None:
    assert setup.installed_extra(finished / ".venv") == "cpu"
    (finished / ".venv" / ".rondo-stamp").write_text("gpu 0\n")
    assert setup.installed_extra(finished / ".venv") == "gpu"
    (finished / ".venv" / ".rondo-stamp").write_text("")
    assert setup.installed_extra(finished / ".venv") is None


@pytest.mark.parametrize(
    ("environ", "pip_config", "expected"),
    [
        ({}, "", ""),
        ({}, "/a\n/b", "/a,/b"),
        ({"PIP_FIND_LINKS": "/c /d"}, "/a", "/c,/d"),
        ({"UV_FIND_LINKS": "/e,/f", "PIP_FIND_LINKS": "/c"}, "/a", "/e,/f"),
        ({"UV_FIND_LINKS": "", "PIP_FIND_LINKS": " "}, "/a", "/a"),
    ],
)
def test_find_links(environ: dict[str, str], pip_config: str, expected: str) -> None:
    assert setup.find_links(environ, pip_config) == expected


def installed_by(lock_line: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that install() gives for a lock of one line, where the command with ``fails`` in it fails."""
    commands: list[list[str]] = []

    def record(command: list[str], environ: dict[str, str], quiet: bool = False) -> bool:
        commands.append(command)
        return fails not in command

    monkeypatch.setattr(setup, "run", record)
    (tmp_path / "lock.txt").write_text(lock_line + "\n")
    setup.install("uv", tmp_path / ".venv", tmp_path / "lock.txt", {})
    return commands


def test_torch_comes_from_the_machine_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = installed_by("torch==2.13.0+cpu", "nothing", tmp_path, monkeypatch)
    assert ["--no-index" in command for command in commands] == [True, False]
    assert not any(setup.TORCH_CPU_INDEX in command for command in commands)


def test_torch_comes_from_its_own_index_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = installed_by("torch==2.13.0+cpu", "--no-index", tmp_path, monkeypatch)
    assert [setup.TORCH_CPU_INDEX in command for command in commands] == [False, True, False]
    assert "torch==2.13.0+cpu" in commands[1]


def test_the_gpu_lock_asks_no_cpu_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = installed_by("torch==2.13.0", "nothing", tmp_path, monkeypatch)
    assert "sync" in command


def test_torch_nowhere_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(setup.SetupError, match="UV_FIND_LINKS"):
        installed_by("torch==2.13.0+cpu", "--no-deps", tmp_path, monkeypatch)


def test_script_is_read_by_old_pythons() -> None:
    """No syntax later than 3.8's, and nothing but the standard library."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(("lock", "torch"), [("requirements-cpu.txt", "2.13.0+cpu"), ("requirements-gpu.txt", "2.13.0")])
def test_locks_pin_everything_and_name_no_place(lock: str, torch: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    packages = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(packages) > 150
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.+!]+", line) for line in lines if not line.startswith("#"))
    assert "://" not in "\n".join(lines)
    assert packages["torch"] == torch
    assert {"pytest", "ruff", "mypy", "import-linter", "ray", "transformers", "trl"} <= set(packages)


def test_cpu_lock_leaves_the_cuda_builds_out() -> None:
    names = {line.split("==")[0] for line in (ROOT / "requirements-cpu.txt").read_text().splitlines()}
    excluded = [line for line in (ROOT / "scripts" / "cpu-excludes.txt").read_text().splitlines() if not line.startswith("#")]
    assert excluded == ["torchvision", "torchaudio", "torchcodec"]
    assert not names & set(excluded)
    assert not {name for name in names if name.startswith("nvidia-")}


def test_make_says_its_verbs() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, env=environ, timeout=60)
    assert result.returncode == 0, result.stderr
    for verb in ("quickstart", "test", "test-all", "check", "env-gpu", "bench", "clean"):
        assert f"make {verb} " in result.stdout
