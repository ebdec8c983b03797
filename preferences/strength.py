"""Preference strength as files: what every member of an ensemble scored the two responses of every pair.

The columns have the names of the public strength data set of HH-RLHF (see docs/preferences.md), so that either can be read.

Letters: N pairs, M members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preferences.sources import TEXT_COLUMNS, shorten
from preferences.strength_files import read_columns, text_key, write_part
from preferences.swap import as_table
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from preferences.sets import PreferenceSet


_AGAIN = "Run `strength` with more reward.epochs or a higher reward.lr, under another name or after removing the directory"


@dataclass(frozen=True)
class Strengths:
    """Scores of N pairs by M members.

    Args:
        ids: of the pairs.
        chosen: [N, M] float64, r_m(prompt, chosen).
        rejected: [N, M] float64, r_m(prompt, rejected).
        splits: "train" or "validation", for each pair.
        source: where they came from, for messages.
        fingerprint: of the pairs that were scored, None where the files do not say.
        texts: 16 bytes for each pair, equal where prompt, chosen and rejected are; empty where a row's texts cannot be used.

    Raises:
        UserError: if a score is not finite.
    """

    ids: tuple[str, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    splits: tuple[str, ...]
    source: str
    fingerprint: str | None
    texts: tuple[bytes, ...]

    def __post_init__(self) -> None:
        shape = (len(self.ids), self.num_members)
        assert self.chosen.shape == self.rejected.shape == shape and self.num_members >= 1
        assert len(self.splits) == len(self.texts) == len(self.ids)
        refuse_not_finite(self.source, self.ids, self.chosen, self.rejected)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_members(self) -> int:
        """M."""
        return int(self.chosen.shape[1])

    @property
    def margin(self) -> np.ndarray:
        """[N, M] d_im = r_m(prompt, chosen) - r_m(prompt, rejected)."""
        return self.chosen - self.rejected

    @property
    def mean(self) -> np.ndarray:
        """[N] preference strength mu_i = mean over m of d_im. Source: Secrets of RLHF II (2401.06080), equation 4."""
        return np.asarray(self.margin.mean(1))

    @property
    def std(self) -> np.ndarray:
        """[N] sigma_i, population standard deviation (divided by M) over m of d_im. Source: as ``mean``.

        Raises:
            UserError: if there is one member.
        """
        if self.num_members == 1:
            raise UserError(
                f"{self.source}: the standard deviation of the strengths is asked for, and there is one member. "
                "Run `strength` with strength.num_members of 2 or more, under another name or after removing the directory"
            )
        return np.asarray(self.margin.std(1))

    def select(self, index: Sequence[int]) -> Strengths:
        """The pairs at ``index``, in that order; the fingerprint is that of another set then, and unknown."""
        rows = np.asarray(index, dtype=np.int64)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index),
            chosen=self.chosen[rows],
            rejected=self.rejected[rows],
            splits=tuple(self.splits[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
            fingerprint=None,
        )


def refuse_not_finite(source: str, ids: Sequence[str], chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Stop at scores that are NaN or infinite.

    Raises:
        UserError: naming the first one's member and pair, and all members concerned.
    """
    wrong = ~(np.isfinite(chosen) & np.isfinite(rejected))
    if not wrong.any():
        return
    row, member = (int(i) for i in np.argwhere(wrong)[0])
    side, value = ("chosen", chosen) if not np.isfinite(chosen[row, member]) else ("rejected", rejected)
    members = ", ".join(str(m) for m in np.flatnonzero(wrong.any(0)))
    raise UserError(
        f"{source}: {int(wrong.any(1).sum())} of {len(ids)} pairs have a score that is not finite (members {members}); first: "
        f"member {member} gave {value[row, member]} for the {side} response of pair {ids[row]!r}. "
        "Measure the strengths again with a lower reward.lr or in float32, under another name or after removing the directory"
    )


def refuse_constant(strengths: Strengths) -> None:
    """Stop where the members tell no pair from another.

    Raises:
        UserError: if a member's scores are all equal, or all pairs have the same strength.
    """
    for member in range(strengths.num_members):
        both = np.concatenate([strengths.chosen[:, member], strengths.rejected[:, member]])
        if np.ptp(both) == 0:
            raise UserError(
                f"{strengths.source}: member {member} gives every response the score {both[0]:g}: it has learnt nothing. {_AGAIN}"
            )
    if np.ptp(strengths.mean) == 0:
        raise UserError(
            f"{strengths.source}: all {len(strengths)} pairs have the strength {strengths.mean[0]:g}, so none is weaker than "
            f"another. {_AGAIN}"
        )


