"""What a case found, as a row of ``benchmarks/results/gpu.jsonl``; of rows of one case the last counts.

Rows without an id are of the form that this file had before the cases had numbers; they are read as they are.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.gpu.device import Device, Measured
from cluster.run_directory import now

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.jsonl"
NAMED = ("torch", "transformers", "ray", "vllm")
Place = tuple[str, str]
"""Id and case."""
Stored = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        repetitions: turns that count, of each way.
        small: a size at which nothing can be learned, for tests.
    """

    repetitions: int = 3
    small: bool = False


@dataclass(frozen=True)
class Scene:
    """What every case is given.

    Args:
        device: where it runs.
        settings: of the measurement.
    """

    device: Device
    settings: Settings


@dataclass(frozen=True)
class Row:
    """One case, measured.

    Args:
        id: G1 to G10.
        case: of ``benchmarks.gpu.catalogue``.
        outcome: whether the device's memory was enough.
        seconds: median of ours; None where there is none.
        spread: (slowest - fastest) / median.
        ratio: median of the paired ratios ours / the other way's; None where nothing is compared.
        ratio_min: least of them.
        ratio_max: greatest of them.
        limit: the least ratio that could be.
        flops: useful FLOPs of one turn.
        peak_gib: of the device's memory, at most within a turn.
        figures: whatever else was measured.
    """

    id: str
    case: str
    outcome: Literal["measured", "out of memory"] = "measured"
    seconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    limit: float | None = None
    flops: float | None = None
    peak_gib: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Id and case."""
        return self.id, self.case


def row(
    place: Place,
    found: Measured,
    way: str,
    other: str | None = None,
    limit: float | None = None,
    flops: float | None = None,
    **figures: Any,
) -> Row:
    """A row of one way's turns.

    Args:
        place: id and case.
        found: turns of all ways.
        way: ours.
        other: what it is compared with; None = nothing.
        limit: the least ratio that could be.
        flops: useful FLOPs of one turn.
        figures: whatever else was measured.
    """
    took = [each.wall for each in found.turns.took[way]]
    middle = found.turns.seconds(way)
    ratio = found.turns.ratio(way, other) if other is not None else None
    return Row(
        *place,
        seconds=middle,
        spread=(max(took) - min(took)) / middle,
        ratio=None if ratio is None else ratio.middle,
        ratio_min=None if ratio is None else ratio.least,
        ratio_max=None if ratio is None else ratio.most,
        limit=limit,
        flops=flops,
        peak_gib=found.peaks[way],
        figures=figures if other is None else {**figures, **_beside(found, other)},
    )


def floor_row(place: Place, found: Measured, way: str, floor: float, **figures: Any) -> Row:
    """A row of one way's turns against what a copy at the device's own speed, or a pass at its roof, would take: limit 1.

    Args:
        place: id and case.
        found: turns of all ways.
        way: ours.
        floor: seconds, by the roofs that were measured in this process.
        figures: whatever else was measured.
    """
    plain = row(place, found, way, floor_seconds=floor, **figures)
    walls = [each.wall for each in found.turns.took[way]]
    return replace(
        plain,
        ratio=found.turns.seconds(way) / floor,
        ratio_min=min(walls) / floor,
        ratio_max=max(walls) / floor,
        limit=1.0,
    )


def _beside(found: Measured, other: str) -> dict[str, Any]:
    beside: dict[str, Any] = {"their_seconds": found.turns.seconds(other)}
    peak = found.peaks[other]
    return beside if peak is None else beside | {"their_peak_gib": peak}


def stored(found: Row, scene: Scene, took: float) -> dict[str, Any]:
    """A row as it lies in the file: with MFU by both roofs, and what it was measured on.

    Args:
        found: the row.
        scene: of the measurement.
        took: seconds from the beginning of the part that the row is of.
    """
    device = scene.device
    rate = None if found.flops is None or found.seconds is None else found.flops / found.seconds
    mfu = None if rate is None or device.peak_flops is None else rate / device.peak_flops
    line = asdict(found) | {
        "mfu": mfu,
        "mfu_of_gemm": None if rate is None else rate / device.roofs.flops,
        "took": took,
        "small": scene.settings.small,
        "repetitions": scene.settings.repetitions,
        "when": now(),
        "device": device.name,
        "peak_flops": device.peak_flops,
        "roofs": {name: _short(value) for name, value in asdict(device.roofs).items()},
        "versions": versions(),
    }
    return {key: _short(value) for key, value in line.items()} | {"figures": {k: _short(v) for k, v in found.figures.items()}}


def versions() -> dict[str, str | None]:
    """Of what the numbers rest on; None for what is not installed: half of the cases need neither Ray nor vLLM."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def append(line: Stored, path: Path) -> None:
    """Add a row to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path = RESULTS) -> tuple[dict[Place, Stored], list[Stored]]:
    """The last row of each case by id and case, and the rows of the earlier form in the order in which they were measured."""
    lines: list[Stored] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["id"], line["case"]): line for line in lines if "id" in line}, [line for line in lines if "id" not in line]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
