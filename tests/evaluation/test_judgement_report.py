"""The page of a comparison: what it says, that it fits a phone, and that what a model or a judge wrote runs nowhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.judgement_report import write_judgement_report
from evaluation.judgement_run import FORMAT, KIND, JudgementRow, card_of_judge, cards_of_agreement, read_judgement_run
from evaluation.judgements import CHOICES, Verdict
from tests.browser import CHROMIUM, Browser
from tests.evaluation.made_up import EVIL
from tokens.errors import UserError

LONG = "openai:http://localhost:8000/v1#a-model-with-a-rather-long-name-instruct"


def made_up(directory: Path, judges: dict[str, Sequence[Verdict]], text: str = "bread keeps well") -> Path:
    """A directory as `evaluate` leaves it."""
    num = len(next(iter(judges.values())))
    rows = [
        JudgementRow(
            f"p{i}",
            f"{text} {i}?",
            "",
            f"{text} in a box {i}",
            text,
            7,
            4,
            True,
            i > 1,
            {name: v[i] for name, v in judges.items()},
        )
        for i in range(num)
    ]
    directory.mkdir()
    (directory / "judgements.jsonl").write_text("".join(row.line() for row in rows), "utf-8")
    model = {"path": f"/models/{text}", "sha256": "ab" * 32, "run": None, "mean_tokens": 7, "mean_characters": 20}
    card: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "models": {"A": {**model, "cut": 0.0, "empty": 0.0}, "B": {**model, "cut": 2 / num, "empty": 0.5}},
        "prompts": {"name": text, "num": num, "sha256": "cd" * 32},
        "sampling": {"seed": 0, "temperature": 1.0, "max_new_tokens": 32},
        "judges": {name: card_of_judge(name, rows) for name in judges},
        "agreement": cards_of_agreement(rows),
        "versions": {"python": "3.11"},
    }
    (directory / "card.json").write_text(json.dumps(card), "utf-8")
    (directory / "settings.json").write_text("{}", "utf-8")
    return directory


def verdicts(seed: int, shares: Sequence[float], num: int = 40) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [Verdict(CHOICES[i], CHOICES[i]) for i in rng.choice(3, num, p=shares)]


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    moody = [Verdict("a", "b")] * 20 + [Verdict("b", "b")] * 15 + [Verdict(None, "a", why="no reply")] * 5
    return made_up(tmp_path / "compared", {"gold": verdicts(0, (0.8, 0.1, 0.1)), LONG: moody, EVIL: verdicts(1, (0.2, 0.3, 0.5))})


def test_what_the_page_says(compared: Path) -> None:
    page = write_judgement_report(compared).read_text("utf-8")
    run = read_judgement_run(compared)
    won = run.judges[0].outcome
    assert won is not None and won.low > 0
    assert f"A wins {won.win:.1%}, ties {won.tie:.1%} and loses {won.lose:.1%} of 40 prompts against B." in page
    assert "The judges disagree" in page and f"By gold: wins − losses {won.margin:+.1%}" in page
    assert f"{LONG} changes its mind with the order on 57% of prompts" in page
    assert f"{LONG} prefers what it is shown first." in page
    assert f"{LONG} has no verdict on 5 prompts: no reply." in page
    assert f"gold prefers the longer response on {run.judges[0].length.longer.value:.0%}" in page  # type: ignore[union-attr]
    assert "5% of B" not in page and "Hardly agree" in page
    assert write_judgement_report(compared).read_text("utf-8") == page


def test_who_is_better_or_nobody(tmp_path: Path) -> None:
    for name, judged, words in (
        ("b", verdicts(0, (0.1, 0.1, 0.8)), "B is better"),
        ("none", verdicts(0, (0.4, 0.2, 0.4)), "Not told apart"),
        ("silent", [Verdict(None, None, 1, "not answered yet")] * 9, "Not judged yet"),
    ):
        assert f">{words}<" in write_judgement_report(made_up(tmp_path / name, {"gold": judged})).read_text("utf-8")


def test_judges_that_are_sure_of_opposite_things_make_nobody_the_better(tmp_path: Path) -> None:
    a, b, unsure = verdicts(0, (0.7, 0.1, 0.2)), verdicts(1, (0.2, 0.1, 0.7)), verdicts(2, (0.4, 0.2, 0.4))
    for name, judges in (("one", {"gold": a, "people": b}), ("other", {"people": b, "gold": a})):
        page = write_judgement_report(made_up(tmp_path / name, judges)).read_text("utf-8")
        assert ">The judges disagree<" in page and "A is better" not in page and "B is better" not in page
        assert "gold prefers A" in page and "people prefers B" in page
    page = write_judgement_report(made_up(tmp_path / "unsure", {"gold": a, "people": unsure})).read_text("utf-8")
    assert ">A is better<" in page, "who is not sure contradicts nobody"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("card.json", '"evaluation"', '"reward"', "'kind' must be one of evaluation, got 'reward'"),
        ("card.json", '"format": 1', '"format": 2', "format 2, this version reads 1"),
        ("judgements.jsonl", '"a_first": "a"', '"a_first": "A"', "'a_first' must be one of a, tie, b, got 'A'"),
        ("judgements.jsonl", "prompt_id", "id", "has no key 'prompt_id'"),
    ],
)
def test_files_that_are_damaged(compared: Path, file: str, old: str, new: str, words: str) -> None:
    path = compared / file
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(UserError, match=words):
        read_judgement_run(compared)
    path.write_text("", "utf-8")
    with pytest.raises(UserError, match=r"holds no prompt|is not JSON"):
        read_judgement_run(compared)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize(("width", "hostile"), [(390, True), (1280, False)])
def test_it_fits_and_runs_nothing(tmp_path: Path, compared: Path, width: int, hostile: bool) -> None:
    if hostile:
        judges = {"gold": verdicts(0, (0.8, 0.1, 0.1)), EVIL: verdicts(1, (0.2, 0.3, 0.5)), LONG: verdicts(2, (0.2, 0.3, 0.5))}
        compared = made_up(tmp_path / "hostile", judges, EVIL)
    page = write_judgement_report(compared).read_text("utf-8")
    with Browser(tmp_path / "chromium") as browser:
        seen = browser.measure(tmp_path / "page.html", page, width)
    assert seen["title"] == f"{compared.name} · Rondo"
    assert (seen["overflow"], seen["scripts"], seen["loaded"], seen["console"], seen["shown"]) == (0, 0, 0, 0, 1)
    assert float(seen["smallest"]) >= 9
