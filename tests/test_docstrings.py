"""Public functions and classes of the core say what they compute, from what, to what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("tokens", "rm", "policy", "evaluation") for path in (ROOT / package).rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def problems_in(source: str) -> list[str]:
    """What the public definitions at the top of a module fail to say, one line each."""
    problems = []
    for node in ast.parse(source).body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node) or ""
        if not docstring:
            problems.append(f"line {node.lineno}: {node.name} has no docstring")
        elif not isinstance(node, ast.ClassDef) and _takes_a_tensor(node):
            sections = ["Args:"] if _returns_nothing(node) else ["Args:", "Returns:"]
            missing = [section for section in sections if section not in docstring]
            problems += [
                f"line {node.lineno}: {node.name} takes a tensor and its docstring has no {section}" for section in missing
            ]
    return problems


def _takes_a_tensor(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return any("Tensor" in ast.unparse(argument.annotation) for argument in arguments if argument.annotation)


def _returns_nothing(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return node.returns is not None and ast.unparse(node.returns) == "None"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_public_definitions_are_documented(path: Path) -> None:
    assert problems_in(path.read_text()) == []


def test_what_is_missing_is_noticed() -> None:
    source = '''
def bare(x: int) -> int:
    return x
class Bare: ...
def thin(x: Tensor) -> Tensor:
    """Twice x."""
    return 2 * x
def shown(x: Tensor) -> None:
    """Show x.

    Args:
        x: any shape.
    """
def _private(x): ...
'''
    assert problems_in(source) == [
        "line 2: bare has no docstring",
        "line 4: Bare has no docstring",
        "line 5: thin takes a tensor and its docstring has no Args:",
        "line 5: thin takes a tensor and its docstring has no Returns:",
    ]
