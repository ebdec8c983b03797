"""A second labeller: asks a judge about every pair, in both orders, and writes what it says beside the pairs.

Source: Secrets of RLHF II (2401.06080), section 2.5.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.asking import ask_in_both_orders, open_answers
from cluster.console import Console
from cluster.endpoint_options import EndpointOptions
from cluster.judges import NONE, Judge
from cluster.load_config import load_config
from cluster.open_judge import open_judge
from cluster.storage import storage_root
from preferences.formats import BadRowError, Texts, detect_format, read_pair
from preferences.labels import LABEL, combine, label_tables, write_table
from preferences.sources import TEXT_COLUMNS, Source, open_source
from preferences.swap import as_table
from tokens.durable import write_file
from tokens.errors import UserError
from tokens.paths import check_path

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.config import RunConfig
    from preferences.sets import Format

FORWARD, BACKWARD = "label_forward", "label_backward"
"""Columns of the raw answers: with chosen shown first, and with rejected shown first."""
SANDBOX = "sandbox:"


@dataclass(frozen=True)
class Counts:
    """What a judge said of the pairs.

    Args:
        pairs: all of them.
        agree: the judge prefers chosen in both orders.
        disagree: it prefers rejected in both orders.
        changed: it changed its mind with the order.
        changed_to_first: among these, it preferred what it was shown first (the others: what it was shown second).
        no_answer: it did not answer one of the orders at least (a tie, or a reply that is neither A nor B).
        not_asked: it could not be asked in one of the orders at least (too long, refused by a content filter ...).
        unusable: the pair could not be read (empty, chosen equal to rejected ...), and was not asked about.
    """

    pairs: int
    agree: int
    disagree: int
    changed: int
    changed_to_first: int
    no_answer: int
    not_asked: int
    unusable: int

    @classmethod
    def of(cls, forward: np.ndarray, backward: np.ndarray, usable: np.ndarray, not_asked: np.ndarray) -> Counts:
        """Count: [N] raw answers in terms of the pair (1 = chosen), [N] whether the pair could be read, and [N] whether the judge
        could not be asked about it."""
        answered = (forward != NONE) & (backward != NONE)
        changed = answered & (forward != backward)
        return cls(
            pairs=len(forward),
            agree=int((answered & (forward == 1) & ~changed).sum()),
            disagree=int((answered & (forward == 0) & ~changed).sum()),
            changed=int(changed.sum()),
            changed_to_first=int((changed & (forward == 1)).sum()),
            no_answer=int((usable & ~answered & ~not_asked).sum()),
            not_asked=int(not_asked.sum()),
            unusable=int((~usable).sum()),
        )

    def lines(self) -> list[str]:
        """The counts for the console."""
        judged = self.agree + self.disagree
        share = f" ({self.agree / judged:.1%} of those with a label)" if judged else ""
        shown = f" ({self.changed_to_first} to the response shown first)" if self.changed else ""
        return [
            f"  agrees with the label      {self.agree:>8,}{share}",
            f"  disagrees                  {self.disagree:>8,}",
            f"  changed with the order     {self.changed:>8,}{shown}",
            f"  no answer                  {self.no_answer:>8,}",
            f"  could not be asked about   {self.not_asked:>8,}",
            f"  could not be read          {self.unusable:>8,}",
        ]


SPLITS = ("train", "validation", "validation_held_out")
"""Of the sandbox's pairs."""


