"""timeline.jsonl: who did what from when to when, as the driver saw it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.json_node import JsonNode, json_lines

DRIVER = "driver"
"""Who waits; every other name is a role's process."""


@dataclass(frozen=True)
class Span:
    """A stretch of time.

    Args:
        what: the phase, as in the ledger's seconds.
        who: the driver, which waits, or the process that works.
        round: of the run; None outside the rounds.
        step: PPO step that the work is for; None where it is for none.
        start: Unix time, s.
        end: Unix time, s.
    """

    what: str
    who: str
    round: int | None
    step: int | None
    start: float
    end: float


def read_timeline(path: Path) -> tuple[Span, ...]:
    """Read a timeline; of a round that was interrupted and played again, the last time alone.

    Source: the run directory's layout.

    Args:
        path: the file; it may be missing, as in a run of an earlier version.

    Returns:
        The spans in the order of their ends.

    Raises:
        UserError: if a line lacks a key or has a value of the wrong type.

    Padding contract: there is none.
    """
    spans = [_span(node) for node in json_lines(path)] if path.is_file() else []
    starts = 0  # a process that takes up the run writes spans outside the rounds first
    before: int | None = None
    played: list[tuple[int, Span]] = []
    for span in spans:
        starts += before is not None and span.round is None
        before = span.round
        played.append((starts, span))
    last = {span.round: number for number, span in played if span.round is not None}
    return tuple(span for number, span in played if span.round is None or number == last[span.round])


def window(spans: Sequence[Span], most: int) -> tuple[Span, ...]:
    """The spans of a few PPO steps in a row, from the middle of the last round that has steps.

    Source: none needed.

    Args:
        spans: of a run.
        most: steps.

    Returns:
        What began or ended between the driver's first and last wait for these steps; none where there was no step.

    Padding contract: there is none.
    """
    waits = [span for span in spans if span.who == DRIVER and span.round is not None and span.step is not None]
    if not waits:
        return ()
    last = max(span.round for span in waits if span.round is not None)
    waits = [span for span in waits if span.round == last]
    steps = sorted({span.step for span in waits if span.step is not None})
    first = max(0, (len(steps) - most) // 2)
    shown = steps[first : first + most]
    start = min(span.start for span in waits if span.step in shown)
    end = max(span.end for span in waits if span.step in shown)
    return tuple(span for span in spans if span.end > start and span.start < end)


def _span(node: JsonNode) -> Span:
    places = (node.optional("round"), node.optional("step"))
    round_, step = (None if place is None else int(place) for place in places)
    return Span(node.string("what"), node.string("who"), round_, step, node.number("start"), node.number("end"))
