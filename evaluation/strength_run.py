"""The directory of a strength run, read: numbers of all pairs, texts of a few.

Letters: N pairs, M members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.groups import FloatArray, IndexArray
from evaluation.json_node import json_file, read_text
from evaluation.studies import StudyRow, read_studies
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

MEAN, STD = "mean preference difference", "std preference difference"
SECOND_LABEL = "GPT4 label"
"""The public data set's column: 1 = the second labeller prefers chosen, 0 = rejected, -1 = no answer."""
GOLD = ("gold_chosen", "gold_rejected")
AT_HAND = "has `python -m cluster strength` finished there?"

BoolArray = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True)
class StrengthCard:
    """What card.json says of a strength run that the page shows.

    Args:
        num_pairs: scored.
        num_members: M.
        members: their kind.
        folds: 1 = in-sample.
        seconds: ``train``, of all fits together, and ``score``.
        auroc_wrong: of -mu against the truth, on the training pairs; None where the truth is not known, or every label or none
            is wrong.
    """

    num_pairs: int
    num_members: int
    members: str
    folds: int
    seconds: Mapping[str, float]
    auroc_wrong: float | None


@dataclass(frozen=True, eq=False)
class StrengthRun:
    """All that the report needs of a strength run.

    Args:
        directory: of the run.
        card: its card.
        config: as YAML.
        versions: of what made it.
        mean: [N] float64, strength.
        std: [N] float64, population standard deviation over the members; None where there is one member.
        train: [N] bool, a pair of the training split.
        label: [N] int8, what a second labeller says: 1, 0, or -1 = nothing; None where nobody was asked.
        truth: [N] int8, the same from the sandbox's gold rewards, -1 at a tie; None where the truth is not known.
        studies: rows by study.
    """

    directory: Path
    card: StrengthCard
    config: str
    versions: Mapping[str, str]
    mean: FloatArray
    std: FloatArray | None
    train: BoolArray
    label: np.ndarray[tuple[int], np.dtype[np.int8]] | None
    truth: np.ndarray[tuple[int], np.dtype[np.int8]] | None
    studies: Mapping[str, tuple[StudyRow, ...]]

    @cached_property
    def of_training(self) -> IndexArray:
        """Indices of the training pairs; of all pairs where none is."""
        return np.flatnonzero(self.train) if self.train.any() else np.arange(len(self.mean))

    @property
    def wrong(self) -> BoolArray | None:
        """[N] bool, the truth contradicts the label; None where it is not known."""
        return None if self.truth is None else self.truth == 0


