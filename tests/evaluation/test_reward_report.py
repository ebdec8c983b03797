import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.embedding import embed, same_side_neighbours
from evaluation.preference_report import write_preference_report
from evaluation.reward_figures import reward_plots
from evaluation.reward_run import Features, read_reward_run
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
    assert len(list((reward_run / "figures").glob("*.png"))) == 6


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


def test_without_validation_it_says_so(bare: Path) -> None:
    text = Page(write_preference_report(bare).read_text("utf-8")).text
    assert "Not measured" in text and "fitted without validation pairs" in text
    assert [plot.name for plot in reward_plots(read_reward_run(bare))] == ["fig19-training"]


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
