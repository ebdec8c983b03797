"""MetaRM's diagnostics over the steps of a fit, or of a run's fits one after another.

Letters: R rounds.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaluation.curves import Points, curve, step_axis
from evaluation.panels import common_legend, panels
from evaluation.svg import BLUE, GREEN, GREY, MUTED, PURPLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

META_TITLE = "Told apart better, or only scored larger"
META_CAPTION = (
    "Above, on prompts that no ascent saw: J, which rises when scores only grow larger, and the scale-free spread, which does "
    "not. Good: the spread is higher at θ′ too. cos(−∇L, ∇J) above 0: following the preferences spreads the samples by itself. "
    "A ‖θ′ − θ‖ of 0: meta.eta does nothing."
)
META_HEIGHT, META_NARROW_HEIGHT = 3.6, 6.4
_PANELS = (
    ("J", (("reward/J_heldout", GREY, "at θ"), ("reward/J_heldout_ascended", BLUE, "at θ′"))),
    ("scale-free spread", (("reward/spread_heldout", GREY, "at θ"), ("reward/spread_heldout_ascended", BLUE, "at θ′"))),
    ("cos(−∇L, ∇J)", (("reward/alignment_cos", PURPLE, None),)),
    ("‖θ′ − θ‖", (("reward/displacement", GREEN, None),)),
)
META_SERIES = tuple(name for _, lines in _PANELS for name, *_ in lines)
"""Metrics that the figure is made of."""


def has_meta(points: Mapping[str, Points]) -> bool:
    """Whether there is something to draw.

    Source: metrics.jsonl.

    Args:
        points: by metric.

    Returns:
        True where a fit by MetaRM measured something.

    Padding contract: there is none.
    """
    return any(points[name] for name in META_SERIES)


def draw_meta(figure: "Figure", narrow: bool, points: Mapping[str, Points], label: str) -> None:
    """Fill the figure.

    Source: Secrets of RLHF Part II, Algorithm 1; what was measured, not a figure of the paper.

    Args:
        figure: an empty one.
        narrow: the variant.
        points: (x, round, value) by metric, every one of ``META_SERIES``.
        label: of the axis of steps.

    Padding contract: there is none.
    """
    shown = [(title, lines) for title, lines in _PANELS if any(points[name] for name, *_ in lines)]
    axes = panels(figure, len(shown), narrow, sharex=True)
    for ax, (title, lines) in zip(axes, shown, strict=True):
        for name, colour, at in lines:
            if points[name]:
                curve(ax, points[name], colour, at)
        ax.set_title(title)
    for ax, (title, _) in zip(axes, shown, strict=True):
        if title.startswith("cos"):
            ax.axhline(0, color=MUTED, linewidth=0.8)
    for number, ax in enumerate(axes):
        lowest = number == len(axes) - 1 if narrow else number >= len(axes) - 2
        step_axis(ax, label if lowest else "")
    common_legend(figure, axes, 2)
