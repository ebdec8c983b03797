"""What the tests of bad input share: good data, and what holds whenever a command refuses something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
import yaml

from cluster.cli import main
from tests.cluster.command import TINY

GOOD: list[dict[str, object]] = [{"prompt": f"say {i}", "chosen": f"word {i} is good", "rejected": f"no {i}"} for i in range(200)]
REAL = ["--evaluation.judge", "ensemble", "--sft.shape.vocab_size", "300", "--data.max_prompt_tokens", "24"]


def refused(capsys: pytest.CaptureFixture[str], storage: Path, *arguments: str) -> str:
    """Run the command; check all that holds for every bad input; return its message."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not ray.is_initialized()
    left = [path for path in storage.rglob("*") if "tokenizer-" not in str(path) and path.is_file()] if storage.exists() else []
    assert not left, left
    return printed.err


def config(**sections: object) -> dict[str, object]:
    tree: dict[str, object] = yaml.safe_load(TINY.read_text())
    return tree | sections


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def changed(**values: object) -> bytes:
    rows: list[dict[str, object]] = [dict(row) for row in GOOD]
    rows[2] |= values
    return jsonl(rows)
