"""What was found, as JSON lines that the next start goes on after, and as a table."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.cells import CELLS
from benchmarks.faults.invariants import HELD, Held
from cluster.versions import versions

SHOWN, CELL = 160, 110
"""Characters of an invariant that does not hold, and of other words, in the table."""
RESULTS = Path(__file__).parents[1] / "results" / "faults.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Of one fault.

    Args:
        cell: of the matrix.
        detected_s: from the fault to the first line that names it; None where nothing is to be said.
        recovered_s: from that line until the role worked again; None where the run ended.
        cold_start_s: what starting a process of the role took in the same run, as the run itself says; of the driver, what it
            took the first time; None where that means nothing.
        lost: work that was done twice or not at all, in words.
        note: what else there is to say.
        figures: further numbers.
    """

    cell: str
    detected_s: float | None
    recovered_s: float | None
    cold_start_s: float | None
    lost: str
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def beyond_s(self) -> float | None:
        """Recovery beyond the start."""
        if self.recovered_s is None or self.cold_start_s is None:
            return None
        return self.recovered_s - self.cold_start_s


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "load": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Record:
    """Appends to the results.

    Args:
        path: of the file.
        label: of this set of measurements; a start with the same one goes on.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label, self.session = path, label, round(time.time(), 3)
        path.parent.mkdir(exist_ok=True)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """What was written under this label.

        Args:
            kind: ``cell``, ``monkey``, ``writes`` or ``goodput``.
        """
        stored = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [row for row in stored if row["id"] == kind and row["label"] == self.label]

    def cells(self) -> dict[str, dict[str, Any]]:
        """What is known of each cell: all rows of the last start that played it, as one; any that is broken breaks it."""
        merged: dict[str, dict[str, Any]] = {}
        for row in self.rows("cell"):
            before = merged[row["cell"]] if row["cell"] in merged else None
            same = before is not None and before["session"] == row["session"]
            merged[row["cell"]] = _both(before, row) if same and before is not None else row
        return merged

    def seeds(self) -> list[dict[str, Any]]:
        """The monkey's runs, each seed as it was played last, in order."""
        last = {row["seed"]: row for row in self.rows("monkey")}
        return [last[seed] for seed in sorted(last)]

    def outcome(self, outcome: Outcome, held: Held) -> None:
        """One fault and what held after it."""
        cell = CELLS[outcome.cell]
        row = {**asdict(outcome), "who": cell.who, "fault": cell.fault, "beyond_s": outcome.beyond_s}
        row |= {"invariants": held.words(), "held": held.all}
        self.write("cell", row)
        print(line(row), flush=True)

    def failed(self, cell: str, why: str) -> None:
        """A fault of which nothing else can be told: the scenario broke."""
        self.outcome(Outcome(cell, None, None, None, "not known"), Held({"I5": (why,)}))

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """One row, with what it was measured on."""
        whole = {"id": kind, "label": self.label, "session": self.session, **_rounded(row)}
        with self.path.open("a") as file:
            file.write(json.dumps({**whole, "machine": machine(), "versions": versions()}) + "\n")


def last_label(path: Path) -> str:
    """That of the last row; "" where there is none.

    Args:
        path: of the results.
    """
    lines = _lines(str(path))
    return str(json.loads(lines[-1])["label"]) if lines else ""


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted({*one["invariants"], *other["invariants"]})
    words = {name: [row["invariants"][name] for row in (one, other) if name in row["invariants"]] for name in names}
    broken = {name: "; ".join(each for each in said if each != HELD) or HELD for name, said in words.items()}
    times: dict[str, float | None] = {}
    for key in ("detected_s", "recovered_s", "cold_start_s", "beyond_s"):
        values = [row[key] for row in (one, other) if row[key] is not None]
        times[key] = max(values) if values else None
    lost = "; ".join(dict.fromkeys(row["lost"] for row in (one, other)))
    return {**other, **times, "lost": lost, "invariants": broken, "held": one["held"] and other["held"]}


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def seconds(value: float | None) -> str:
    """For the table."""
    return "-" if value is None else f"{value:.1f}"


