"""What holds for every test: no network, no skipping of what a machine is required to have."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Set before any test module imports transformers or datasets, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

settings.register_profile("house", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device; where workers share the tests, put them into their order."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        import torch

        from tests.side_by_side import in_turn

        in_turn(items, ROOT)
        torch.set_num_threads(1)  # a core for each worker
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2``: whole files, in an order that suits two workers."""
    from tests.side_by_side import SideBySide

    return SideBySide(config, log)


def _has_cuda() -> bool:
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):  # the latter under WSL
        return False
    import torch

    return torch.cuda.is_available()


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    """With RONDO_REQUIRE_ALL=1 a skipped test is a failed one: what it needs should have been installed."""
    if os.environ.get("RONDO_REQUIRE_ALL") == "1" and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"RONDO_REQUIRE_ALL=1, and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("gpu") is None and not hasattr(report, "wasxfail"):
        _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_required(report)  # a whole module that skipped itself
    return report


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real preference data beside the checkout; it is not part of the project and may be absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path
