import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.run import parse_ledger, read_run, series
from evaluation.table import round_table, rounds_table
from tokens.errors import UserError


@pytest.fixture
def run_dir(full_run: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(full_run, tmp_path / "run"))


def ledger_of(run: Path) -> Any:
    return json.loads((run / "ledger.json").read_text("utf-8"))


def test_it_reads_what_is_there(full_run: Path) -> None:
    run = read_run(full_run)
    raw = ledger_of(full_run)
    assert [r.index for r in run.ledger.rounds] == [0, 1, 2]
    assert run.ledger.rounds[1].evaluation.margin_low == raw["rounds"][1]["evaluation"]["margin_low"]
    assert run.ledger.rounds[2].reward.j_after == 0.64
    assert run.versions["git_commit"] == "null"
    assert len(run.start_rows) == len(run.round_rows[2]) == 24
    assert len(run.meta_rows[0]) == 200


def test_series_follows_rounds_and_leaves_nulls_out(run_dir: Path) -> None:
    rows = [
        {"time": 1, "round": 1, "step": 0, "phase": "policy", "policy/kl": 3.0, "policy/gold": None},
        {"time": 1, "round": 0, "step": 1, "phase": "policy", "policy/kl": 2.0, "policy/gold": 0.5},
        {"time": 1, "round": 0, "step": 0, "phase": "policy", "policy/kl": 9.0},
        {"time": 2, "round": 0, "step": 0, "phase": "policy", "policy/kl": 1.0},  # run again after a crash
        {"time": 2, "round": 0, "step": 0, "phase": "reward", "reward/J": float("nan")},
        {"time": 2, "round": 3, "step": 0, "phase": "policy", "policy/kl": 4.0},  # not committed
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"time": 3, "rou', "utf-8")
    run = read_run(run_dir)
    assert series(run, "policy", "policy/kl") == [(0, 0, 1.0), (1, 0, 2.0), (2, 1, 3.0)]
    assert series(run, "policy", "policy/gold") == [(1, 0, 0.5)]
    assert series(run, "reward", "reward/J") == []


def test_a_broken_line_within_the_metrics_is_named(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"time": 1, "round": 0, "step": 0, "phase": "x"}\n{oops\n', "utf-8")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_run(run_dir)


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "metrics.jsonl", "start/evaluation.parquet"])
def test_a_missing_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=f"{Path(name).name} is missing"):
        read_run(run_dir)


def _rename(node: dict[str, Any], old: str, new: str) -> None:
    node[new] = node.pop(old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw.update(rounds=[]), "no round is committed"),
        (lambda raw: raw.update(format=2), "format 2 is not known"),
        (lambda raw: raw.update(start=None), "start must be a JSON object, got NoneType"),
        (lambda raw: raw.update(rounds={}), "'rounds' must be a list, got dict"),
        (lambda raw: _rename(raw["rounds"][1]["evaluation"], "kl", "KL"), r"rounds\[1\]: evaluation has no key 'kl'"),
        (lambda raw: raw["rounds"][0]["evaluation"].update(proxy="high"), "'proxy' must be a finite number, got 'high'"),
        (lambda raw: raw["rounds"][0]["evaluation"].update(proxy=None), "'proxy' must be a finite number, got None"),
        (
            lambda raw: raw["rounds"][0]["evaluation"].update(judge="me"),
            "'judge' must be one of gold, held_out, ensemble, got 'me'",
        ),
        (lambda raw: raw["rounds"][0]["seconds"].update(policy=True), "'policy' must be a finite number, got True"),
        (lambda raw: raw["rounds"][0].update(committed_at=5), "'committed_at' must be a string"),
    ],
)
def test_a_wrong_ledger_is_named_to_the_key(full_run: Path, spoil: Callable[[Any], None], message: str) -> None:
    raw = ledger_of(full_run)
    spoil(raw)
    with pytest.raises(UserError, match=message):
        parse_ledger(raw)


def test_a_ledger_that_is_not_json(run_dir: Path) -> None:
    (run_dir / "ledger.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        read_run(run_dir)


def test_the_terminal_table(full_run: Path) -> None:
    from rich.console import Console

    raw = ledger_of(full_run)
    last = raw["rounds"][2]["evaluation"]
    console = Console(width=200, file=io.StringIO())
    console.print(round_table(raw))
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert [line.split()[0] for line in lines if "round" in line or "SFT" in line] == ["SFT", "round", "round", "round"]
    row = next(line for line in lines if line.startswith("round 2"))
    assert f"{last['win']:.0%} / {last['tie']:.0%} / {last['lose']:.0%}" in row
    assert f"{last['margin']:+.2f} [{last['margin_low']:+.2f}, {last['margin_high']:+.2f}]" in row


def test_the_table_leaves_out_what_nobody_has(full_run: Path) -> None:
    raw = ledger_of(full_run)
    for part in (raw["start"], *raw["rounds"]):
        part["evaluation"]["gold"] = None
    for part in raw["rounds"]:
        part["reward"]["validation_accuracy"] = None
    headers = [column.header for column in round_table(raw).columns]
    assert "gold" not in headers
    assert "RM acc." not in headers
    assert "proxy" in headers


def test_steps_whose_numbers_went_wrong_have_a_column(full_run: Path) -> None:
    path = full_run / "ledger.json"
    stored = json.loads(path.read_text())
    assert "bad steps" not in rounds_table(read_run(full_run).ledger).headers  # a ledger from before there were such
    for entry in stored["rounds"]:
        entry["guards"] = {"left_out": 0, "undone": 0, "refitted": 0}
    path.write_text(json.dumps(stored))
    assert "bad steps" not in rounds_table(read_run(full_run).ledger).headers
    stored["rounds"][1]["guards"] = {"left_out": 2, "undone": 1, "refitted": 0}
    path.write_text(json.dumps(stored))
    table = rounds_table(read_run(full_run).ledger)
    assert [row[table.headers.index("bad steps")] for row in table.rows][:3] == ["–", "–", "2 left out, 1 undone"]
