"""The table: from the rows alone, and what has no row reads "not run"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.ratios.catalogue import CASES, Case

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
NOT_RUN = "not run"
HEADS = ("", "what", "against", "ours", "theirs", "ratio", "CPU ratio", "limit", "of the limit", "aim", "met")
BEGIN, END = "<!-- made by `python -m benchmarks --page` -->", "<!-- end of what it made -->"


def amount(value: float, unit: str) -> str:
    """With its unit; seconds in what reads best."""
    if unit != "s":
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    for size, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1e6:.3g} µs"


def aim_of(case: Case) -> str:
    """In words."""
    words = []
    if case.aim is not None:
        words.append(f"≤ {case.aim:.3g}{' × limit' if case.of_limit else ''}")
    if case.aim_seconds is not None:
        words.append(f"≤ {amount(case.aim_seconds, 's')}")
    return ", ".join(words) or "-"


def met(case: Case, row: Mapping[str, Any]) -> str:
    """Whether an aim is met by the median: yes, or by how many times it is missed."""
    over = []
    if case.aim is not None:
        over.append((row["from_limit"] if case.of_limit else row["ratio"]) / case.aim)
    if case.aim_seconds is not None:
        over.append(row["ours"] / case.aim_seconds)
    if not over:
        return "-"
    return "yes" if max(over) <= 1 else f"**no**, {max(over):.2f} ×"


def cells(case: Case, rows: Rows) -> tuple[str, ...]:
    """One line."""
    head = (case.id, case.name, case.against)
    if case.place not in rows:
        return (*head, NOT_RUN, *[""] * 5, aim_of(case), "")
    row = rows[case.place]
    shares = [f"{row[key]:.3g}" if row[key] is not None else "-" for key in ("cpu_ratio", "limit", "from_limit")]
    return (
        *head,
        amount(row["ours"], case.unit),
        amount(row["alternative"], case.unit),
        f"{row['ratio']:.3g} ({row['ratio_min']:.3g} to {row['ratio_max']:.3g})",
        *shares,
        aim_of(case),
        met(case, row),
    )


def table(rows: Rows, cases: Sequence[Case] = CASES) -> str:
    """As Markdown.

    Args:
        rows: by id and case.
        cases: lines.
    """
    return markdown(HEADS, [cells(case, rows) for case in cases])


def measured(rows: Rows) -> str:
    """The table of the cases that have a row and an aim, and how many there are of those with an aim."""
    aimed = [case for case in CASES if aim_of(case) != "-"]
    there = [case for case in aimed if case.place in rows]
    return (
        f"{table(rows, there)}\n\n{len(there)} of {len(aimed)} cases with an aim are measured; all stand in docs/benchmarks.md."
    )


def shown(rows: Rows, cases: Sequence[Case] = CASES) -> str:
    """For a terminal: what, ours, the alternative, the ratio, the limit, how far from it."""
    lines = [HEADS, *(cells(case, rows) for case in cases)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def details(rows: Rows) -> str:
    """What stands behind each row: equality, repetitions, load, the limit in words."""
    lines: list[tuple[str, ...]] = []
    for case in CASES:
        if case.place in rows:
            row = rows[case.place]
            load = f"{min(row['load']):.1f} to {max(row['load']):.1f}" if row["load"] else "-"
            figures = "; ".join(f"{name} {value}" for name, value in row["figures"].items()) or "-"
            lines.append(
                (case.id, case.name, case.limit, row["equality"], str(row["repetitions"]), str(row["threads"]), load, figures)
            )
    heads = ("", "case", "the limit is", "outputs", "pairs", "threads", "load meanwhile", "besides")
    return markdown(heads, lines) if lines else NOT_RUN


def hardware(rows: Rows) -> str:
    """Machines and days of the rows, in words."""
    found = {
        f"{row['hardware']['cpu']}, {row['hardware']['cores']} cores, {row['when'][:10]}": None
        for place in (case.place for case in CASES)
        if place in rows
        for row in [rows[place]]
    }
    return "; ".join(found) or NOT_RUN


def put(text: str, made: str, number: int = 0, begin: str = BEGIN) -> str:
    """A page with what stands between its markers replaced.

    Args:
        text: the page.
        made: what is to stand there.
        number: which of the page's pairs of markers.
        begin: the first marker of these pairs.

    Raises:
        ValueError: if the page has no such markers.
    """
    parts = text.split(begin)
    if len(parts) < number + 2 or END not in parts[number + 1]:
        raise ValueError(f"the page has no pair of markers number {number}: expected {begin} and {END}")
    parts[number + 1] = f"\n{made.strip()}\n{END}{parts[number + 1].split(END, 1)[1]}"
    return begin.join(parts)
