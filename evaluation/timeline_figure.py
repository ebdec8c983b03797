"""Who works while who waits: the spans of a few PPO steps as bars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evaluation.svg import BLUE, CARD, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, Drawing, drawing
from evaluation.timeline import DRIVER, Span, window

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_STEPS = 4
COLOURS: Mapping[str, str] = {"sample": BLUE, "score": GREEN, "policy": ORANGE, "sync": PURPLE}
"""Of phases; any other is grey."""
BAR = 0.62
WIDEST = 0.06
"""A span wider than this share of the figure has its step written in it."""
THINNEST = 0.004
"""Share of the figure that weights which come are wide, at least."""


def timeline_figure(spans: Sequence[Span]) -> Drawing | None:
    """A few PPO steps from the middle of the last round: what the driver waits for, and who works meanwhile.

    Source: timeline.jsonl; the form is Gantt's.

    Args:
        spans: of the run.

    Returns:
        The drawing; None where no step was recorded.

    Padding contract: there is none.
    """
    shown = window(spans, MOST_STEPS)
    if not shown:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        draw_spans(ax, shown, *_limits(shown), numbered=not narrow)
        handles, labels = phases_of(ax)
        figure.legend(handles, labels, loc="outside upper left", ncols=3 if narrow else 5)

    return drawing(
        "timeline",
        "Who works while who waits",
        "A few PPO steps of the last round; the numbers are steps. First line: what the driver waits for. Below: each process at "
        "work, weights that come in the middle of it as a thin bar. With policy.max_lag 0 one works at a time; from 1 on the "
        "engines sample the next step while the learner trains.",
        max(2.1, 1.3 + 0.36 * len(_lanes(shown))),
        draw,
    )


def draw_spans(ax: "Axes", spans: Sequence[Span], start: float, end: float, numbered: bool) -> None:
    """One line per process, the driver's first; a sync is a thin bar over what it comes into.

    Source: none needed.

    Args:
        ax: where.
        spans: at least one.
        start: of the picture, Unix time, s.
        end: of the picture.
        numbered: writes the step into bars that have room for it.

    Padding contract: there is none.
    """
    lanes = _lanes(spans)
    for span in spans:
        left, right = max(span.start, start) - start, min(span.end, end) - start
        thin = span.what == "sync" and span.who != DRIVER
        y = lanes.index(span.who) + (0.5 * BAR if thin else 0)
        if thin:  # however short, it can be seen
            right = max(right, left + THINNEST * (end - start))
        ax.barh(
            y, right - left, left=left, height=BAR / 3 if thin else BAR, zorder=4 if thin else 3, label=_name(span),
            color=COLOURS[span.what] if span.what in COLOURS else GREY, alpha=0.55 if span.who == DRIVER else 1.0,
            edgecolor=CARD, linewidth=0.0 if thin else 0.7,
        )  # fmt: skip
        colour = INK if span.who == DRIVER else CARD
        if numbered and span.step is not None and not thin and right - left > WIDEST * (end - start):
            ax.text((left + right) / 2, y, str(span.step), ha="center", va="center", fontsize=7, zorder=5, color=colour)
    ax.set_yticks(range(len(lanes)), lanes)
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    ax.set_xlim(0, end - start)
    ax.set_xlabel("seconds")
    ax.grid(axis="y", visible=False)
    ax.axhline(0.5, color=MUTED, linewidth=0.6)


def phases_of(ax: "Axes") -> "tuple[list[Artist], list[str]]":
    """Handles and labels of a legend, each phase once, in the order of a step.

    Source: none needed.

    Args:
        ax: that ``draw_spans`` filled.

    Returns:
        As many handles as labels.

    Padding contract: there is none.
    """
    handles, labels = ax.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    names = [name for name in (*COLOURS, "other") if name in by_label]
    return [by_label[name] for name in names], names


def _name(span: Span) -> str:
    return span.what if span.what in COLOURS else "other"


def _lanes(spans: Sequence[Span]) -> list[str]:
    """The driver, then the processes in the order in which a step needs them."""
    order = [*COLOURS, "other"]
    first: dict[str, int] = {}
    for span in spans:
        place = order.index(_name(span))
        first[span.who] = min(place, first[span.who]) if span.who in first else place
    return sorted(first, key=lambda who: (who != DRIVER, first[who], who))


def _limits(spans: Sequence[Span]) -> tuple[float, float]:
    waits = [span for span in spans if span.who == DRIVER]
    return min(span.start for span in waits), max(span.end for span in waits)