def write_strengths(
    directory: Path,
    part: int,
    rows: pa.Table,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    split: str,
    source: str,
    fingerprint: str | None,
) -> Path:
    """Write one part file, ``part-00000.parquet`` for part 0: beside its place, synced, renamed.

    Args:
        directory: of the part files; must exist.
        part: number of the part; one that is there already is replaced.
        rows: id, prompt, chosen, rejected, domain and whatever else the pairs have.
        chosen: [n, M] scores of the chosen responses of these rows.
        rejected: [n, M] likewise.
        split: "train" or "validation".
        source: name of the data set, kept in the file.
        fingerprint: of the data set, kept in the file.

    Returns:
        The file.

    Raises:
        UserError: if a score is not finite; nothing is written then.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    assert chosen.shape == rejected.shape and chosen.shape[0] == rows.num_rows
    refuse_not_finite(source, rows["id"].to_pylist(), chosen, rejected)
    return write_part(directory, part, rows, chosen, rejected, split, source, fingerprint)


def written_parts(directory: Path) -> set[int]:
    """Numbers of the part files that are there, each of them whole."""
    return {int(path.stem.removeprefix("part-")) for path in directory.glob("part-*.parquet")}


def read_strengths(path: str | Path, allow_hub: bool = False) -> Strengths:
    """Read strengths; files are read batch by batch, and only their numbers, ids and a key of their texts are kept.

    Args:
        path: a strength run's directory, a Parquet or JSON Lines file, a directory of them (all splits are read) or of
            ``save_to_disk``, or (if allowed) a hub name, of which the split train is read.
        allow_hub: whether a name that is no local path may be fetched.

    Raises:
        UserError: if nothing is there, the columns are not those of strengths, members differ in number, or a score is not
            finite.
    """
    columns = read_columns(str(path), allow_hub)
    return Strengths(columns.ids, columns.chosen, columns.rejected, columns.splits, str(path), columns.fingerprint, columns.texts)


def match(strengths: Strengths, pairs: PreferenceSet) -> Strengths:
    """The strengths of ``pairs``, in their order.

    Args:
        strengths: as read.
        pairs: all of them must have one.

    Returns:
        One row per pair: found by id where the fingerprints agree, by the exact texts otherwise; with the pairs' fingerprint.

    Raises:
        UserError: if a pair has none, with both fingerprints.
    """
    columns: dict[str, list[str]] = as_table(pairs.rows.select_columns(["id", *TEXT_COLUMNS])).to_pydict()
    keys: list[Any] = columns["id"]
    have: tuple[Any, ...] = strengths.ids
    if strengths.fingerprint != pairs.fingerprint:
        keys = [text_key(*texts) for texts in zip(*(columns[name] for name in TEXT_COLUMNS), strict=True)]
        have = strengths.texts
    known = {key: row for row, key in reversed(list(enumerate(have)))}  # the first of equal ones
    missing = [row for row, key in enumerate(keys) if key not in known]
    if missing:
        raise _another_data_set(strengths, pairs, columns, missing)
    found = strengths.select([known[key] for key in keys])
    return replace(found, ids=tuple(columns["id"]), fingerprint=pairs.fingerprint)


def _another_data_set(
    strengths: Strengths, pairs: PreferenceSet, columns: dict[str, list[str]], missing: Sequence[int]
) -> UserError:
    prompts, chosen, rejected = (columns[name] for name in TEXT_COLUMNS)
    known = set(strengths.texts)
    swapped = sum(text_key(prompts[row], rejected[row], chosen[row]) in known for row in missing)
    hint = f" {swapped} of them are there with chosen and rejected exchanged: undo the flipping first." if swapped else ""
    ours, theirs = (shorten(f, 16) if f else "unknown" for f in (pairs.fingerprint, strengths.fingerprint))
    return UserError(
        f"{len(missing)} of {len(pairs)} pairs of {pairs.source} have no strength in {strengths.source}; first: pair "
        f"{columns['id'][missing[0]]!r}, {shorten(prompts[missing[0]])}.{hint} The strengths were made for data with the "
        f"fingerprint {theirs}, these pairs have {ours}. Run `python -m cluster strength CONFIG` on this data, or name its "
        "strengths in data.denoise.strength"
    )
