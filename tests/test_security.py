"""What SECURITY.md promises, held against the source: no pickle from disk, no code from a model, nothing that runs text."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokens", "rm", "policy", "preferences", "evaluation", "sandbox", "actors", "cluster", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}


def problems_in(source: str) -> list[str]:
    """What a module does that the promises forbid, one line each."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            problems += [f"line {node.lineno}: imports {a.name}" for a in node.names if a.name.split(".")[0] in PICKLING_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING_MODULES:
            problems.append(f"line {node.lineno}: imports {node.module}")
        elif isinstance(node, ast.Call):
            problems += [f"line {node.lineno}: {problem}" for problem in _problems_of_call(node)]
    return problems


def _problems_of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    problems = [f"calls {name}"] if name in FORBIDDEN_CALLS else []
    if "trust_remote_code" in given and given["trust_remote_code"] != "False":
        problems.append(f"{name} may run a model's own code")
    # Weights are what a dtype is given for; a tokenizer or a config has none. Our own classes end in one of these calls.
    reads_weights = name.lower().startswith("auto") and name.endswith(".from_pretrained") and "dtype" in given
    if reads_weights and ("use_safetensors", "True") not in given.items():
        problems.append(f"{name} would read pickled weights: give use_safetensors=True")
    return problems


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_source_keeps_the_promises(path: Path) -> None:
    assert problems_in(path.read_text()) == []


def test_what_breaks_a_promise_is_noticed() -> None:
    source = """
import pickle
from cloudpickle import loads
torch.load(path)
AutoTokenizer.from_pretrained(path, trust_remote_code=True)
AutoModel.from_pretrained(path, dtype=float32)
AutoModel.from_pretrained(path, dtype=float32, use_safetensors=True, trust_remote_code=False)
yaml.safe_load(text)
"""
    assert problems_in(source) == [
        "line 2: imports pickle",
        "line 3: imports cloudpickle",
        "line 4: calls torch.load",
        "line 5: AutoTokenizer.from_pretrained may run a model's own code",
        "line 6: AutoModel.from_pretrained would read pickled weights: give use_safetensors=True",
    ]
