"""With RONDO_REQUIRE_ALL=1, as .ci/run sets it, a skipped test is a failed one, GPU tests apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

SKIPPING = """
import pytest

@pytest.fixture
def missing():
    pytest.skip("nothing there")

def test_fixture(missing):
    pass

@pytest.mark.skipif(True, reason="no browser")
def test_mark():
    pass

@pytest.mark.gpu
@pytest.mark.skip(reason="no CUDA device")
def test_gpu():
    pass

@pytest.mark.xfail(strict=True)
def test_known():
    raise ValueError

def test_passes():
    pass
"""


def run_pytest(tmp_path: Path, require_all: str, *options: str) -> str:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_one.py").write_text(SKIPPING)
    (tmp_path / "test_two.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        *options,
        str(tmp_path),
    ]
    environ = {**os.environ, "RONDO_REQUIRE_ALL": require_all, "PYTHONPATH": str(TESTS.parent)}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ, timeout=120).stdout


def test_skips_are_skips_on_a_users_machine(tmp_path: Path) -> None:
    assert "1 passed, 4 skipped, 1 xfailed" in run_pytest(tmp_path, require_all="")


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_skips_fail_where_everything_is_required(tmp_path: Path, options: tuple[str, ...]) -> None:
    output = run_pytest(tmp_path, "1", *options)
    assert "1 passed, 1 skipped, 1 xfailed, 3 errors" in output
    for reason in ("nothing there", "no browser", "could not import 'no_such_module'"):
        assert f"RONDO_REQUIRE_ALL=1, and this was skipped: Skipped: {reason}" in output


@pytest.mark.parametrize("name", ["slow", "gpu"])
def test_markers_are_declared(name: str, pytestconfig: pytest.Config) -> None:
    assert any(line.startswith(f"{name}:") for line in pytestconfig.getini("markers"))
