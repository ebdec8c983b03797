"""What is done to pairs whose preference strength says that their label is wrong, as columns beside the pairs.

Nothing is lost: ``undo`` gives back the pairs as they were.

Letters: N pairs.
Source: Secrets of RLHF II (2401.06080), section 2.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from preferences.config import DenoiseConfig
from preferences.labels import write_batches
from preferences.sets import Format, PreferenceSet
from preferences.strength import Strengths, match, refuse_constant
from preferences.swap import as_table, swap_sides
from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

KEEP, DONE, STRENGTH, STRENGTH_STD, MARGIN, SMOOTHING = "keep", "denoise", "strength", "strength_std", "margin", "smoothing"
COLUMNS = (KEEP, DONE, STRENGTH, STRENGTH_STD, MARGIN, SMOOTHING)
PAIRS_FILE = "training_pairs.parquet"
SOURCE, FORMAT = b"rondo.source", b"rondo.format"
"""Keys of the file's own metadata."""
BATCH = 8192
FLIP, SOFT, DROP = "flip", "soft", "drop"


def denoise(pairs: PreferenceSet, strengths: Strengths, config: DenoiseConfig) -> PreferenceSet:
    """Flip, smooth, give margins to, or leave out training pairs by their strength mu.

    The loss that follows is -[(1 - a) log sigma(d - m) + a log sigma(-(d - m))], d = r(chosen) - r(rejected), with
      flip: chosen and rejected exchanged, and mu negated, where the pair is noisy;
      soft: a = ``smoothing`` where it is noisy;
      margin: m = mu for every pair, after any negation, scaled and clipped as the config says;
      drop: no loss where it is noisy.
    Source: Secrets of RLHF II, section 2.4.1 (flip), equation 5 (soft), equation 6 with the margin inside the sigmoid.

    Args:
        pairs: the training pairs; validation pairs are not denoised.
        strengths: of these pairs, in any order; may hold others too.
        config: what to do.

    Returns:
        The pairs with the columns keep, denoise (what was done: "", "flip", "margin", "flip+margin" ...), strength,
        strength_std (null for one member), margin and smoothing. With method none, the pairs as they are.

    Raises:
        UserError: if strengths are missing or tell nothing, the pairs have one of these columns already, or a domain would be
            left without pairs.
    """
    if config.method == "none":
        return pairs
    refuse_columns(pairs)
    found = match(strengths, pairs)
    refuse_constant(found)
    noisy = noisy_pairs(found.mean, found.ids, config)
    nothing = np.zeros(len(pairs), dtype=bool)
    action, _, also = config.method.partition("+")
    flipped, smoothed, dropped = (noisy if action == name else nothing for name in (FLIP, SOFT, DROP))
    margins = "margin" in (action, also)
    if dropped.any():
        _refuse_empty(pairs, dropped)
    strength = np.where(flipped, -found.mean, found.mean)
    margin = _margins(strength, found.mean, config) if margins else np.zeros(len(pairs))
    done = ["+".join(filter(None, (action if own and action != "margin" else "", "margin" if margins else ""))) for own in noisy]
    return pairs.with_table(
        _with_columns(
            swap_sides(as_table(pairs.rows), flipped),
            ~dropped,
            done,
            strength,
            found.std if found.num_members > 1 else None,
            margin,
            np.where(smoothed, config.smoothing, 0.0),
        )
    )


def noisy_pairs(strength: np.ndarray, ids: Sequence[str], config: DenoiseConfig) -> np.ndarray:
    """Which pairs count as noisy.

    Args:
        strength: [N] mu.
        ids: of the pairs; among equal strengths the smaller id counts as the weaker, so that the order of rows plays no part.
        config: ``noisy`` and ``fraction``; auto is negative for soft and lowest for all others.

    Returns:
        [N] bool. With lowest: round(fraction * N) pairs, at least one; with negative: those with mu < 0.
    """
    rule: Literal["auto", "lowest", "negative"] = config.noisy
    if rule == "auto":
        rule = "negative" if config.method.startswith(SOFT) else "lowest"
    if rule == "negative":
        return np.asarray(strength < 0)
    count = max(1, round(config.fraction * len(strength)))
    limit = np.partition(strength, count - 1)[count - 1]
    noisy = np.asarray(strength < limit)
    ties = sorted(np.flatnonzero(strength == limit).tolist(), key=lambda row: ids[row])
    noisy[ties[: count - int(noisy.sum())]] = True
    return noisy


def _margins(strength: np.ndarray, mean: np.ndarray, config: DenoiseConfig) -> np.ndarray:
    """[N] mu, divided by the population std of the (unflipped) strengths where that is asked for, and clipped."""
    scaled = strength / mean.std() if config.margin_scale == "std" else strength
    return scaled if config.margin_clip is None else np.clip(scaled, -config.margin_clip, config.margin_clip)


