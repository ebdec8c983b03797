"""A sheet of pairs for a reader who sees neither label nor strength, and what the reader's answers say.

The sheet holds the twenty lowest, the twenty nearest to zero and the twenty highest, in a random order, the two responses too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

SHOWN = 20
"""Pairs of each kind."""


def drawn_for_a_reader(mu: Sequence[float]) -> list[tuple[str, int, bool]]:
    """Kind, row and whether the chosen response is shown second, in a random order that is always the same."""
    order = np.argsort(mu, kind="stable")
    zero = np.argsort(np.abs(mu), kind="stable")
    kinds = {"lowest": order[:SHOWN], "nearest zero": zero[:SHOWN], "highest": order[-SHOWN:]}
    chance = random.Random(0)
    shown = [(kind, int(row), chance.random() < 0.5) for kind, rows in kinds.items() for row in rows]
    chance.shuffle(shown)
    return shown


def sheet(texts: list[dict[str, Any]], shown: list[tuple[str, int, bool]]) -> str:
    """Prompt and two responses of each pair, neither label nor strength."""
    parts = []
    for number, (_, row, swapped) in enumerate(shown, 1):
        first, second = ("rejected", "chosen") if swapped else ("chosen", "rejected")
        pair = texts[row]
        parts.append(f"## {number}\n{pair['prompt'].strip()}\n\n### A\n{pair[first].strip()}\n\n### B\n{pair[second].strip()}\n")
    return "\n".join(parts)


def compared(answers: str, shown: list[tuple[str, int, bool]], mu: Sequence[float]) -> str:
    """How often a reader agreed with the labels, by kind, with Wilson's 95% interval; and every answer."""
    from scipy.stats import binomtest

    said = dict(line.split() for line in answers.splitlines() if line.strip())
    expected = {str(number) for number in range(1, len(shown) + 1)}
    if said.keys() != expected or not set(said.values()) <= {"A", "B", "-"}:
        raise SystemExit(f"answers must hold a line NUMBER and A, B or - for each of {len(shown)} pairs; got {len(said)} lines")
    agree: dict[str, list[bool]] = {}
    undecided: dict[str, int] = {}
    lines = []
    for number, (kind, row, swapped) in enumerate(shown, 1):
        answer = said[str(number)]
        if answer == "-":
            undecided[kind] = undecided.get(kind, 0) + 1
        else:
            agree.setdefault(kind, []).append((answer == "A") != swapped)
        verdict = "undecided" if answer == "-" else "with the label" if agree[kind][-1] else "against the label"
        lines.append(f"{number}: {kind}, row {row}, mu {mu[row]:+.2f}: {verdict}")
    table_lines = ["| strength | with the label | against | undecided | share with the label |", "|---|---|---|---|---|"]
    for kind in ("lowest", "nearest zero", "highest"):
        with_label, decided = sum(agree[kind]), len(agree[kind])
        interval = binomtest(with_label, decided).proportion_ci(method="wilson")
        share = f"{with_label / decided:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
        table_lines.append(f"| {kind} | {with_label} | {decided - with_label} | {undecided.get(kind, 0)} | {share} |")
    return "\n".join([*table_lines, "", *lines])
