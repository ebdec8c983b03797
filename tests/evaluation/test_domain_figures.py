"""Figures of a customisation: as many strategies as there are, and length alone in each."""

from pathlib import Path

from matplotlib.figure import Figure

from evaluation.domain_figures import STYLES, domain_plots
from evaluation.domains import DOMAIN_STAGE, GENERAL_STAGE, DomainRow, DomainRun, outcomes

ALONE = {"hh": 0.55, "law": 0.6}


def run_of(number: int) -> DomainRun:
    """So many strategies, each of which ends elsewhere."""
    rows = []
    for i in range(number):
        for stage, domain in ((GENERAL_STAGE, ""), (DOMAIN_STAGE, "law")):
            for samples in (0, 10):
                accuracy = 0.5 + (i + samples) / 100
                rows += [DomainRow(f"s{i}", stage, domain, 0, samples, name, accuracy, 1.0) for name in ALONE]
    return DomainRun(Path(), ("hh",), ("law",), {f"s{i}": "" for i in range(number)}, ALONE, tuple(rows))


def test_more_strategies_than_styles_are_drawn() -> None:
    run = run_of(20)
    assert len(STYLES) < 20
    plots = domain_plots(run, outcomes(run))
    assert [plot.name for plot in plots] == ["general-stage", "domain-stage", "pareto", "each-domain"]
    for plot in plots:
        drawing, png = plot.render()
        assert png.startswith(b"\x89PNG") and "s19" in drawing.wide


def test_length_alone_stands_in_the_front() -> None:
    run = run_of(2)
    front = next(plot for plot in domain_plots(run, outcomes(run)) if plot.name == "pareto")
    figure = Figure()
    front.draw(figure, False)
    dotted = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    across = sorted((tuple(line.get_xdata()), tuple(line.get_ydata())) for line in dotted)
    assert across == [((0, 1), (ALONE["law"],) * 2), ((ALONE["hh"],) * 2, (0, 1))]
    assert "55.0% on the general sets and 60.0% on the domains" in front.caption
