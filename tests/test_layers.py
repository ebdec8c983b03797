"""The arrows between the folders, and what may be loaded by whom."""

import pkgutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules_of(package: str) -> list[str]:
    found = [package]
    found += [module.name for module in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")]
    return sorted(found)


def loaded_after_import(modules: list[str]) -> set[str]:
    """Names of the top-level modules that a fresh interpreter holds after importing ``modules``."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return {line.split(".")[0] for line in result.stdout.splitlines()}


def test_modules_are_found() -> None:
    assert {"tokens.records", "tokens.section"} <= set(modules_of("tokens"))
    assert "rm.config" in modules_of("rm")


def test_core_loads_neither_ray_nor_vllm() -> None:
    loaded = loaded_after_import(modules_of("tokens") + modules_of("rm") + modules_of("policy"))
    assert "torch" in loaded
    assert not loaded & {"ray", "vllm"}


def test_config_loads_nothing_heavy() -> None:
    """`--help` and `plan` answer in a second because reading a config loads pydantic and little else."""
    loaded = loaded_after_import(["cluster.config"])
    assert "pydantic" in loaded
    assert not loaded & {"ray", "vllm", "torch", "transformers", "trl", "datasets", "pyarrow", "matplotlib", "scipy", "numpy"}


def test_the_driver_leaves_transformers_for_later() -> None:
    """It imports the models' code without scipy and scikit-learn (``actors.process.import_transformers``), seconds of a core."""
    loaded = loaded_after_import(
        ["cluster.cli", "cluster.run", "cluster.rounds", "cluster.start", "cluster.recovery", "cluster.reward"]
    )
    assert "torch" in loaded
    assert not loaded & {"vllm", "transformers", "scipy", "sklearn", "matplotlib"}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


def test_imports_point_downward() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_an_import_against_the_arrows_is_caught(tmp_path: Path) -> None:
    """The contracts themselves work: a sideways import and a Ray import below actors/ break one each."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for package in ["cluster", "actors", "rm", "policy", "preferences", "evaluation", "sandbox", "tokens"]:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / "rm" / "bad.py").write_text("import policy\nimport ray\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1
    assert "2 broken" in broken.stdout