@dataclass(frozen=True)
class Example:
    """A pair to be read.

    Args:
        id: of the pair.
        prompt: as text.
        chosen: as text.
        rejected: as text.
        mean: its strength.
        std: over the members; None with one.
        verdict: what the truth or the second labeller says of the label, or "".
        agrees: whether it agrees; None where it says nothing.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    mean: float
    std: float | None
    verdict: str
    agrees: bool | None

    @property
    def strength(self) -> str:
        """Mean and standard deviation as the page writes them."""
        return f"μ {self.mean:+z.2f}" + ("" if self.std is None else f" · σ {self.std:.2f}")


def read_strength_run(directory: Path) -> StrengthRun:
    """Read the directory of a strength run.

    Source: the strength directory's layout (card.json, config.yaml, versions.json, strengths/*.parquet, studies/*.jsonl).

    Args:
        directory: of the run.

    Returns:
        The run; of the texts nothing is read yet, see ``examples``.

    Raises:
        UserError: if a file is missing or malformed, or a strength is not finite.

    Padding contract: there is none.
    """
    card = json_file(directory / "card.json")
    source = _open(directory)
    have = set(source.schema.names)
    missing = [name for name in ("id", "split", "prompt", "chosen", "rejected", MEAN, STD) if name not in have]
    if missing:
        raise UserError(f"{directory / 'strengths'} lacks the columns {', '.join(missing)}; it has {', '.join(sorted(have))}")
    wanted = ["id", "split", MEAN, STD, *(name for name in (SECOND_LABEL, *GOLD) if name in have)]
    table = source.to_table(columns=wanted)
    if not table.num_rows:
        raise UserError(f"{directory / 'strengths'} holds no pair; {AT_HAND}")
    num_members, train = int(card.number("num_members")), card.child("splits").child("train").finite()
    return StrengthRun(
        directory=directory,
        card=StrengthCard(
            num_pairs=int(card.number("num_pairs")),
            num_members=num_members,
            members=card.string("members"),
            folds=int(card.number("folds")),
            seconds={phase: card.child("seconds").number(phase) for phase in ("train", "score")},
            auroc_wrong=train["auroc_wrong"] if "auroc_wrong" in train else None,
        ),
        config=read_text(directory / "config.yaml"),
        versions=json_file(directory / "versions.json").strings(),
        mean=_numbers(table, MEAN),
        std=_numbers(table, STD) if num_members > 1 else None,
        train=np.array([split == "train" for split in table["split"].to_pylist()], dtype=np.bool_),
        label=_labels(table),
        truth=_truth(table),
        studies=read_studies(directory / "studies"),
    )


def examples(run: StrengthRun, indices: Sequence[int]) -> tuple[Example, ...]:
    """The pairs at some indices, with their texts.

    Source: strengths/*.parquet.

    Args:
        run: as read.
        indices: of the pairs.

    Returns:
        One example each, in that order.

    Raises:
        UserError: if a text is not one.

    Padding contract: there is none.
    """
    columns = ["id", "prompt", "chosen", "rejected"]
    rows = _open(run.directory).take(list(map(int, indices)), columns=columns).to_pylist()
    odd = [(row["id"], name) for row in rows for name in columns[1:] if not isinstance(row[name], str)]
    if odd:
        raise UserError(f"{run.directory / 'strengths'}: {odd[0][1]} of pair {odd[0][0]} is no text; make the strengths again")
    return tuple(
        Example(
            id=str(row["id"]),
            prompt=row["prompt"],
            chosen=row["chosen"],
            rejected=row["rejected"],
            mean=float(run.mean[index]),
            std=None if run.std is None else float(run.std[index]),
            verdict=_verdict(run, int(index))[0],
            agrees=_verdict(run, int(index))[1],
        )
        for row, index in zip(rows, indices, strict=True)
    )


def _verdict(run: StrengthRun, index: int) -> tuple[str, bool | None]:
    for who, says in (("truth", run.truth), ("second labeller", run.label)):
        if says is not None and says[index] >= 0:
            return (f"{who}: label right", True) if says[index] == 1 else (f"{who}: label wrong", False)
    return "", None


def _open(directory: Path) -> "ds.Dataset":
    import pyarrow as pa
    import pyarrow.dataset as ds

    paths = sorted((directory / "strengths").glob("*.parquet"))
    if not paths:
        raise UserError(f"{directory / 'strengths'} holds no Parquet file; {AT_HAND}")
    try:
        return ds.dataset([str(path) for path in paths], format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{directory / 'strengths'} cannot be read as Parquet: {error}") from error


def _numbers(table: "pa.Table", name: str) -> FloatArray:
    import pyarrow as pa

    try:
        values = np.array(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowException as error:
        raise UserError(f"column {name!r} of the strengths must hold numbers, got {table[name].type}") from error
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        first = table["id"][int(bad[0])].as_py()
        raise UserError(
            f"{name!r} is missing or not finite for {len(bad)} of {len(values)} pairs, the first is {first}; "
            "make the strengths again"
        )
    return values


def _labels(table: "pa.Table") -> np.ndarray[tuple[int], np.dtype[np.int8]] | None:
    if SECOND_LABEL not in table.schema.names:
        return None
    values = [-1 if value is None else value for value in table[SECOND_LABEL].to_pylist()]
    odd = sorted({value for value in values if value not in (-1, 0, 1)})
    if odd:
        raise UserError(f"column {SECOND_LABEL!r} of the strengths must hold 1, 0 or -1, got {odd[:3]}")
    labels = np.array(values, dtype=np.int8)
    return labels if (labels >= 0).any() else None


def _truth(table: "pa.Table") -> np.ndarray[tuple[int], np.dtype[np.int8]] | None:
    if any(name not in table.schema.names for name in GOLD):
        return None
    chosen, rejected = (_numbers(table, name) for name in GOLD)
    return np.where(chosen == rejected, -1, chosen > rejected).astype(np.int8)
