"""What a comparison found, as a row of ``benchmarks/results/bench.jsonl``; of rows of one case the last counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.record import machine
from benchmarks.ratios.frame import Turns
from cluster.run_directory import now
from cluster.versions import versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench.jsonl"


@dataclass(frozen=True)
class Row:
    """One case, measured.

    Args:
        id: C1 to C11.
        case: of ``benchmarks.ratios.catalogue``.
        ours: median seconds of ours.
        alternative: of what it is compared with.
        ratio: median of the paired ratios ours / alternative; below 1 ours is faster.
        ratio_min: least of them.
        ratio_max: greatest of them.
        cpu_ratio: the same of CPU seconds; None where they cannot be told.
        repetitions: pairs.
        limit: the least ratio that could be; None where nothing says.
        equality: how far the outputs agree, in words with a number.
        threads: that either side could use.
        load: the machine's load average after each pair.
        figures: whatever else was measured.
    """

    id: str
    case: str
    ours: float
    alternative: float
    ratio: float
    ratio_min: float
    ratio_max: float
    cpu_ratio: float | None
    repetitions: int
    limit: float | None
    equality: str
    threads: int
    load: tuple[float, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def from_limit(self) -> float | None:
        """How many times the limit it took."""
        return None if self.limit is None else self.ratio / self.limit


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        repetitions: pairs of each case.
        threads: of torch, on either side.
        small: a size at which nothing can be learned, for tests.
    """

    repetitions: int
    threads: int
    small: bool = False


def row(
    place: tuple[str, str],
    turns: Turns,
    names: tuple[str, str],
    settings: Settings,
    limit: float | None,
    equality: str,
    **figures: Any,
) -> Row:
    """A row of the turns of two ways.

    Args:
        place: id and case.
        turns: of all ways.
        names: ours, and the way that it is compared with.
        settings: of the measurement.
        limit: the least ratio that could be.
        equality: of the outputs.
        figures: whatever else was measured.
    """
    spread = turns.ratio(*names)
    return Row(
        *place,
        ours=turns.seconds(names[0]),
        alternative=turns.seconds(names[1]),
        ratio=spread.middle,
        ratio_min=spread.least,
        ratio_max=spread.most,
        cpu_ratio=spread.cpu,
        repetitions=settings.repetitions,
        limit=limit,
        equality=equality,
        threads=settings.threads,
        load=turns.load,
        figures=figures,
    )


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Append rows, with what they were measured on."""
    path.parent.mkdir(exist_ok=True)
    on = {"when": now(), "versions": versions(), "hardware": {key: value for key, value in machine().items() if key != "load"}}
    with path.open("a") as file:
        file.writelines(json.dumps(_rounded(asdict(each)) | {"from_limit": _short(each.from_limit)} | on) + "\n" for each in rows)


def read(path: Path = RESULTS) -> dict[tuple[str, str], dict[str, Any]]:
    """The last row of each case, by id and case."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(stored["id"], stored["case"]): stored for stored in map(json.loads, lines)}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _short(value) for key, value in row.items()}
