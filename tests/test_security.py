"""What SECURITY.md promises, held against the source: no pickle from disk, no code from a model, nothing that runs text."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokens", "rm", "policy", "preferences", "evaluation", "sandbox", "actors", "cluster", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load", "yaml.load_all", "pandas.read_pickle",
    "pd.read_pickle", "importlib.import_module", "__import__", "Markup", "markupsafe.Markup",
}  # fmt: skip
ASK_THE_NETWORK = {
    "socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "grpc", "openai", "huggingface_hub",
    "websockets", "ftplib", "smtplib", "wandb", "mlflow", "trackio",
}  # fmt: skip
MAY_ASK = {
    "cluster/ask_page.py": "nobody: it answers the browsers of this machine",
    "benchmarks/faults/nodes.py": "nobody: this machine for a free port, and its own cluster whether it is up",
    "cluster/claims.py": "nobody: what this machine is called",
    "cluster/endpoint_judge.py": "the endpoint that --judge openai:URL names",
    "cluster/hold.py": "nobody: what this machine is called",
    "cluster/given_model.py": "the hub, with data.allow_hub",
    "cluster/preflight.py": "the cluster of RAY_ADDRESS and its dashboard",
    "cluster/tracker_kinds.py": "the trackers that report_to names",
}
"""Who may talk to another machine by itself, and to whom. Ray's and the processes' own channels are not made here."""
MEASURED_AGAINST = {"benchmarks/ratios/checkpoints.py": {"calls torch.save"}}
"""What a benchmark does as others do, to measure itself against it; it reads nothing of the kind."""
FETCHES = {
    "snapshot_download",
    "hf_hub_download",
    "load_dataset",
    "cached_file",
    "from_hub",
    "push_to_hub",
    "urlopen",
    "urlretrieve",
}
MAY_FETCH = {"cluster/given_model.py": "snapshot_download", "preferences/sources.py": "load_dataset"}
"""Where something is fetched by name; both ask ``data.allow_hub`` first, which tests of their own hold."""


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
    if "shell" in given and given["shell"] != "False":
        problems.append(f"{name} hands a text to a shell")
    if "autoescape" in given and given["autoescape"] != "True":
        problems.append(f"{name} would not escape what it shows")
    if "weights_only" in given or "allow_pickle" in given:
        problems.append(f"{name} reads a format that can hold pickles")
    if "trust_remote_code" in given and given["trust_remote_code"] != "False":
        problems.append(f"{name} may run a model's own code")
    # Weights are what a dtype is given for; a tokenizer or a config has none. Our own classes end in one of these calls.
    reads_weights = name.lower().startswith("auto") and name.endswith(".from_pretrained") and "dtype" in given
    if reads_weights and ("use_safetensors", "True") not in given.items():
        problems.append(f"{name} would read pickled weights: give use_safetensors=True")
    return problems


def asks_in(source: str) -> tuple[set[str], set[str]]:
    """Modules that a source imports which talk to other machines, and functions that it calls which fetch by name."""
    modules: set[str] = set()
    calls: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module or "")
        elif isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func).split(".")[-1])
    asking = {module for module in modules if module.split(".")[0] in ASK_THE_NETWORK and module != "urllib.parse"}
    return asking, calls & FETCHES


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_source_keeps_the_promises(path: Path) -> None:
    problems = [text.partition(": ")[2] for text in problems_in(path.read_text())]
    assert set(problems) == MEASURED_AGAINST.get(str(path.relative_to(ROOT)), set()), problems


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_only_a_few_modules_ask_other_machines(path: Path) -> None:
    name, (modules, fetches) = str(path.relative_to(ROOT)), asks_in(path.read_text())
    assert not modules or name in MAY_ASK, f"{name} imports {modules}"
    assert fetches <= ({MAY_FETCH[name]} if name in MAY_FETCH else set()), f"{name} calls {fetches}"


def test_the_lists_of_those_who_may_are_short_and_true() -> None:
    for name in MAY_ASK:
        assert asks_in((ROOT / name).read_text())[0], f"{name} needs no permission: take it off the list"
    for name, call in MAY_FETCH.items():
        assert asks_in((ROOT / name).read_text())[1] == {call}
    assert asks_in("import urllib.parse, requests\nfrom http.client import HTTPConnection\nhub.snapshot_download('x')") == (
        {"requests", "http.client"}, {"snapshot_download"},
    )  # fmt: skip


def test_pages_escape_and_only_drawings_are_exempt() -> None:
    marks = [
        (template.name, line.strip())
        for template in sorted((ROOT / "evaluation" / "templates").glob("*.j2"))
        for line in template.read_text().splitlines()
        if "| safe" in line or "autoescape" in line
    ]
    assert all(
        re.fullmatch(r'<div class="(wide|narrow)">\{\{ figure\.(drawing\.)?(wide|narrow) \| safe \}\}</div>', line)
        for _, line in marks
    )


def test_what_breaks_a_promise_is_noticed() -> None:
    source = """
import pickle
from cloudpickle import loads
torch.load(path)
AutoTokenizer.from_pretrained(path, trust_remote_code=True)
AutoModel.from_pretrained(path, dtype=float32)
AutoModel.from_pretrained(path, dtype=float32, use_safetensors=True, trust_remote_code=False)
yaml.safe_load(text)
subprocess.run(text, shell=True)
yaml.load(text, Loader=yaml.Loader)
Environment(autoescape=False)
numpy.load(path, allow_pickle=True)
subprocess.run([text], shell=False)
"""
    assert problems_in(source) == [
        "line 2: imports pickle",
        "line 3: imports cloudpickle",
        "line 4: calls torch.load",
        "line 5: AutoTokenizer.from_pretrained may run a model's own code",
        "line 6: AutoModel.from_pretrained would read pickled weights: give use_safetensors=True",
        "line 9: subprocess.run hands a text to a shell",
        "line 10: calls yaml.load",
        "line 11: Environment would not escape what it shows",
        "line 12: numpy.load reads a format that can hold pickles",
    ]
