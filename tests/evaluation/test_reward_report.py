import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.embedding import embed, first_pairs, same_side_neighbours
from evaluation.fit_words import COLLAPSED, collapsed, inflation, meta_tiles
from evaluation.preference_report import write_preference_report
from evaluation.reward_figures import reward_plots
from evaluation.reward_run import Features, read_reward_run
from rm import contrastive_term
from tests.evaluation.made_up import make_reward_run
from tests.evaluation.test_report import LOADING_TAGS, Page
from tokens.errors import UserError


@pytest.fixture(scope="module")
def html(reward_run: Path) -> str:
    return (reward_run / "report.html").read_text("utf-8")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Fitted without validation pairs and without shifted samples."""
    return make_reward_run(tmp_path / "bare", shifted=False, validation=False)


def test_it_loads_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert not page.tags & LOADING_TAGS
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.handlers
    assert "<script" not in html and not re.findall(r"https?://", html)


def test_the_page_says_what_the_files_say(html: str, reward_run: Path) -> None:
    text = Page(html).text
    scores = pq.read_table(reward_run / "scores.parquet").to_pylist()
    for name in ("original", "relabelled", "agreement", "held_out"):
        right = [row["chosen"] > row["rejected"] for row in scores if row["set"] == name]
        assert f"{np.mean(right):.1%}" in text
        assert name.replace("_", " ") in text
    first = np.mean([row["chosen"] > row["rejected"] for row in scores if row["set"] == "original"])
    assert f"The reward model ranks {first:.1%} of 400 validation pairs as labelled" in text
    assert "Better than chance" in text
    assert "The accuracy fell from its best: original" in text
    for number in (8, 11, 16, 19, 20):
        assert f"Figure {number}" in text
    assert len(list((reward_run / "figures").glob("*.png"))) == 7
    card = json.loads((reward_run / "card.json").read_text())
    assert f"{card['validation']['validation/original/ece']:.1%}" in text
    assert "J alone rises by inflation" in text and "Not on this page" not in text
    fit = card["fit"]
    shown = text.split("MetaRM", 1)[1]
    for key in ("J_heldout_start", "J_heldout_before", "J_heldout_after", "J_heldout", "spread_heldout_before", "spread_heldout"):
        assert f"{fit[key]:.3f}" in shown
    assert f"{fit['displacement']:.3g}" in shown and f"{fit['alignment_cos']:+.2f}" in shown and "1.2%" in shown


def test_epochs_end_where_they_were_planned_to(reward_run: Path, tmp_path: Path) -> None:
    assert read_reward_run(reward_run).epoch_ends == (94.0,)
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    (run / "config.yaml").write_text("reward: {epochs: 4}")
    assert read_reward_run(run).epoch_ends == (47.0, 94.0, 141.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"step": 1' in line) + "\n")  # stopped early
    few = read_reward_run(run)
    assert few.epoch_ends == tuple(end for end in (47.0, 94.0, 141.0) if end < len(few.steps))


def test_sets_and_numbers_over_training(reward_run: Path) -> None:
    run = read_reward_run(reward_run)
    assert run.sets == ("original", "relabelled", "agreement", "held_out")
    points = run.over_training("validation/held_out/accuracy")
    assert [step for step, _ in points] == list(range(0, 189, 9))
    assert run.over_training("validation/none/accuracy") == []
    assert len(run.steps) == 188


def test_figure_16_is_of_the_prompts_that_the_ascent_never_saw(bare: Path, tmp_path: Path) -> None:
    run = make_reward_run(tmp_path / "shifted", features=False)
    plot = next(plot for plot in reward_plots(read_reward_run(run)) if plot.name == "fig16-differences")
    assert "the ascent never saw (100 differences)" in plot.caption  # 10 prompts of 5 responses
    table = pq.read_table(run / "shifted.parquet")
    pq.write_table(table.drop_columns(["kept_back"]), run / "shifted.parquet")
    plot = next(plot for plot in reward_plots(read_reward_run(run)) if plot.name == "fig16-differences")
    assert "on all prompts: which ones the ascent never saw was not recorded" in plot.caption


def test_without_validation_it_says_so(bare: Path) -> None:
    text = Page(write_preference_report(bare).read_text("utf-8")).text
    assert "Not measured" in text and "fitted without validation pairs" in text
    assert [plot.name for plot in reward_plots(read_reward_run(bare))] == ["fig19-training"]
    assert "Figures 8, 11 and 20. They need held-out pairs" in text and "Figure 16. It needs samples of a shifted policy" in text
    assert "J alone rises" not in text and "evaluate_every" not in text  # nothing to measure on however often


def with_card(run: Path, **fit: object) -> None:
    card = json.loads((run / "card.json").read_text())
    (run / "card.json").write_text(json.dumps(card | {"fit": card["fit"] | fit}))


def test_weights_that_early_stopping_kept_are_not_said_to_have_declined(tmp_path: Path) -> None:
    """The made-up fit is best in its first epoch and falls by three points: all well, if those weights were kept."""
    run = make_reward_run(tmp_path / "run", shifted=False, features=False)
    points = dict(read_reward_run(run).over_training("validation/original/accuracy"))
    best = max(points, key=lambda step: points[step])
    assert best < 120 and points[best] - points[180] > 0.01
    assert "The accuracy fell from its best: original" in Page(write_preference_report(run).read_text("utf-8")).text
    with_card(run, best_step=best)
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert f"Early stopping kept the weights of step {best}, the best on the set that reward.stop_on names" in text
    assert "The accuracy fell" not in text and "keeps the best weights" not in text
    assert f"Solid line: step {best}" in text
    with_card(run, best_step=180)  # as if another set had been gone by
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert f"another step was better on others: original {points[best]:.1%} at step {best} to {points[180]:.1%}" in text
    with_card(run, best_step=5)
    with pytest.raises(UserError, match="weights of step 5 were kept"):
        write_preference_report(run)


def test_one_measurement_makes_no_curve_and_the_page_says_how_to_get_one(tmp_path: Path) -> None:
    run = make_reward_run(tmp_path / "run", shifted=False, features=False)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step": 180' in line or '"reward"' in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [plot.name for plot in reward_plots(read_reward_run(run))] == ["calibration", "fig19-training"]
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert "Figures 8 and 20, and the scores of Figure 19." in text and "--reward.evaluate_every 18" in text
    assert "Figure 11. It needs at least 5 held-out pairs" in text
    assert "mean scores are of validation pairs" not in text


def test_prototypes_that_collapsed_are_said(tmp_path: Path) -> None:
    run = make_reward_run(tmp_path / "run", shifted=False, features=False)
    told = "The prototypes of SwAV have collapsed, or were never learnt: in the last quarter of the fit 1.02 of them"
    before = (run / "metrics.jsonl").read_text()
    for effective, said in ((1.02, True), (4.0, False)):
        rows = [json.loads(line) for line in before.splitlines()]
        for row in rows:
            if row["phase"] == "reward":
                row["reward/prototypes_effective"] = effective if row["step"] > 100 else 9.0
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = Page(write_preference_report(run).read_text("utf-8")).text
        assert (told in text) == said
        assert f"{effective:.1f}in effective use" in text.replace("\n", "")


def test_words_on_a_fit_by_hand() -> None:
    fit = {"J_heldout_before": 0.4, "J_heldout_after": 0.41, "spread_heldout_before": 0.7, "spread_heldout_after": 0.7004}
    assert inflation(fit) is not None and "J rose from 0.400 to 0.410 at θ′" in str(inflation(fit))
    assert inflation(fit | {"spread_heldout_after": 0.702}) is None
    assert inflation(fit | {"J_heldout_after": 0.4}) is None  # idle, which another finding says
    assert inflation({"J_before": 0.4, "J_after": 0.5}) is None
    assert meta_tiles({"loss": 0.5}) == ()
    assert meta_tiles({"J_before": 0.4, "displacement": 0.0312, "J_heldout_before": 0.4, "J_heldout_after": 0.41}) == (
        ("J at θ′", "0.410", "0.400 at θ"),
        ("‖θ′ − θ‖", "0.0312", "of one ascent"),
    )
    assert collapsed([]) is None
    assert collapsed([1.0] * 30 + [2.0] * 10) is None
    assert "1.05 of them" in str(collapsed([9.0] * 30 + [1.05] * 10))


def test_the_last_quarter_warns_where_training_does() -> None:
    assert COLLAPSED == contrastive_term.COLLAPSED


@pytest.mark.parametrize("num", [30, 1200])
def test_features_are_of_as_many_chosen_as_rejected_responses(num: int) -> None:
    """Rows stand chosen first and then rejected, however many there are."""
    vectors = np.arange(2.0 * num)[:, None]
    kept = first_pairs(Features(vectors, np.arange(2 * num) < num), 500)
    expected = min(num, 500)
    assert kept.vectors[:, 0].tolist() == [*range(expected), *range(num, num + expected)]
    assert (int(kept.chosen.sum()), int((~kept.chosen).sum())) == (expected, expected)
    mixed = np.arange(2 * num) % 2 == 0  # pair by pair
    assert first_pairs(Features(vectors, mixed), 3).vectors[:, 0].tolist() == [0, 2, 4, 1, 3, 5]


def test_a_model_no_better_than_chance_is_not_praised(tmp_path: Path) -> None:
    run = make_reward_run(tmp_path / "run", shifted=False, features=False)
    rows = [{"id": f"v{i}", "set": "original", "chosen": 0.5 + (i % 2) * 0.1, "rejected": 0.55} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), run / "scores.parquet")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if "validation" not in line) + "\n")
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert "Not told from chance" in text and "ranks 50.0% of 40 validation pairs" in text
    assert "fell from its best" not in text


def test_neighbours_by_hand() -> None:
    vectors = np.array([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [5.1, 0.0], [5.25, 0.0]])
    assert same_side_neighbours(Features(vectors, np.array([True, True, False, False, True]))) == 0.8
    apart = np.repeat(np.eye(2), 10, 0) + 0.01 * np.random.default_rng(0).normal(size=(20, 2))
    assert same_side_neighbours(Features(apart, np.arange(20) < 10)) == 1.0
    assert same_side_neighbours(Features(np.zeros((4, 3)), np.array([True, True, False, False]))) <= 1  # constant features


def test_the_embedding_is_the_same_every_time_and_parts_what_is_apart() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 5)) + 6 * (np.arange(60) < 30)[:, None]
    first = embed(vectors)
    np.testing.assert_array_equal(first, embed(vectors))
    assert first.shape == (60, 2) and np.isfinite(first).all()
    assert same_side_neighbours(Features(first, np.arange(60) < 30)) > 0.95
    assert embed(vectors[:6, :1]).shape == (6, 2)  # one feature: no PCA to start from


@pytest.mark.slow  # t-SNE again
def test_the_same_files_give_the_same_bytes(reward_run: Path, tmp_path: Path) -> None:
    twin = tmp_path / reward_run.name
    shutil.copytree(reward_run, twin, ignore=shutil.ignore_patterns("figures", "report.html"))
    write_preference_report(twin)
    for path in [reward_run / "report.html", *(reward_run / "figures").iterdir()]:
        assert (twin / path.relative_to(reward_run)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("scores.parquet", [{"id": "a", "set": "original", "chosen": 1.0}], "has no column rejected"),
        ("scores.parquet", [{"id": "a", "set": "original", "chosen": float("nan"), "rejected": 0.0}], "must be a finite number"),
        ("features.parquet", [{"id": "a", "side": "left", "vector": [1.0]}], "needs sides chosen and rejected"),
        ("features.parquet", [{"id": "a", "side": "chosen", "vector": [float("inf")]}], "1 of its vectors are not finite"),
        ("shifted.parquet", [{"prompt_id": "m", "sample": 0, "score_vanilla": 1.0}], "has no column score_metarm"),
    ],
)
def test_tables_that_are_none(bare: Path, name: str, rows: list[dict[str, object]], message: str) -> None:
    pq.write_table(pa.Table.from_pylist(rows), bare / name)
    with pytest.raises(UserError, match=message):
        write_preference_report(bare)
    assert not (bare / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.parquet", "no Parquet", "cannot be read as Parquet"),
        ("metrics.jsonl", "{}\n", "has no key 'step'"),
        ("config.yaml", "reward: [", "config.yaml is not YAML"),
        ("config.yaml", "name: x", "has no key 'reward'"),
        ("card.json", '{"kind": "reward"}', "has no key 'planned_steps'"),
    ],
)
def test_files_that_are_malformed(bare: Path, name: str, content: str, message: str) -> None:
    (bare / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_preference_report(bare)
