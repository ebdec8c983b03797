"""The figure of a run that people pay: what the policy is worth to each of them.

Letters: m people.
"""

from typing import TYPE_CHECKING

from evaluation.for_whom import who_gains
from evaluation.run import Run
from evaluation.svg import BLUE, GREY, MUTED, ORANGE, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 3.2
"""Inches."""


def people_figure(run: Run) -> Drawing | None:
    """Everybody's gain over SFT after the last round, the least served first, so that no minority hides in a mean.

    Source: rounds/round_NNN/people.parquet.

    Args:
        run: the run, as read.

    Returns:
        The drawing; None where no people pay.

    Padding contract: there is none.
    """
    if not run.people:
        return None
    true = [row for row in run.people if row.gold_gain is not None]
    bars = sorted(
        (gain, low, high)
        for gain, low, high in (
            (row.gold_gain, row.gold_low, row.gold_high) if true else (row.gain, row.low, row.high) for row in true or run.people
        )
        if gain is not None and low is not None and high is not None
    )

    def draw(figure: "Figure", narrow: bool) -> None:
        ax = figure.subplots()
        for place, (gain, low, high) in enumerate(bars):
            colour = BLUE if low > 0 else ORANGE if high < 0 else GREY
            ax.errorbar(place, gain, [[gain - low], [high - gain]], color=colour, marker="o", markersize=4, elinewidth=1.0)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.set_xticks([])
        ax.set_xlabel("people, the least served first")
        ax.set_ylabel("gain over SFT in their own reward")

    said = who_gains(run.people)
    return drawing(
        "people",
        "For whom the policy is better",
        f"After the last round, with 95% intervals over the prompts: {said}. Blue: better, orange: worse, grey: not told apart. "
        "Good: the left end is not below zero.",
        HEIGHT,
        draw,
    )