def short(words: str) -> str:
    """For the table."""
    return words if len(words) <= CELL else f"{words[: CELL - 2].rstrip()} …"


def what_holds(invariants: Mapping[str, str]) -> str:
    """Which invariants were looked at and held, and what is wrong with the others."""
    good = sorted(name for name, words in invariants.items() if words == HELD)
    wrong = [f"**{name}**: {words[:SHOWN]}" for name, words in invariants.items() if words != HELD]
    return "; ".join([*wrong, *([f"{' '.join(good)} held"] if good else [])])


def line(row: Mapping[str, Any]) -> str:
    """One fault on a line, for whoever watches."""
    return (
        f"{row['cell']:>4} {row['who']}, {row['fault']}: detected {seconds(row['detected_s'])} s, recovered "
        f"{seconds(row['recovered_s'])} s (of which its start {seconds(row['cold_start_s'])} s), lost: {row['lost']}; "
        f"{what_holds(row['invariants'])}"
    )


def table(cells: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> str:
    """The matrix, as Markdown.

    Args:
        cells: what is known of each.
        missing: why a cell has nothing.
    """
    lines = ["| | fault | noticed, s | back, s | of which its start, s | done again | when, and what else | |", "|---" * 8 + "|"]
    for name, cell in CELLS.items():
        head = f"| {name} | {cell.who}: {cell.fault} |"
        if name not in cells:
            lines.append(f"{head} | | | | | {missing[name] if name in missing else 'not played'} |")
            continue
        row = cells[name]
        times = " | ".join(seconds(row[key]) for key in ("detected_s", "recovered_s", "cold_start_s"))
        note, lost = short(row["note"].replace("|", "/")), short(row["lost"])
        lines.append(f"{head} {times} | {lost} | {note} | {what_holds(row['invariants'])} |")
    return "\n".join(lines)


PROCESS_S, NODE_S, BEYOND_S, GOODPUT = 3.0, 4.0, 3.0, 0.8
NODE_CELLS = ("F6", "F12", "F22")
HUNG = ("F17", "F18", "F19", "F20")
"""Noticed after ``resources.deadline_s``, which the run sets."""


def slower_than_wanted(cells: Mapping[str, Mapping[str, Any]], goodput: Sequence[Mapping[str, Any]]) -> list[str]:
    """Times beyond what is aimed at; a busy machine is slow, so that nothing fails by it.

    Args:
        cells: what is known of each.
        goodput: rows of it.
    """
    found = []
    for name, row in cells.items():
        limit = NODE_S if name in NODE_CELLS else PROCESS_S
        has_start = "faults/start_seconds" in row["figures"]
        if has_start and name not in HUNG and row["detected_s"] is not None and row["detected_s"] > limit:
            found.append(f"{name} was noticed after {row['detected_s']:.1f} s, {limit:g} s are wanted")
        if has_start and row["beyond_s"] is not None and row["beyond_s"] > BEYOND_S:
            found.append(f"{name} was back {row['beyond_s']:.1f} s after its start, {BEYOND_S:g} s are wanted")
    return found + [f"goodput {row['goodput']:.0%}, {GOODPUT:.0%} is wanted" for row in goodput if row["goodput"] < GOODPUT]


def broken(record: Record, asked: Sequence[str]) -> list[str]:
    """What does not hold, or was asked for and not played.

    Args:
        record: of what was found.
        asked: cells.
    """
    cells = record.cells()
    found = [f"{name}: {what_holds(row['invariants'])}" for name, row in cells.items() if not row["held"]]
    found += [f"{name} was not played" for name in asked if name not in cells and not CELLS[name].why_not]
    found += [f"seed {row['seed']}: {what_holds(row['invariants'])}" for row in record.seeds() if not row["held"]]
    found += [f"{row['unreadable']} writes of a {row['what']} unreadable" for row in record.rows("writes") if row["unreadable"]]
    return found
