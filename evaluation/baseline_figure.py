"""The figure that only DPO has: its loss and how it tells the pairs apart."""

from typing import TYPE_CHECKING

from evaluation.curves import curve, step_axis
from evaluation.run import Run, series
from evaluation.svg import BLUE, GREEN, GREY, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 4.0
"""Inches."""


def dpo_figure(run: Run) -> Drawing | None:
    """Loss, accuracy and margin of DPO's implicit reward by step.

    Source: Rafailov et al. 2023 (arXiv:2305.18290); metrics.jsonl.

    Args:
        run: the run, as read.

    Returns:
        The drawing; None where nothing was trained by DPO.

    Padding contract: there is none.
    """
    names = (("dpo/loss", GREY, "loss"), ("dpo/accuracy", BLUE, "accuracy"), ("dpo/margin", GREEN, "margin"))
    points = [(series(run, "dpo", name), colour, title) for name, colour, title in names]
    if not points[0][0]:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots(3, 1, sharex=True)
        for ax, (values, colour, title) in zip(axes, points, strict=True):
            curve(ax, values, colour, None)
            ax.set_title(title)
        step_axis(axes[-1], "logged step")

    return drawing(
        "dpo",
        "How DPO learnt the pairs",
        "On the pairs of each step: the loss (log 2 at the start), the share of pairs whose implicit reward prefers the chosen "
        "response, and by how much. Good: the loss falls slowly. An accuracy of 100% on noisy labels is memory, not learning.",
        HEIGHT,
        draw,
    )
