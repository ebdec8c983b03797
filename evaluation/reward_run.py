"""The directory of a reward run, read: how it was fitted, how it does on each validation set, and what it scored.

Letters: N pairs, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluation.groups import FloatArray
from evaluation.json_node import JsonNode, json_file, json_lines, read_text
from tokens.errors import UserError

SIDES = ("chosen", "rejected")
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True)
class FitStep:
    """One optimizer step; ``values`` by name, as in metrics.jsonl."""

    step: int
    loss: float
    accuracy: float | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Measurement:
    """What was measured on the validation pairs after some step; by name, as in metrics.jsonl."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class SetScores:
    """Scores of one validation set by the finished model.

    Args:
        chosen: [N] float64.
        rejected: [N] float64.
    """

    chosen: FloatArray
    rejected: FloatArray

    @property
    def difference(self) -> FloatArray:
        """[N] chosen minus rejected."""
        return self.chosen - self.rejected


@dataclass(frozen=True, eq=False)
class Features:
    """Pooled hidden states of validation responses before the head.

    Args:
        vectors: [2 N, F] float64.
        chosen: [2 N] bool, of the chosen response.
    """

    vectors: Matrix
    chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True)
class ShiftedScore:
    """A response sampled from a shifted policy, and what a vanilla model and one fitted with MetaRM say of it."""

    prompt_id: str
    sample: int
    score_vanilla: float
    score_metarm: float
    kept_back: bool
    """Whether its prompt is one that the ascent never saw; False in a file from before that was kept."""


