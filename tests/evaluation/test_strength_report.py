import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import strength_card
from evaluation.preference_report import pick_examples, write_preference_report
from evaluation.strength_figures import agreement_by_group, strength_plots
from evaluation.strength_run import GOLD, MEAN, SECOND_LABEL, STD, read_strength_run
from evaluation.studies import STUDIES
from preferences import strength_files
from preferences.labels import PUBLIC_LABEL
from tests.evaluation.made_up import EVIL, make_strength_run
from tests.evaluation.test_report import LOADING_TAGS, Page
from tokens.errors import UserError


@pytest.fixture(scope="module")
def html(strength_run: Path) -> str:
    return (strength_run / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is known beside the scores: no truth, no second labeller, no studies."""
    return make_strength_run(tmp_path_factory.mktemp("small") / "small", num=300, truth=False, label=False, studies=False)


def copied(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def table_of(run: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((run / "strengths").glob("*.parquet"))])


def test_it_loads_nothing_runs_nothing_and_keeps_texts_texts(html: str) -> None:
    page = Page(html)
    assert not page.tags & LOADING_TAGS
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.handlers
    assert "<script" not in html and not re.findall(r"https?://", html)
    assert "default-src 'none'" in html
    assert page.text.count(EVIL) >= 2  # the prompt and the chosen response of the weakest pair
    assert "# <b>not bold</b>" in page.text
    assert "(10,000 characters)" in page.text and "word " * 700 not in page.text  # a long text is cut


def test_the_page_says_what_the_files_say(html: str, strength_run: Path) -> None:
    table, text = table_of(strength_run), Page(html).text
    train = np.array([split == "train" for split in table["split"].to_pylist()])
    mean = table["mean preference difference"].to_numpy()[train]
    wrong = table["gold_chosen"].to_numpy()[train] < 0
    below = f"{np.mean(mean < 0):.1%}"
    ranks = mean.argsort().argsort() + 1.0
    area = 1 - (ranks[wrong].sum() - wrong.sum() * (wrong.sum() + 1) / 2) / (wrong.sum() * (~wrong).sum())
    assert "2,700 training pairs have a strength below 0: 10 reward models doubt their labels" in text
    for shown in (below, f"{area:.3f}", f"{wrong.mean():.1%} of the labels are wrong", "full, in-sample", "5.9 min"):
        assert shown in text
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 21, 22, 23, 24, 25):
        assert f"Figure {number}" in text
    assert "cluster study" not in text and "Not on this page" not in text  # all studies are there


def test_every_svg_can_stand_in_one_page(html: str) -> None:
    found = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(found) == 2 * 13
    seen: set[str] = set()
    for svg in found:
        ids = [node.attrib["id"] for node in ElementTree.fromstring(svg).iter() if "id" in node.attrib]
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(ids)
        colours = set(re.findall(r"(?:fill|stroke): (?!none)([^;\"]+)", svg))
        assert all(re.fullmatch(r"var\(--[a-z0-9]+\)", colour) for colour in colours), colours


def test_every_figure_is_a_png_file_too(strength_run: Path, html: str) -> None:
    names = re.findall(r'id="figure-([^"]*)"', html)
    assert sorted(path.name for path in (strength_run / "figures").iterdir()) == sorted(f"{name}.png" for name in names)
    for name in names:
        with Image.open(strength_run / "figures" / f"{name}.png") as image:
            small = image.convert("RGB").resize((312, image.height // 4))
            assert image.width == 1296  # 5.2 inches at 240 dots, and a margin
        edges = [small.crop(box) for box in ((0, 0, 312, 1), (0, 0, 1, small.height), (311, 0, 312, small.height))]
        assert all(edge.getextrema() == ((255, 255),) * 3 for edge in edges)  # a margin: nothing is cut off
        assert len(small.getcolors(1 << 20) or []) > 50


def test_examples_are_picked_by_strength_alone(strength_run: Path) -> None:
    table = table_of(strength_run)
    mean = table["mean preference difference"].to_numpy()
    std = table["std preference difference"].to_numpy()
    train = [i for i, split in enumerate(table["split"].to_pylist()) if split == "train"]
    rising = sorted(train, key=lambda i: mean[i])
    groups = pick_examples(read_strength_run(strength_run))
    ids = [[int(pair.id[1:]) for pair in group.pairs] for group in groups]
    assert ids[0] == rising[:2]
    assert ids[1] == sorted(train, key=lambda i: abs(mean[i]))[:2]
    assert ids[2] == rising[::-1][:2]
    assert ids[3] == rising[:20]
    weakest = groups[0].pairs[0]
    assert (weakest.prompt, weakest.chosen) == (f"{EVIL} prompt", EVIL)
    assert weakest.strength == f"μ {mean[rising[0]]:+.2f} · σ {std[rising[0]]:.2f}"
    assert (weakest.verdict, weakest.agrees) == ("truth: label wrong", False)
    assert [group.num_open for group in groups] == [2, 2, 2, 0]


def test_agreement_by_hand(small: Path) -> None:
    run = read_strength_run(small)
    says = np.full(len(run.mean), -1, dtype=np.int8)
    order = np.argsort(run.mean)
    says[order[:50]], says[order[50:100]], says[order[-50:]] = 0, [0, 1] * 25, 1  # the rest nobody was asked about
    groups = agreement_by_group(says, run)
    assert [estimate.value for _, estimate in groups] == [0.0, 0.5, 1.0]
    assert [mean for mean, _ in groups] == pytest.approx(
        [run.mean[order[part]].mean() for part in (slice(50), slice(50, 100), slice(-50, None))]
    )
    assert (groups[1][1].low, groups[1][1].high) == pytest.approx((0.3664, 0.6336), abs=1e-4)  # Wilson, 25 of 50
    assert len(agreement_by_group(np.ones(300, dtype=np.int8), run)) == 6


def test_what_is_not_known_is_left_out_and_said(small: Path) -> None:
    run = read_strength_run(small)
    assert (run.truth, run.label, run.wrong, dict(run.studies)) == (None, None, None, {})
    assert [plot.name for plot in strength_plots(run)] == ["fig01-strength", "fig02-groups"]
    text = Page(write_preference_report(small).read_text("utf-8")).text
    absent = text.split("Not on this page")[1].split("Pairs to read")[0]
    for study in STUDIES:
        assert f"python -m cluster study CONFIG --studies {study}" in absent
    for figures in ("Figure 3.", "Figure 4.", "Figures 21 and 22.", "Figures 23 to 25."):
        assert figures in absent
    assert "relabel PAIRS --judge" in absent
    assert "AUROC" not in text and "label wrong" not in text
    assert "second labeller" not in text.replace(absent, "")


def test_the_same_files_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    twin = tmp_path / "small"
    shutil.copytree(small, twin, ignore=shutil.ignore_patterns("figures", "report.html"))
    write_preference_report(twin)
    write_preference_report(small)
    for name in ("report.html", "figures/fig01-strength.png", "figures/fig02-groups.png"):
        assert (twin / name).read_bytes() == (small / name).read_bytes()
    assert not [path for path in twin.rglob("*") if path.suffix == ".tmp"]


def test_one_member_has_no_spread(tmp_path: Path) -> None:
    run = make_strength_run(tmp_path / "one", num=60, num_members=1, label=False, studies=False)
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert "the one reward model doubt" in text or "the one reward model" in text
    assert "There is one member" in text
    assert "σ" not in text.split("Pairs to read")[1].split("How it was made")[0].replace("σ their standard deviation", "")


def test_ties_with_the_truth_say_nothing(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    table = table_of(run).append_column("gold_chosen", pa.array([1.0, 0.5, 0.0] * 100))
    table = table.append_column("gold_rejected", pa.array([0.5] * 300))
    for path in (run / "strengths").iterdir():
        path.unlink()
    pq.write_table(table, run / "strengths" / "part-00000.parquet")
    truth = read_strength_run(run).truth
    assert truth is not None and truth[:3].tolist() == [1, -1, 0]


def spoil(column: str, values: object) -> pa.Table:
    return lambda table: table.set_column(table.schema.get_field_index(column), column, values)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (lambda t: t.drop_columns(["split"]), "lacks the columns split"),
        (lambda t: t.slice(0, 0), "holds no pair"),
        (spoil("mean preference difference", pa.array([float("nan")] * 300)), "not finite for 300 of 300 pairs, the first is p0"),
        (spoil("std preference difference", pa.nulls(300, pa.float64())), "'std preference difference' is missing"),
        (spoil("mean preference difference", pa.array(["high"] * 300)), "must hold numbers, got string"),
        (lambda t: t.append_column("GPT4 label", pa.array([2] * 300)), "must hold 1, 0 or -1, got"),
        (spoil("prompt", pa.array([["a", "turn"]] * 300)), "prompt of pair p[0-9]+ is no text"),
    ],
)
def test_strengths_that_are_none(small: Path, tmp_path: Path, spoiler, message: str) -> None:  # type: ignore[no-untyped-def]
    run = copied(small, tmp_path)
    (run / "report.html").write_text("earlier")
    table = spoiler(table_of(run))
    for path in (run / "strengths").iterdir():
        path.unlink()
    pq.write_table(table, run / "strengths" / "part-00000.parquet")
    with pytest.raises(UserError, match=message):
        write_preference_report(run)
    assert (run / "report.html").read_text() == "earlier"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("card.json", None, "it has no card.json"),
        ("card.json", "{", "card.json is not JSON"),
        ("card.json", '{"kind": "policy"}', "must be one of strength, reward, got 'policy'"),
        ("card.json", '{"kind": "strength"}', "card.json has no key 'num_members'"),
        ("config.yaml", None, "config.yaml is missing"),
        ("versions.json", "[]", "versions.json must be a JSON object"),
        ("strengths/part-00000.parquet", "no Parquet", "cannot be read as Parquet"),
    ],
)
def test_files_that_are_missing_or_malformed(small: Path, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run = copied(small, tmp_path)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_preference_report(run)


def test_a_weak_strength_is_warned_of(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    table = table_of(run).append_column("gold_chosen", pa.array(np.random.default_rng(5).normal(size=300)))
    table = table.append_column("gold_rejected", pa.array(np.zeros(300)))
    for path in (run / "strengths").iterdir():
        path.unlink()
    pq.write_table(table, run / "strengths" / "part-00000.parquet")
    card = json.loads((run / "card.json").read_text())
    weak = {"train": card["splits"]["train"] | {"auroc_wrong": 0.53}}
    (run / "card.json").write_text(json.dumps(card | {"folds": 3, "splits": weak}))
    text = Page(write_preference_report(run).read_text("utf-8")).text
    assert "Low strength hardly finds the wrong labels here: AUROC 0.53" in text
    assert "3 folds, cross-fitted" in text


def test_the_columns_are_those_that_strength_writes() -> None:
    """Named twice, because neither room may import the other."""
    assert (MEAN, STD) == (strength_files.MEAN, strength_files.STD)
    assert strength_card.GOLD == GOLD
    assert SECOND_LABEL == PUBLIC_LABEL


def test_a_run_without_a_training_split_shows_all_pairs(small: Path) -> None:
    run = read_strength_run(small)
    assert len(run.of_training) == 270
    assert len(replace(run, train=np.zeros(300, dtype=np.bool_)).of_training) == 300
