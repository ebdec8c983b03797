"""Studies of a strength run: reward models trained on parts of the data, measured as they train.

Letters: S seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.groups import Estimate, over_seeds
from evaluation.json_node import json_lines

STUDIES = ("deciles", "lowest", "top", "margin", "methods", "growing", "bands")
"""What there is to study, in the order of the paper's figures: 4, 5, 6, 7, 8, 21 and 22, 23 to 25."""
TRAINING = "train"
"""Name of the set that holds what the fit itself saw since the last measurement; every other set is a validation set."""
WEAKEST, STRONGEST = "from the weakest", "from the strongest"
"""Panels of ``growing``."""
FLIPPED_BAND, AMBIGUOUS_BAND, TREATED_BAND = "lowest 10%, flipped, alone", "30-40% alone", "all pairs, lowest 10% treated"
"""Panels of ``bands``."""


@dataclass(frozen=True)
class StudyRow:
    """One measurement of one fit.

    Args:
        study: the study.
        arm: what the fit is trained on; a part before ": " names the panel that it is drawn in.
        seed: number of the seed, the same for all arms.
        step: optimizer steps taken.
        num_pairs: different pairs that the arm has.
        set: the pairs that were measured on, or ``TRAINING``.
        accuracy: share ranked as labelled.
        loss: nats per pair; of ``TRAINING`` the loss that is descended.
        ece: expected calibration error; None for ``TRAINING``.
    """

    study: str
    arm: str
    seed: int
    step: int
    num_pairs: int
    set: str
    accuracy: float
    loss: float
    ece: float | None

    @property
    def panel(self) -> str:
        """What stands before ": " in the arm's name, or ""."""
        return self.arm.rpartition(": ")[0]

    @property
    def line(self) -> str:
        """What stands after it: the arm's name within its panel."""
        return self.arm.rpartition(": ")[2]


@dataclass(frozen=True)
class Curve:
    """One quantity of one arm over training: a mean over seeds with its 95% interval at each step."""

    arm: str
    line: str
    num_pairs: int
    num_seeds: int
    steps: tuple[int, ...]
    points: tuple[Estimate, ...]


Rows = Sequence[StudyRow]


def read_studies(directory: Path) -> Mapping[str, tuple[StudyRow, ...]]:
    """Read every study of a strength run.

    Source: the strength directory's layout.

    Args:
        directory: of the .jsonl files; may be absent.

    Returns:
        Rows by study, in the files' order.

    Raises:
        UserError: if a row lacks a key or has one of another type.

    Padding contract: there is none.
    """
    studies: dict[str, list[StudyRow]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for node in json_lines(path):
            row = StudyRow(
                study=node.string("study"),
                arm=node.string("arm"),
                seed=int(node.number("seed")),
                step=int(node.number("step")),
                num_pairs=int(node.number("num_pairs")),
                set=node.string("set"),
                accuracy=node.number("accuracy"),
                loss=node.number("loss"),
                ece=node.optional("ece"),
            )
            studies.setdefault(row.study, []).append(row)
    return {study: tuple(rows) for study, rows in studies.items()}


def sets_of(rows: Iterable[StudyRow]) -> tuple[str, ...]:
    """The validation sets of a study, in the order in which they first appear.

    Source: none needed.

    Args:
        rows: of the study.

    Returns:
        Their names, ``TRAINING`` left out.

    Padding contract: there is none.
    """
    return tuple(dict.fromkeys(row.set for row in rows if row.set != TRAINING))


def curves(rows: Iterable[StudyRow], quantity: str, measured_on: str) -> tuple[Curve, ...]:
    """A quantity over training, a curve per arm.

    Source: ``over_seeds`` at each step; a step that some seeds lack is averaged over those that have it.

    Args:
        rows: of one study.
        quantity: "accuracy", "loss" or "ece".
        measured_on: the set.

    Returns:
        Curves in the order in which the arms first appear; arms without a value are left out.

    Raises:
        ValueError: if the quantity is another.

    Padding contract: there is none.
    """
    if quantity not in ("accuracy", "loss", "ece"):
        raise ValueError(f"a study measures accuracy, loss and ece, not {quantity}")
    by_arm: dict[str, list[StudyRow]] = {}
    for row in rows:
        if row.set == measured_on and _value(row, quantity) is not None:
            by_arm.setdefault(row.arm, []).append(row)
    return tuple(_curve(of_arm, quantity) for of_arm in by_arm.values())


def last_and_best(rows: Iterable[StudyRow], measured_on: str) -> tuple[tuple[str, Estimate, Estimate], ...]:
    """Accuracy at the end of training, and the best on the way, per arm.

    last = accuracy at a seed's last step;  best = its largest accuracy at any step; each averaged over the seeds

    Source: the late decline of Secrets of RLHF Part II, Figures 8 and 22, is best - last.

    Args:
        rows: of one study.
        measured_on: the set.

    Returns:
        (line, last, best) per arm, in the order in which the arms first appear.

    Padding contract: there is none.
    """
    by_arm: dict[str, dict[int, list[StudyRow]]] = {}
    for row in rows:
        if row.set == measured_on:
            by_arm.setdefault(row.arm, {}).setdefault(row.seed, []).append(row)
    return tuple(
        (
            next(iter(by_seed.values()))[0].line,
            over_seeds([max(of_seed, key=lambda row: row.step).accuracy for of_seed in by_seed.values()]),
            over_seeds([max(row.accuracy for row in of_seed) for of_seed in by_seed.values()]),
        )
        for by_seed in by_arm.values()
    )


def _value(row: StudyRow, quantity: str) -> float | None:
    return {"accuracy": row.accuracy, "loss": row.loss, "ece": row.ece}[quantity]


def _curve(rows: Sequence[StudyRow], quantity: str) -> Curve:
    by_step: dict[int, list[float]] = {}
    for row in rows:
        value = _value(row, quantity)
        assert value is not None
        by_step.setdefault(row.step, []).append(value)
    steps = tuple(sorted(by_step))
    return Curve(
        arm=rows[0].arm,
        line=rows[0].line,
        num_pairs=rows[0].num_pairs,
        num_seeds=len({row.seed for row in rows}),
        steps=steps,
        points=tuple(over_seeds(by_step[step]) for step in steps),
    )
