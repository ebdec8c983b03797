"""The table of rounds: one set of columns for the terminal and for the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evaluation.run import Evaluation, Ledger, Round, parse_ledger

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"


@dataclass(frozen=True)
class RoundsTable:
    """The table as text: a header and a hint per column, then SFT and one row per round."""

    headers: tuple[str, ...]
    hints: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Column:
    header: str
    hint: str
    of_evaluation: Callable[[Evaluation], str] | None = None
    of_round: Callable[[Round], str] | None = None


def rounds_table(ledger: Ledger) -> RoundsTable:
    """Lay the ledger out as a table; a column that has nothing in any row is left out.

    Source: ledger.json.

    Args:
        ledger: as read.

    Returns:
        Texts; the first row is SFT's.

    Padding contract: there is none.
    """
    return _without_empty(_rows_of(ledger))


def runs_table(ledgers: Mapping[str, Ledger]) -> RoundsTable:
    """The tables of several runs below each other, with the same columns and the run's name before each row.

    Source: ledger.json.

    Args:
        ledgers: by the run's name.

    Returns:
        Texts; the rows of a run follow each other, SFT's first.

    Padding contract: there is none.
    """
    table = _without_empty([row for ledger in ledgers.values() for row in _rows_of(ledger)])
    names = [name for name, ledger in ledgers.items() for _ in range(1 + len(ledger.rounds))]
    rows = tuple((name, *row) for name, row in zip(names, table.rows, strict=True))
    return RoundsTable(("run", *table.headers), ("As its directory is called", *table.hints), rows)


def _rows_of(ledger: Ledger) -> list[list[str]]:
    """A cell for every column there is: SFT's row, then the rounds'."""
    columns: list[list[str]] = []
    apart = ledger.sft_ensemble_std
    sft = ledger.start if apart is None else replace(ledger.start, ensemble_std=apart)
    for c in _COLUMNS:
        if c.of_evaluation is not None:
            columns.append([c.of_evaluation(sft), *(c.of_evaluation(r.evaluation) for r in ledger.rounds)])
        elif c.of_round is not None:
            start = _seconds(sum(ledger.start_seconds.values())) if c.header == "seconds" else NOTHING
            columns.append([start, *map(c.of_round, ledger.rounds)])
        else:
            columns.append(["SFT", *(f"round {r.index}" for r in ledger.rounds)])
    return [list(row) for row in zip(*columns, strict=True)]


def _without_empty(rows: Sequence[Sequence[str]]) -> RoundsTable:
    """The table without the columns that have nothing in any row."""
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] != NOTHING for row in rows)]
    headers, hints = tuple(_COLUMNS[i].header for i in kept), tuple(_COLUMNS[i].hint for i in kept)
    return RoundsTable(headers, hints, tuple(tuple(row[i] for i in kept) for row in rows))


def round_table(ledger: dict[str, object]) -> "Table":
    """The table of rounds for the terminal.

    Source: ledger.json.

    Args:
        ledger: its parsed JSON, with at least one committed round.

    Returns:
        A rich table; print it with rich.

    Raises:
        UserError: if the ledger lacks a key or has no round.

    Padding contract: there is none.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    content = rounds_table(parse_ledger(ledger))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(content.headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=i == 0)
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:z.{digits}f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _margin(e: Evaluation) -> str:
    if e.margin is None or e.margin_low is None or e.margin_high is None:
        return NOTHING
    return f"{e.margin:+z.2f} [{e.margin_low:+z.2f}, {e.margin_high:+z.2f}]"


def _outcome(e: Evaluation) -> str:
    return NOTHING if e.win is None else f"{_share(e.win)} / {_share(e.tie)} / {_share(e.lose)}"


def _bad_steps(r: Round) -> str:
    found = [f"{count:.0f} {action.replace('_', ' ')}" for action, count in r.bad_steps.items() if count]
    return ", ".join(found) or NOTHING


def _fresh(r: Round) -> str:
    if "labelled" not in r.fresh:
        return NOTHING
    return f"{r.fresh['labelled']:.0f}" + (f", RM {r.fresh['accuracy']:.0%}" if "accuracy" in r.fresh else "")


_COLUMNS = (
    _Column("", "SFT is the start"),
    _Column("win / tie / lose", "Share of held-out prompts, against SFT", of_round=lambda r: _outcome(r.evaluation)),
    _Column("win − lose", "With its 95% interval (paired bootstrap over prompts)", of_round=lambda r: _margin(r.evaluation)),
    _Column("gold", "Mean gold reward: the sandbox's truth", lambda e: _number(e.gold)),
    _Column("proxy", "Mean score of the round's own reward model, in SFT standard deviations", lambda e: _number(e.proxy)),
    _Column(
        "ensemble",
        "Mean of the members' scores, ± the mean of their standard deviation; SFT's is that of the members of round 0",
        lambda e: f"{e.ensemble_mean:z.2f} ± {e.ensemble_std:z.2f}",
    ),
    _Column(
        "held-out",
        "Mean score of reward models that nothing is trained by, ± the mean of their standard deviation",
        lambda e: NOTHING if e.held_out is None or e.held_out_std is None else f"{e.held_out:z.2f} ± {e.held_out_std:z.2f}",
    ),
    _Column("KL", "From SFT, nats per response", lambda e: _number(e.kl)),
    _Column("ppl", "Perplexity of the responses under SFT", lambda e: _number(e.perplexity)),
    _Column("tokens", "Mean length of a response", lambda e: _number(e.length, 1)),
    _Column("ended", "Share of responses that end by themselves", lambda e: _share(e.finished)),
    _Column(
        "RM acc.", "Accuracy of the reward model on validation pairs", of_round=lambda r: _share(r.reward.validation_accuracy)
    ),
    _Column(
        "fresh",
        "Pairs of the round's own samples that were labelled, and how many of them the reward model of the round before ranks so",
        of_round=_fresh,
    ),
    _Column(
        "bad steps",
        "PPO steps whose numbers went wrong: left out, undone, or sampled again by engines that got the weights again",
        of_round=_bad_steps,
    ),
    _Column("seconds", "All phases of the round", of_round=lambda r: _seconds(sum(r.seconds.values()))),
)