@dataclass(frozen=True, eq=False)
class RewardRun:
    """All that the report needs of a reward run.

    Args:
        directory: of the run.
        config: as YAML.
        versions: of what made it.
        epoch_ends: the steps at which an epoch ended, the end of the fit left out.
        fit: numbers of the whole fit by name, as the card has them; those that are null left out.
        ece: expected calibration error of the finished model by validation set.
        steps: of the fit.
        measurements: on the validation pairs, by rising step.
        scores: by validation set; empty where there were no validation pairs.
        features: None where there were no validation pairs.
        shifted: empty without shifted samples.
    """

    directory: Path
    config: str
    versions: Mapping[str, str]
    epoch_ends: tuple[float, ...]
    fit: Mapping[str, float]
    ece: Mapping[str, float]
    steps: tuple[FitStep, ...]
    measurements: tuple[Measurement, ...]
    scores: Mapping[str, SetScores]
    features: Features | None
    shifted: tuple[ShiftedScore, ...]

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the validation sets that were measured, in order."""
        names = [key.split("/") for row in self.measurements for key in row.values]
        return tuple(dict.fromkeys("/".join(parts[1:-1]) for parts in names if parts[0] == "validation" and len(parts) >= 3))

    @property
    def best_step(self) -> int | None:
        """The step whose weights early stopping kept; None where the last ones were."""
        return int(self.fit["best_step"]) if "best_step" in self.fit else None

    def over_training(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one number of the measurements; those that lack it are left out."""
        return [(row.step, row.values[name]) for row in self.measurements if name in row.values]

    def over_steps(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one number of the optimizer steps; those that lack it are left out."""
        return [(row.step, row.values[name]) for row in self.steps if name in row.values]


def read_reward_run(directory: Path) -> RewardRun:
    """Read the directory of a reward run.

    Source: the reward directory's layout (card.json, config.yaml, versions.json, metrics.jsonl, and where they were written
    scores.parquet, features.parquet, shifted.parquet).

    Args:
        directory: of the run.

    Returns:
        The run.

    Raises:
        UserError: if a file that every run has is missing, or one is malformed.

    Padding contract: there is none.
    """
    config = read_text(directory / "config.yaml")
    card = json_file(directory / "card.json")
    steps: dict[int, FitStep] = {}
    measured: dict[int, Measurement] = {}
    for node in json_lines(directory / "metrics.jsonl"):
        step, values = int(node.number("step")), node.finite()
        if node.string("phase") == "reward" and "reward/loss" in values:
            accuracy = values["reward/accuracy"] if "reward/accuracy" in values else None
            steps[step] = FitStep(step, values["reward/loss"], accuracy, values)
        elif node.string("phase") == "validation":
            measured[step] = Measurement(step, values)
    epoch_ends, fit = _epoch_ends(config, card, len(steps)), card.child("fit").finite()
    if "best_step" in fit and fit["best_step"] not in measured:
        raise UserError(
            f"card.json says that the weights of step {fit['best_step']:g} were kept, and metrics.jsonl has no measurement of "
            "that step: has the directory been copied whole?"
        )
    ece, scores = _of_sets(card.child("validation").numbers(), "ece"), _scores(directory / "scores.parquet")
    if set(scores) - set(ece):
        raise UserError(
            f"scores.parquet has the sets {', '.join(scores)}, and card.json measured {', '.join(ece) or 'none'}: "
            "has the directory been copied whole?"
        )
    return RewardRun(
        directory=directory,
        config=config,
        versions=json_file(directory / "versions.json").strings(),
        epoch_ends=epoch_ends,
        fit=fit,
        ece=ece,
        steps=tuple(steps[step] for step in sorted(steps)),
        measurements=tuple(measured[step] for step in sorted(measured)),
        scores=scores,
        features=_features(directory / "features.parquet"),
        shifted=_shifted(directory / "shifted.parquet"),
    )


def _of_sets(numbers: Mapping[str, float], quantity: str) -> Mapping[str, float]:
    """One quantity by validation set, out of ``validation/SET/quantity``."""
    named = {tuple(key.split("/")): value for key, value in numbers.items()}
    return {"/".join(key[1:-1]): value for key, value in named.items() if key[0] == "validation" and key[-1] == quantity}


def _epoch_ends(config: str, card: JsonNode, num_steps: int) -> tuple[float, ...]:
    """Steps at which an epoch ended; ``planned_steps`` are those of all epochs, early stopping takes fewer."""
    try:
        tree: object = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise UserError(f"config.yaml is not YAML: {error}") from error
    epochs = int(JsonNode(tree, "config.yaml").child("reward").number("epochs"))
    ends = (card.number("planned_steps") * i / epochs for i in range(1, epochs))
    return tuple(end for end in ends if end < num_steps)


def _scores(path: Path) -> Mapping[str, SetScores]:
    by_set: dict[str, list[tuple[float, ...]]] = {}
    for row in _rows(path, ("id", "set", *SIDES)):
        by_set.setdefault(str(row["set"]), []).append(tuple(_finite(path, row, name) for name in SIDES))
    return {name: SetScores(*np.array(pairs, dtype=np.float64).T) for name, pairs in by_set.items()}


def _features(path: Path) -> Features | None:
    rows = _rows(path, ("id", "side", "vector"))
    if not rows:
        return None
    sizes = sorted({len(row["vector"]) for row in rows})
    odd = sorted({str(row["side"]) for row in rows} - set(SIDES))
    if odd or len(sizes) > 1 or not sizes[0]:
        raise UserError(f"{path}: needs sides chosen and rejected and vectors of one length, got sides {odd} and lengths {sizes}")
    vectors = np.array([row["vector"] for row in rows], dtype=np.float64)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: {int((~np.isfinite(vectors)).any(1).sum())} of its vectors are not finite")
    return Features(vectors, np.array([row["side"] == "chosen" for row in rows], dtype=np.bool_))


def _shifted(path: Path) -> tuple[ShiftedScore, ...]:
    return tuple(
        ShiftedScore(
            str(row["prompt_id"]),
            int(row["sample"]),
            _finite(path, row, "score_vanilla"),
            _finite(path, row, "score_metarm"),
            "kept_back" in row and bool(row["kept_back"]),
        )
        for row in _rows(path, ("prompt_id", "sample", "score_vanilla", "score_metarm"), ("kept_back",))
    )


def _rows(path: Path, columns: Sequence[str], newer: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a Parquet file, with the newer columns where it has them; none where there is no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return []
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
            asked = [*columns, *(name for name in newer if name in file.schema_arrow.names)]
            rows: list[dict[str, Any]] = file.read(columns=asked).to_pylist()
            return rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _finite(path: Path, row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{path}: {name} of {row} must be a finite number")
    return float(value)
