"""Every text of a run is hostile, and its page shows it as text: responses, domains, names, choices, versions, reasons."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from evaluation.report import write_report
from tests.evaluation.made_up import EVIL

BREAKOUTS = (
    EVIL,
    "</script></style></title></svg><svg onload=alert(1)>",
    "' onmouseover='alert(1)' x='",
    '" autofocus onfocus="alert(1)',
    "{{ 7 * 7 }}{% include 'x' %}",
    "[x](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "\x1b]0;owned\x07\x1b[31m\u202e\u0000",
    "]]><!--",
)
TEXT = " ".join(BREAKOUTS)


class Elements(HTMLParser):
    """The tags of a page, and every attribute with its tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def elements(page: str) -> Elements:
    parsed = Elements()
    parsed.feed(page)
    return parsed


def spoiled(value: Any, key: str = "", section: str = "") -> Any:
    """A ledger with hostile text in the place of everything that is free text, and in the names that are."""
    if isinstance(value, dict):
        named = key in ("choices", "dropped", "denoised")
        return {f"{name} {TEXT}" if named else name: spoiled(inner, name, key) for name, inner in value.items()}
    if isinstance(value, list):
        return [spoiled(inner, key, section) for inner in value]
    kept = not isinstance(value, str) or key in ("config_sha256", "data_sha256", "committed_at", "judge")
    return value if kept else TEXT


def test_a_hostile_run(make_run: Callable[..., Path]) -> None:
    made = make_run(num_rounds=2, steps=2)
    clean = elements(write_report(made).read_text("utf-8"))
    run = made.rename(made.with_name(BREAKOUTS[1].replace("/", "|") + BREAKOUTS[3]))
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    (run / "ledger.json").write_text(json.dumps(spoiled(ledger)), "utf-8")
    config = {"name": TEXT, "evaluation": {"tie": 0.1, TEXT: TEXT}}
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    (run / "versions.json").write_text(json.dumps({"python": TEXT, "git_commit": TEXT}), "utf-8")
    for file in run.rglob("*.parquet"):
        table = pq.read_table(file)
        for column in {"prompt", "response", "domain"} & set(table.column_names):
            values = [f"{TEXT} {value}" for value in table[column].to_pylist()]
            table = table.set_column(table.column_names.index(column), column, [values])
        pq.write_table(table, file)
    page = write_report(run).read_text("utf-8")
    found = elements(page)
    assert found.tags <= clean.tags and found.attributes <= clean.attributes
    assert "{{ 7 * 7 }}" in page  # what looks like a template is none
    assert page.count("<script") == 1  # its own
    assert not any(f"<{tag}" in page for tag in ("img", "iframe", "object"))
