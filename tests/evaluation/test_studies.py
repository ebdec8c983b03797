from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.appendix_figures import growing_plots
from evaluation.groups import how_many_seeds
from evaluation.json_node import lines_of
from evaluation.studies import STRONGEST, StudyRow, curves, last_and_best, read_studies, sets_of
from evaluation.study_figures import study_plots
from tests.evaluation.made_up import make_studies
from tokens.errors import UserError

ROW = StudyRow("top", "90-100%: soft", 0, 0, 13, "original", 0.5, 0.7, 0.1)


def rows_of(accuracies: dict[int, list[float]]) -> list[StudyRow]:
    """One arm; accuracies by step of seeds 0, 1, 2 ..."""
    return [replace(ROW, seed=s, step=step, accuracy=a) for step, each in accuracies.items() for s, a in enumerate(each)]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, set="train", ece=None, step=4)]
    (tmp_path / "top.jsonl").write_text(lines_of(rows) + '{"study": "to')  # stopped while it wrote
    assert read_studies(tmp_path) == {"top": tuple(rows)}
    assert read_studies(tmp_path / "absent") == {}
    assert (ROW.panel, ROW.line) == ("90-100%", "soft")
    assert (replace(ROW, arm="none").panel, replace(ROW, arm="none").line) == ("", "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"study": "top"}', "has no key 'arm'"),
        (lines_of([ROW]).replace("0.5", '"half"').strip(), "'accuracy' must be a finite number"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "top.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=message):
        read_studies(tmp_path)


def test_curves_average_over_seeds() -> None:
    rows = rows_of({0: [0.4, 0.6, 0.5], 8: [0.7, 0.72, 0.71], 16: [0.66]})
    (curve,) = curves([*rows, replace(ROW, set="train", loss=9.0)], "accuracy", "original")
    assert curve.steps == (0, 8, 16)
    assert [point.value for point in curve.points] == pytest.approx([0.5, 0.71, 0.66])
    half = 4.3027 * 0.1 / np.sqrt(3)  # t(0.975; 2) s / sqrt(S)
    assert curve.points[0].high - curve.points[0].value == pytest.approx(half, rel=1e-4)
    assert curve.points[2].low == curve.points[2].high == 0.66  # one seed got there
    assert (curve.line, curve.num_seeds, curve.num_pairs) == ("soft", 3, 13)
    assert curves([replace(ROW, ece=None)], "ece", "original") == ()
    with pytest.raises(ValueError, match="not colour"):
        curves(rows, "colour", "original")


def test_last_and_best_show_the_late_decline() -> None:
    ((line, last, best),) = last_and_best(rows_of({8: [0.7, 0.8], 16: [0.6, 0.9], 24: [0.5, 0.6]}), "original")
    assert (line, last.value, best.value) == ("soft", pytest.approx(0.55), pytest.approx(0.8))


def test_sets_and_seeds() -> None:
    rows = [ROW, replace(ROW, set="train"), replace(ROW, set="held_out", seed=4)]
    assert sets_of(rows) == ("original", "held_out")
    assert how_many_seeds(rows) == "2 seeds, too few for an interval"
    assert how_many_seeds(rows[:1]) == "1 seed, too few for an interval"
    assert how_many_seeds([*rows, replace(ROW, seed=2)]) == "3 seeds, 95% intervals"


def test_every_study_has_its_figures() -> None:
    studies = make_studies(1)
    assert [(plot.name, plot.paper) for plot in study_plots(studies)] == [
        ("fig04-deciles", "Figure 4"), ("fig05-flip", "Figure 5"), ("fig06-top", "Figure 6"), ("fig07-margin", "Figure 7"),
        ("fig08-methods", "Figure 8"), ("fig21-weakest", "Figure 21"), ("fig22-strongest", "Figure 22"),
        ("fig23-flipped", "Figure 23"), ("fig24-ambiguous", "Figure 24"), ("fig25-treated", "Figure 25"),
    ]  # fmt: skip
    only_training = {"top": [replace(ROW, set="train")], "of another version": [ROW]}
    assert study_plots(only_training) == ()


def test_half_a_study_is_drawn_as_far_as_it_goes() -> None:
    """A study that was stopped: one arm, one seed, one step."""
    few = {
        study: [next(row for row in rows if row.step == 20), next(row for row in rows if row.set == "train")]
        for study, rows in make_studies(1).items()
    }
    few["growing"] = [replace(row, arm=f"{STRONGEST}: 10%") for row in few["growing"]]
    plots = study_plots(few)
    numbers = [plot.paper.removeprefix("Figure ") for plot in plots]
    assert numbers == ["4", "5", "6", "7", "8", "22", "23"]
    assert growing_plots([replace(ROW, arm="other: 10%")]) == ()
    for plot in plots:
        drawing, png = plot.render()
        assert drawing.wide.startswith("<svg") and png.startswith(b"\x89PNG")