def _with_columns(
    table: pa.Table,
    keep: np.ndarray,
    done: list[str],
    strength: np.ndarray,
    std: np.ndarray | None,
    margin: np.ndarray,
    smoothing: np.ndarray,
) -> pa.Table:
    import pyarrow as pa

    arrays = (
        pa.array(keep),
        pa.array(done, pa.string()),
        pa.array(strength),
        pa.nulls(len(done), pa.float64()) if std is None else pa.array(std),
        pa.array(margin),
        pa.array(smoothing),
    )
    for name, array in zip(COLUMNS, arrays, strict=True):
        table = table.append_column(name, array)
    return table


def refuse_columns(pairs: PreferenceSet) -> None:
    """Stop at pairs that bring a column of ours: their own would be lost.

    Raises:
        UserError: naming the columns.
    """
    there = [name for name in COLUMNS if name in pairs.rows.column_names]
    if there:
        raise UserError(
            f"{pairs.source}: the pairs have the column(s) {', '.join(there)}, which data.denoise writes. If they were denoised "
            "before, give the pairs as they were; if the columns are your own, rename them or set data.denoise.method to none"
        )


def _refuse_empty(pairs: PreferenceSet, dropped: np.ndarray) -> None:
    domains = as_table(pairs.rows.select_columns(["domain"]))["domain"].to_pylist()
    total, left = Counter(domains), Counter(domain for domain, gone in zip(domains, dropped, strict=True) if not gone)
    empty = sorted(domain for domain in total if domain not in left)
    if empty:
        what = ", ".join(f"{domain!r} ({total[domain]})" if domain else f"all {total[domain]} pairs" for domain in empty)
        raise UserError(
            f"{pairs.source}: data.denoise.method drop would leave no pair of the domain(s) {what}. Lower data.denoise.fraction, "
            "set data.denoise.noisy to lowest, or use flip or soft instead"
        )


def undo(pairs: PreferenceSet) -> PreferenceSet:
    """The pairs as they were before ``denoise``: flipped ones turned back, the added columns gone.

    Raises:
        UserError: if only some of the columns are there.
    """
    missing = [name for name in COLUMNS if name not in pairs.rows.column_names]
    if len(missing) == len(COLUMNS):
        return pairs
    if missing:
        raise UserError(f"{pairs.source}: cannot undo the denoising: no column {', no column '.join(map(repr, missing))}")
    table = as_table(pairs.rows)
    flipped = np.array([FLIP in done.split("+") for done in table[DONE].to_pylist()], dtype=bool)
    return pairs.with_table(swap_sides(table.drop_columns(list(COLUMNS)), flipped))


def write_pairs(pairs: PreferenceSet, directory: Path) -> Path | None:
    """Write training pairs with what was done to them as ``PAIRS_FILE``: row group by row group, beside its place, renamed.

    Args:
        pairs: as they are trained on.
        directory: of the file; must exist.

    Returns:
        The file; None (and nothing is written) for pairs that have none of our columns.
    """
    if not any(name in pairs.rows.column_names for name in COLUMNS):
        return None
    rows, path = pairs.rows.with_format("arrow"), directory / PAIRS_FILE
    metadata = {SOURCE: pairs.source.encode(), FORMAT: pairs.format.encode()}
    batches = (rows[start : start + BATCH].replace_schema_metadata(metadata) for start in range(0, len(rows), BATCH))
    write_batches(batches, path)
    return path


def read_pairs(path: str | Path) -> PreferenceSet:
    """Read what ``write_pairs`` wrote.

    Args:
        path: of the file, or of the directory that holds it.

    Raises:
        UserError: if there is no such file, or it is another one.
    """
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    file = Path(path).expanduser()
    file = file / PAIRS_FILE if file.is_dir() else file
    try:
        table = parquet.read_table(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; `reward` and `run` write it where data.denoise.method is set") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file, or cut off ({error})") from error
    metadata = table.schema.metadata or {}
    if SOURCE not in metadata or FORMAT not in metadata or metadata[FORMAT].decode() not in get_args(Format):
        raise UserError(
            f"{file}: not a file of training pairs that `reward` or `run` wrote; columns: {', '.join(table.column_names)}"
        )
    rows = Dataset(table.replace_schema_metadata(None))
    return PreferenceSet(rows, metadata[SOURCE].decode(), cast(Format, metadata[FORMAT].decode()))


def count_actions(pairs: PreferenceSet) -> dict[str, int]:
    """How many pairs there are, how many are kept, and to how many each thing was done; for the ledger and the console."""
    counts = {"pairs": len(pairs), "kept": len(pairs), FLIP: 0, SOFT: 0, "margin": 0, DROP: 0}
    if DONE not in pairs.rows.column_names:
        return counts
    columns = as_table(pairs.rows.select_columns([DONE, KEEP])).to_pydict()
    for done, number in Counter(columns[DONE]).items():
        for action in filter(None, done.split("+")):
            counts[action] += number
    return counts | {"kept": sum(columns[KEEP])}
