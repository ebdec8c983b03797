"""One page of several runs: what it says is what their files say, and what cannot be compared is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.cli import main
from evaluation.compare import win_tie_lose
from evaluation.compared_report import comparison_findings, comparison_headline, write_comparison
from evaluation.compared_runs import ComparedRun, config_differences, duel, names_of, read_runs
from evaluation.records import EvaluationRow, read_rows
from evaluation.run_config import flat_config
from evaluation.table import rounds_table, runs_table
from tests.evaluation.made_up import EVIL
from tokens.errors import UserError

RunMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(make_run: RunMaker) -> Path:
    return make_run(name="plain")


@pytest.fixture(scope="module")
def lifted(make_run: RunMaker) -> Path:
    return make_run(name="lifted", num_rounds=2, lift=0.9)


@pytest.fixture(scope="module")
def runs(plain: Path, lifted: Path) -> tuple[ComparedRun, ...]:
    return read_runs([plain, lifted])


def edited(run: Path, to: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A copy of a run with its config changed."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text())
    change(config)
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    return to


def test_the_best_round_is_that_with_the_highest_mean_of_the_judge(runs: tuple[ComparedRun, ...]) -> None:
    for one in runs:
        golds = [np.mean([row.gold for row in rows if row.gold is not None]) for rows in one.run.round_rows]
        assert one.best == int(np.argmax(golds))
        assert one.best_round.evaluation.gold == pytest.approx(max(golds))


def test_a_round_that_does_not_count_is_not_the_best_unless_none_does(plain: Path, lifted: Path, tmp_path: Path) -> None:
    best = read_runs([plain, lifted])[1].best
    found = []
    for number, out in enumerate(({best}, {0, 1})):
        run = shutil.copytree(lifted, tmp_path / str(number))
        ledger = json.loads((run / "ledger.json").read_text())
        for index, entry in enumerate(ledger["rounds"]):
            entry["disqualified"] = ["truncation"] if index in out else []
        (run / "ledger.json").write_text(json.dumps(ledger))
        found.append(read_runs([plain, run])[1].best)
    assert found == [1 - best, best]


def test_names_are_the_shortest_ends_that_differ() -> None:
    assert names_of([Path("/a/x"), Path("/a/y")]) == ("x", "y")
    assert names_of([Path("/a/runs/x"), Path("/b/runs/x"), Path("/b/runs/y")]) == ("a/runs/x", "b/runs/x", "b/runs/y")


def test_a_duel_is_the_files_gold_prompt_by_prompt(runs: tuple[ComparedRun, ...], plain: Path, lifted: Path) -> None:
    plain_best, lifted_best = (
        {r.prompt_id: r.gold for r in read_rows(run / "rounds" / f"round_00{one.best}" / "evaluation.parquet", EvaluationRow)}
        for run, one in zip((plain, lifted), runs, strict=True)
    )
    expected = win_tie_lose([v or 0 for v in lifted_best.values()], [plain_best[key] or 0 for key in lifted_best], 0.1)
    assert duel(runs[1], runs[0]) == expected
    reverse = duel(runs[0], runs[1])
    assert reverse is not None and (reverse.win, reverse.lose) == (expected.lose, expected.win)


def test_no_duel_without_one_truth_on_the_same_prompts(make_run: RunMaker, plain: Path, tmp_path: Path) -> None:
    other_world = edited(plain, tmp_path / "other-world", lambda c: c.update(world={"seed": 1}))
    real = make_run(name="real", gold=False)
    fewer = make_run(name="fewer", num=20)
    runs = read_runs([plain, other_world, real, fewer])
    assert [duel(runs[0], one) for one in runs[1:]] == [None, None, None]
    assert comparison_headline(read_runs([plain, real])).verdict == "Not judged side by side"
    text = " ".join(finding.text for finding in comparison_findings(runs))
    assert "The judges differ: plain by the gold reward" in text
    assert "Judged on other prompts than plain: fewer" in text


def test_it_is_said_that_more_rounds_are_more_to_choose_from(runs: tuple[ComparedRun, ...], tmp_path: Path) -> None:
    plain, lifted = (len(one.run.ledger.rounds) for one in runs)
    assert plain != lifted
    text = " ".join(finding.text for finding in comparison_findings(runs))
    assert f"also chose the best rounds, among {plain} in plain, {lifted} in lifted" in text
    twin = edited(runs[0].run.directory, tmp_path / "twin", lambda c: None)
    assert not any("chose" in finding.text for finding in comparison_findings(read_runs([runs[0].run.directory, twin])))


def test_the_headline_names_the_best_and_asks_whether_it_is_told_apart(runs: tuple[ComparedRun, ...], tmp_path: Path) -> None:
    told = comparison_headline(runs)
    ordered = sorted(runs, key=lambda one: one.best_round.evaluation.margin or 0.0)
    outcome = duel(ordered[1], ordered[0])
    assert outcome is not None
    assert told.text.startswith(f"{ordered[1].name} has the best round: round {ordered[1].best_round.index}")
    assert (told.kind == "good") == (outcome.low > 0)
    twin = edited(runs[0].run.directory, tmp_path / "twin", lambda c: None)
    alike = comparison_headline(read_runs([runs[0].run.directory, twin]))
    assert alike.verdict == "Not told apart on the same prompts"
    assert "win minus lose +0.00" in alike.detail


def test_the_gold_reward_has_the_last_word_where_margins_contradict_it_or_judges_differ(
    make_run: RunMaker, plain: Path, lifted: Path, tmp_path: Path
) -> None:
    """``lifted`` wins prompt by prompt; its ledger is made to say that it lost against SFT, and then that others judged it."""
    runs = read_runs([plain, lifted])
    outcome = duel(runs[1], runs[0])
    assert outcome is not None and outcome.low > 0, "the runs are too alike for this test"

    def changed(name: str, **evaluation: object) -> Path:
        copy = edited(lifted, tmp_path / name, lambda c: None)
        ledger = json.loads((copy / "ledger.json").read_text())
        for entry in ledger["rounds"]:
            entry["evaluation"].update(evaluation, ensemble_mean=entry["evaluation"]["gold"])  # which takes the same round
        (copy / "ledger.json").write_text(json.dumps(ledger))
        return copy

    behind = changed("behind", margin=-0.9, margin_low=-1.0, margin_high=-0.8)
    fooled = changed("fooled", judge="ensemble")
    for other in (behind, fooled):  # paths: their names are the runs'
        told = comparison_headline(read_runs([plain, other]))
        assert told.text.startswith(f"By the gold reward {other.name}'s round ") and "is ahead of plain's round" in told.text
        assert (told.kind, told.verdict) == ("good", "Told apart on the same prompts")
        assert f"Prompt by prompt {other.name} wins {outcome.win:.0%}" in told.detail and "win minus lose +" in told.detail
        assert "lose -0.90" in told.detail or other == fooled
        swapped = comparison_headline(read_runs([other, plain]))
        table = duel(*read_runs([other, plain])[::-1])  # as the page's table asks: the later run about the earlier one
        assert table is not None and f"95% interval {-table.high:+.2f} to {-table.low:+.2f}" in swapped.detail
    real = make_run(name="real", gold=False)
    told = comparison_headline(read_runs([plain, real]))
    assert told.text == "Which run has the best round cannot be said: their judges differ."
    assert "by the gold reward" in told.detail and told.kind == "warn"


def test_config_differences(plain: Path, tmp_path: Path) -> None:
    other = edited(plain, tmp_path / "other", lambda c: c.update(name="x", policy={"kl": {"coef": 0.2}}, seed=None))
    (other / "versions.json").write_text(json.dumps({"rondo": "0.2.0", "python": "3.11.2", "git_commit": None}))
    found = {d.key: d.values for d in config_differences(read_runs([plain, other]))}
    assert found["policy.kl.coef"] == ("–", "0.2")
    assert found["seed"] == ("–", "null")
    assert [key for key in found if "version" in key] == ["version of rondo"]
    assert "name" not in found and "evaluation.tie" not in found


def test_a_flat_config_keeps_lists_and_empty_sections(runs: tuple[ComparedRun, ...], tmp_path: Path) -> None:
    directory = edited(runs[0].run.directory, tmp_path / "flat", lambda c: c.update(a={"b": {"c": [1, 2]}, "d": {}}))
    flat = flat_config(read_runs([runs[0].run.directory, directory])[1].run)
    assert flat["a.b.c"] == [1, 2] and flat["a.d"] == {} and flat["evaluation.tie"] == 0.1


def test_the_table_has_every_round_of_every_run(runs: tuple[ComparedRun, ...]) -> None:
    table = runs_table({one.name: one.run.ledger for one in runs})
    assert [row[:2] for row in table.rows] == [
        ("plain", "SFT"), ("plain", "round 0"), ("plain", "round 1"), ("plain", "round 2"),
        ("lifted", "SFT"), ("lifted", "round 0"), ("lifted", "round 1"),
    ]  # fmt: skip
    single = rounds_table(runs[0].run.ledger)
    assert table.headers == ("run", *single.headers)
    assert [row[1:] for row in table.rows[:4]] == list(single.rows)


def test_the_command_writes_the_page(
    runs: tuple[ComparedRun, ...], plain: Path, lifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(plain), str(lifted)]) == 0
    assert capsys.readouterr().out.strip() == str(plain / "comparison.html")
    page = (plain / "comparison.html").read_text("utf-8")
    assert page.count("★</th>") == 2  # the best round of each
    figures = ["margins", "root-kl", "outcomes", "duels", "gold-gain", "proxy-gain", "training"]
    assert re.findall(r'id="figure-([a-z-]+)"', page) == figures
    assert "<script" not in page and not re.findall("https?://", page)
    assert "rounds.num_rounds" in page
    out = tmp_path / "page.html"
    assert main(["report", str(plain), str(lifted), "--out", str(out)]) == 0
    assert out.read_text("utf-8") == page  # the same files give the same bytes


def test_what_a_run_holds_stays_text(plain: Path, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_run(name="evil", steps=2)
    evil = made.rename(made.with_name("_<script>alert(1)|script>\x1b"))
    config = yaml.safe_load((evil / "config.yaml").read_text()) | {"note": EVIL}
    (evil / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("evaluation.compared_figures._training", lambda runs: None)  # seconds, and has the legend of the others
    page = write_comparison([plain, evil], tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;document.title" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain", "nowhere"], "nowhere is not a directory"),
        (["plain", "empty"], "is not a run directory: it has no ledger.json"),
        (["plain", "link"], "are the same run: name each run once"),
        (["plain", "fitted"], "(of `strength or reward`). Give each of these to `report` alone"),
        (["plain", "lifted", "--out", "empty"], "is a directory: give the file"),
        (["plain", "lifted", "--out", "nowhere/page.html"], "there is no directory"),
        (["plain", "--out", "page.html"], "--out is for a comparison of several runs"),
        (["plain", "torn"], "cannot be read as YAML"),
        (["plain", "listed"], "must hold keys and values, got list"),
        ([str(number) for number in range(10)], "from 2 to 9 runs can be compared"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    plain: Path,
    lifted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "fitted").mkdir()
    (tmp_path / "fitted" / "card.json").write_text("{}")
    for name, target in (("plain", plain), ("lifted", lifted), ("link", plain)):
        (tmp_path / name).symlink_to(target)
    for name, text in (("torn", "a: [\n"), ("listed", "- a\n")):
        if name in words:
            shutil.copytree(plain, tmp_path / name)
            (tmp_path / name / "config.yaml").write_text(text)
    arguments = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_a_tie_is_refused(plain: Path, tmp_path: Path) -> None:
    other = edited(plain, tmp_path / "other", lambda c: c.pop("evaluation"))
    with pytest.raises(UserError, match=r"evaluation\.tie must be a number, got None"):
        write_comparison([other, plain], tmp_path / "page.html")