def relabel(
    pairs: str,
    judge: str,
    out: Path | None,
    console: Console,
    *,
    split: str | None = None,
    limit: int | None = None,
    allow_hub: bool = False,
    options: EndpointOptions | None = None,
) -> Path:
    """Ask a judge about every pair in both orders; write its labels and the three validation sets.

    Args:
        pairs: a preference data set, or sandbox:CONFIG.yaml for the sandbox's pairs.
        judge: gold (of sandbox:CONFIG.yaml), gold:CONFIG.yaml, reward:DIR, or openai:BASE_URL#MODEL.
        out: Parquet file to write; None = beside the data, or for the sandbox in STORAGE/relabelled.
        console: where progress and counts are shown.
        split: of the data; None = train, and validation for the sandbox.
        limit: ask about the first so many pairs, and write only those.
        allow_hub: whether ``pairs`` may be fetched from the hub.
        options: how an endpoint is asked; None = the defaults.

    Returns:
        The file: the source's columns, ``label`` (1, 0, -1), ``label_forward`` and ``label_backward``. Beside it
        -original, -relabelled and -agreement.parquet, .json with the counts, and .answers.jsonl with every answer, from which a
        second call goes on.

    Raises:
        UserError: if pairs, judge or out are wrong, or the judge can take too few of the pairs or answers none.
        JudgeFailed: if the judge cannot go on; its answers so far are kept.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    kind, _, place = judge.partition(":")
    for name in (pairs.removeprefix(SANDBOX), *([place] if kind in ("gold", "reward") and place else [])):
        check_path(name)
    if kind not in ("gold", "reward", "openai"):
        raise UserError(
            f"no such judge: {judge!r}; expected gold, gold:CONFIG.yaml, reward:DIR or openai:BASE_URL#MODEL "
            "(for example openai:http://localhost:8000/v1#my-model)"
        )
    config = load_config(Path(pairs.removeprefix(SANDBOX))) if pairs.startswith(SANDBOX) else None
    if config and split not in (None, *SPLITS):
        raise UserError(f"the sandbox has the splits {', '.join(SPLITS[:2])} and {SPLITS[2]}, not {split!r}; set --split")
    target = _target(pairs, out, config, split)
    source = None if config else open_source(pairs, split or "train", allow_hub)
    format_ = detect_format(source) if source else "explicit"
    with ExitStack() as stack:
        asked = open_judge(judge, config, format_ == "conversational", options or EndpointOptions(), stack)
        if source is None:
            assert config is not None
            source = _sandbox_pairs(config, split, console)
        table = _numbered(as_table(source.rows).slice(0, limit))
        texts = _read_texts(source, table, format_, asked, console)
        answers = stack.enter_context(open_answers(target.with_suffix(".answers.jsonl")))
        forward, backward, not_asked = ask_in_both_orders(texts, asked, answers, console)
    if not_asked:
        first = "; ".join(f"pair {table['id'][row].as_py()!r}: {reason}" for row, reason in list(not_asked.items())[:3])
        console.say(
            f"{len(not_asked):,} of {len(texts):,} pairs were more than the judge can take and get no label; first: {first}"
        )
    usable = np.array([text is not None for text in texts])
    counts = _write(target, table, forward, backward, usable, np.isin(np.arange(len(texts)), list(not_asked)), judge, source.name)
    console.say(f"{judge} on {counts.pairs:,} pairs of {pairs}:")
    for line in counts.lines():
        console.say(line)
    console.say(f"{target} and its validation sets beside it")
    return target


def _target(pairs: str, out: Path | None, config: RunConfig | None, split: str | None) -> Path:
    source = Path(pairs)
    if out is None and config is not None:
        out = storage_root(config) / "relabelled" / f"{config.name}-{split or 'validation'}.parquet"
        out.parent.mkdir(exist_ok=True)
    elif out is None and source.is_file():
        out = source.with_name(f"{source.stem}.relabelled.parquet")
    elif out is None:
        raise UserError(f"say where to write with --out FILE.parquet: {pairs} is not a file, so there is no place beside it")
    if out.suffix != ".parquet":
        raise UserError(f"--out must end in .parquet, got {out}")
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no directory {out.parent.absolute()}")
    if source.exists() and out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is the data itself; name another file")
    return out


def _sandbox_pairs(config: RunConfig, split: str | None, console: Console) -> Source:
    """Pairs of one split of the config's world, which is built if it is not there yet."""
    from cluster.sandbox_source import WorldRecipe, as_set

    recipe = WorldRecipe(config.world, config.sft, storage_root(config) / "cache")
    with console.bar("build the sandbox world") as bar:
        files = recipe.build(lambda phase, done, total: bar.update(done, total, note=phase))
    wanted = split or "validation"
    return Source(f"the sandbox's {wanted} pairs", as_set(files.pairs(wanted)).rows)


def _numbered(table: pa.Table) -> pa.Table:
    """With ids, so that a pair keeps its own in every set made of these rows."""
    import pyarrow as pa

    if "id" in table.column_names:
        return table
    return table.add_column(0, "id", pa.array([str(row + 1) for row in range(table.num_rows)], pa.large_string()))


def _read_texts(source: Source, table: pa.Table, format_: Format, judge: Judge, console: Console) -> list[Texts | None]:
    """Every row as the texts that a judge is shown; None for a row that cannot be used."""
    if format_ == "conversational" and judge.template is None:
        raise UserError(
            f"{source.name}: the pairs are conversational, and the judge's tokenizer has no chat template to show them with. "
            "Turn the messages into text, or ask a judge that has one"
        )
    texts: list[Texts | None] = []
    reasons: list[str] = []
    for number, row in enumerate(table.select([name for name in TEXT_COLUMNS if name in table.column_names]).to_pylist()):
        try:
            texts.append(read_pair(row, format_, judge.template))
        except BadRowError as error:
            texts.append(None)
            reasons.append(f"{source.where(number)}: {error.reason}{': ' if error.detail else ''}{error.detail}")
    if len(reasons) == len(texts):
        raise UserError(f"{source.name}: no pair of {len(texts)} can be read; first: {reasons[0]}")
    if reasons:
        console.say(f"{len(reasons):,} of {len(texts):,} pairs cannot be read and get no label; first: {'; '.join(reasons[:3])}")
    return texts


def _write(
    target: Path,
    table: pa.Table,
    forward: np.ndarray,
    backward: np.ndarray,
    usable: np.ndarray,
    not_asked: np.ndarray,
    judge: str,
    source: str,
) -> Counts:
    import pyarrow as pa

    labels = [combine(int(a), int(b)) for a, b in zip(forward, backward, strict=True)]
    table = table.drop_columns([name for name in (LABEL, FORWARD, BACKWARD) if name in table.column_names])
    for name, column in ((LABEL, labels), (FORWARD, forward), (BACKWARD, backward)):
        table = table.append_column(name, pa.array(column, pa.int8()))
    counts = Counts.of(forward, backward, usable, not_asked)
    write_table(table, target)
    for name, rows in label_tables(table, source).items():
        write_table(rows, target.with_name(f"{target.stem}-{name}.parquet"))
    write_file(target.with_suffix(".json"), json.dumps({"judge": judge, "source": source, **vars(counts)}, indent=1) + "\n")
    return counts
