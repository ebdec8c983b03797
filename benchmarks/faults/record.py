"""What was found, as JSON lines that the next start goes on after, and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.cells import CELLS
from benchmarks.faults.invariants import Held
from cluster.run_directory import versions

SHOWN = 160
"""Characters of an invariant that does not hold, in the table."""
RESULTS = Path(__file__).parents[1] / "results" / "faults.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Of one fault.

    Args:
        cell: of the matrix.
        detected_s: from the fault to the first line that names it; None where nothing is to be said.
        recovered_s: from that line until the role worked again; None where the run ended.
        cold_start_s: what starting the role takes without a fault, in the same run; None where that means nothing.
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
        """Recovery beyond the cold start."""
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
        self.path, self.label = path, label
        path.parent.mkdir(exist_ok=True)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """What was written under this label.

        Args:
            kind: ``cell``, ``monkey``, ``writes`` or ``goodput``.
        """
        stored = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [row for row in stored if row["id"] == kind and row["label"] == self.label]

    def outcome(self, outcome: Outcome, held: Held) -> None:
        """One fault and what held after it; a later row of a cell counts instead of an earlier one."""
        cell = CELLS[outcome.cell]
        row = {**asdict(outcome), "who": cell.who, "fault": cell.fault, "beyond_s": outcome.beyond_s, "invariants": held.words()}
        self.write("cell", row | {"held": held.all})
        print(line(row | {"held": held.all}), flush=True)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """One row, with what it was measured on."""
        whole = {"id": kind, "label": self.label, **_rounded(row), "machine": machine(), "versions": versions()}
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def seconds(value: float | None) -> str:
    """For the table."""
    return "-" if value is None else f"{value:.1f}"


def line(row: Mapping[str, Any]) -> str:
    """One fault on a line, for whoever watches."""
    wrong = [f"{name}: {words}" for name, words in row["invariants"].items() if words != "held"]
    return (
        f"{row['cell']:>4} {row['who']}, {row['fault']}: detected {seconds(row['detected_s'])} s, recovered "
        f"{seconds(row['recovered_s'])} s (cold start {seconds(row['cold_start_s'])} s), lost: {row['lost']}; "
        f"{'all invariants held' if not wrong else 'BROKEN ' + ' | '.join(wrong)}"
    )


def table(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> str:
    """The matrix, as Markdown.

    Args:
        rows: of cells; the last of each counts.
        missing: why a cell has none.
    """
    last = {row["cell"]: row for row in rows}
    lines = ["| | done to | fault | detected, s | recovered, s | beyond the cold start, s | lost | I1 to I6 |", "|---" * 8 + "|"]
    for name, cell in CELLS.items():
        head = f"| {name} | {cell.who} | {cell.fault} |"
        if name not in last:
            lines.append(f"{head} | | | {missing[name] if name in missing else 'not run yet'} | |")
            continue
        row = last[name]
        wrong = [f"{key}: {words[:SHOWN]}" for key, words in row["invariants"].items() if words != "held"]
        times = " | ".join(seconds(row[key]) for key in ("detected_s", "recovered_s", "beyond_s"))
        lines.append(f"{head} {times} | {row['lost']} | {'held' if not wrong else '; '.join(wrong)} |")
    return "\n".join(lines)
