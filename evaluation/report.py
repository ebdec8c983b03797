"""report.html: one file that shows what a run did. It reads the run directory and nothing else.

The page may load nothing and run no script but the one that searches its samples, which its content security policy names by its
digest; and every text is escaped: what a model wrote is not to be trusted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.curves import spread
from evaluation.figures import all_figures
from evaluation.fit_words import META_WORDS, meta_tiles
from evaluation.page import Tiles, render_page, write_page
from evaluation.records import EvaluationRow
from evaluation.run import Run, read_run
from evaluation.sample_browser import sample_browser
from evaluation.summary import findings, headline, texts_of
from evaluation.table import rounds_table

MAX_RESPONSES = 4
"""Responses of rounds shown beside SFT's."""


@dataclass(frozen=True)
class Response:
    """A response as the page shows it."""

    who: str
    text: str
    gold: str
    proxy: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with SFT's response and the rounds'; ``why`` it is shown, for nothing here is picked by taste."""

    why: str
    prompt: str
    domain: str
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Choice:
    """One choice recorded in the ledger, and its value by round."""

    key: str
    values: tuple[tuple[str, str], ...]

    @property
    def same(self) -> bool:
        """True where every round chose the same."""
        return len({value for _, value in self.values}) == 1


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the files of a run directory, whole or not at all.

    Source: the run directory's layout (ledger.json, metrics.jsonl, config.yaml, versions.json, the rounds' Parquet files).

    Args:
        run_dir: RUN.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if it is no run directory, no round is committed, or a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    return write_page(run_dir / "report.html", render(read_run(run_dir)))


def render(run: Run) -> str:
    """The page's HTML.

    Source: templates/report.html.j2.

    Args:
        run: as read.

    Returns:
        A whole document.

    Padding contract: there is none.
    """
    table = rounds_table(run.ledger)
    return render_page(
        "report.html.j2",
        name=run.directory.resolve().name,
        headline=headline(run),
        findings=findings(run),
        tiles=_tiles(run),
        table=table,
        best="" if run.ledger.rounds[-1].best_round is None else f"round {run.ledger.rounds[-1].best_round}",
        texts=list(zip([row[0] for row in table.rows], texts_of(run), strict=True)),
        meta=meta_tiles(run.ledger.rounds[-1].reward.numbers),
        meta_words=META_WORDS,
        meta_round=run.ledger.rounds[-1].index,
        figures=all_figures(run),
        samples=pick_samples(run),
        browser=sample_browser(run),
        config=run.config,
        versions=run.versions,
        choices=_choices(run),
        dropped=[(f"round {r.index}", r.dropped) for r in run.ledger.rounds if r.dropped not in ("{}", "null", "[]")],
        committed_at=run.ledger.rounds[-1].committed_at,
    )


def pick_samples(run: Run) -> tuple[Sample, ...]:
    """Prompts worth reading: the two where the last round gained most over SFT, two in the middle, the two where it lost most.

    gain = judge(last round) - judge(SFT), the judge being the gold reward where there is one, else the held-out members' mean
    where there are some, else the ensemble's.

    Source: none; a rule, so that nobody chooses the pretty ones.

    Args:
        run: as read.

    Returns:
        Six samples, or as many as there are prompts.

    Padding contract: there is none.
    """
    judge: Callable[[EvaluationRow], float] = lambda row: next(  # noqa: E731
        value for value in (row.gold, row.held_out, row.ensemble_mean) if value is not None
    )
    shown = spread(tuple(zip(run.ledger.rounds, run.round_rows, strict=True)), MAX_RESPONSES)
    columns: list[tuple[str, dict[str, EvaluationRow]]] = [("SFT", {row.prompt_id: row for row in run.start_rows})]
    columns += [(f"round {round_.index}", {row.prompt_id: row for row in rows}) for round_, rows in shown]
    sft, last = columns[0][1], columns[-1][1]
    common = [key for key in sft if all(key in rows for _, rows in columns)]
    order = sorted(common, key=lambda key: (judge(sft[key]) - judge(last[key]), key))  # most gained first
    middle = max(0, len(order) // 2 - 1)
    wanted = [
        *((key, "most gained") for key in order[:2]),
        *((key, "typical") for key in order[middle : middle + 2]),
        *((key, "most lost") for key in order[-2:]),
    ]
    picked = dict(reversed(wanted))
    return tuple(
        Sample(
            why=f"{why}: {judge(last[key]) - judge(sft[key]):+z.2f}",
            prompt=sft[key].prompt,
            domain=sft[key].domain,
            responses=tuple(_response(who, rows[key]) for who, rows in columns),
        )
        for key, why in reversed(picked.items())
    )


def _response(who: str, row: EvaluationRow) -> Response:
    gold = "" if row.gold is None else f"{row.gold:z.2f}"
    return Response(who, row.response, gold, f"{row.proxy:z.2f}", row.num_tokens, row.finished)


def _tiles(run: Run) -> Tiles:
    """(label, value, hint): first and last of the numbers that matter most."""
    first, last, fit = run.ledger.start, run.ledger.rounds[-1].evaluation, run.ledger.rounds[-1].reward
    total = sum(run.ledger.start_seconds.values()) + sum(sum(r.seconds.values()) for r in run.ledger.rounds)
    tiles = [] if last.margin is None else [("win − lose", f"{last.margin:+z.2f}", "against SFT, last round")]
    if first.gold is not None and last.gold is not None:
        tiles.append(("gold reward", f"{last.gold:z.2f}", f"SFT {first.gold:z.2f}"))
    tiles.append(("proxy score", f"{last.proxy:z.2f}", f"SFT {first.proxy:z.2f}"))
    tiles.append(("KL from SFT", f"{last.kl:z.1f}", "nats per response"))
    tiles.append(("perplexity", f"{last.perplexity:z.1f}", f"SFT {first.perplexity:z.1f}"))
    if fit.validation_accuracy is not None:
        tiles.append(("reward model", f"{fit.validation_accuracy:.0%}", "validation accuracy"))
    tiles.append(("time", f"{total / 60:z.1f} min" if total >= 90 else f"{total:.0f} s", "all rounds and the start"))
    return tiles


def _choices(run: Run) -> tuple[Choice, ...]:
    keys = dict.fromkeys(key for round_ in run.ledger.rounds for key in round_.choices)
    return tuple(
        Choice(key, tuple((f"round {r.index}", r.choices[key]) for r in run.ledger.rounds if key in r.choices)) for key in keys
    )
