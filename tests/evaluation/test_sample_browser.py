"""The samples in a run's page: what is shown is what the files hold, and in a real browser it can be sorted and searched."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.records import EvaluationRow, MetaRow, read_rows
from evaluation.run import Run, read_run
from evaluation.sample_browser import MAX_BYTES, MAX_PROMPTS, MAX_TEXT, sample_browser, shifted_prompts, verdict_of
from tests.browser import CHROMIUM, Browser
from tests.evaluation.made_up import EVIL


@pytest.fixture(scope="module")
def run(full_run: Path) -> Run:
    return read_run(full_run)


@pytest.fixture(scope="module")
def page(full_run: Path) -> str:
    return (full_run / "report.html").read_text("utf-8")


def row(sample: int, scores: tuple[float, ...], prompt: str = "p", text: str = "so") -> MetaRow:
    return MetaRow(prompt, prompt, sample, text, (5,), (-0.5,), 0, True, None, scores[0], tuple(range(len(scores))), scores, 0.5)


def test_disagreement_by_hand() -> None:
    (prompt,) = shifted_prompts([row(0, (0.0, 2.0)), row(1, (4.0, 4.0))])  # std 1 and 0; means 1 and 4
    assert (prompt.disagreement, prompt.score, prompt.gold) == (0.5, 2.5, 0.5)
    assert [(r.who, r.mean, r.spread) for r in prompt.responses] == [("sample 1", 4.0, 0.0), ("sample 0", 1.0, 1.0)]
    assert prompt.responses[0].members == (("r_k", 4.0), ("member 1", 4.0))


def test_disagreement_is_numpys(run: Run) -> None:
    for prompt in shifted_prompts(run.meta_rows[1]):
        rows = [r for r in run.meta_rows[1] if r.prompt == prompt.prompt]
        assert prompt.disagreement == pytest.approx(np.array([r.member_scores for r in rows]).std(axis=1).mean())
        assert len(prompt.responses) == 5


def test_an_old_file_shows_what_it_has() -> None:
    (prompt,) = shifted_prompts([replace(row(0, (0.25, 1.0)), members=(), member_scores=(), gold=None, score_vanilla=-1.0)])
    assert (prompt.disagreement, prompt.score, prompt.gold) == (None, 0.25, None)
    assert prompt.responses[0].members == (("r_k", 0.25), ("vanilla", -1.0))


@pytest.mark.parametrize(
    ("ours", "theirs", "kept", "by_gold", "expected"),
    [
        (0.5, 0.1, None, True, (0.4, "win")),
        (0.1, 0.2, None, True, (-0.1, "tie")),
        (0.1, 0.5, None, True, (-0.4, "lose")),
        (0.5, 0.1, -2.0, True, (-2.0, "lose")),  # what was kept when it was judged counts
        (0.5, 0.1, None, False, (None, "")),  # an ensemble judged, and what it said of SFT is not known
        (None, None, 0.05, False, (0.05, "tie")),
    ],
)
def test_verdict(
    run: Run, ours: float | None, theirs: float | None, kept: float | None, by_gold: bool, expected: tuple[float | None, str]
) -> None:
    one = replace(run.round_rows[0][0], gold=ours, over_sft=kept)
    gap, verdict = verdict_of(one, replace(run.start_rows[0], gold=theirs), 0.1000001, by_gold)
    assert (gap, verdict) == (pytest.approx(expected[0]), expected[1])


def test_the_verdicts_add_up_to_the_ledgers(run: Run) -> None:
    for group in sample_browser(run).groups:
        if group.judged:
            evaluation = run.ledger.rounds[int(group.name.removeprefix("judged-"))].evaluation
            found = [prompt.verdict for prompt in group.prompts]
            assert group.total == len(found) == 24
            assert found.count("win") / 24 == pytest.approx(evaluation.win)
            assert found.count("lose") / 24 == pytest.approx(evaluation.lose)


def test_many_long_prompts_are_cut_to_a_page(run: Run) -> None:
    long = [row(j, (0.01 * i, 0.0), f"p{i}", "y" * 3000) for i in range(300) for j in range(5)]
    browser = sample_browser(replace(run, meta_rows=(long, *run.meta_rows[1:])))  # type: ignore[arg-type]
    (group,) = [group for group in browser.groups if group.name == "shifted-0"]
    assert (group.total, 2 <= len(group.prompts) <= MAX_PROMPTS) == (300, True)
    assert [group.prompts[0].prompt, group.prompts[-1].prompt] == ["p299", "p0"]  # the most disputed, and the least
    assert {len(r.text) for p in group.prompts for r in p.responses} == {MAX_TEXT}
    assert group.prompts[0].responses[0].left_out == 3000 - MAX_TEXT
    shown = sum(len(r.text) for g in browser.groups for p in g.prompts for r in p.responses)
    assert shown < MAX_BYTES


def test_the_page_admits_its_script_and_no_other(page: str) -> None:
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src 'sha256-{digest}'" in html.unescape(policy)
    assert "unsafe-inline" not in policy.split("script-src")[1]
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval|fetch|import|https?:", scripts[0])


@pytest.fixture(scope="module")
def browser(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (chromium, chromium-browser, google-chrome)")
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        opened.open((full_run / "report.html").resolve().as_uri())
        yield opened


def give(browser: Browser, name: str, value: str) -> list[str]:
    """Set a control; the prompts that are then seen, in order."""
    browser.evaluate(
        f"(() => {{ const one = document.getElementById('samples-{name}'); one.value = {value!r}; "
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change')); })()"
    )
    found: list[str] = browser.evaluate(
        "[...document.querySelectorAll('.group:not([hidden]) .sample:not([hidden])')].map(one => "
        "one.querySelector('summary').firstChild.textContent.trim())"
    )
    return found


def test_sorting_and_searching_in_a_browser(browser: Browser, run: Run, full_run: Path) -> None:
    prompts = {p.prompt: p for p in shifted_prompts(read_rows(full_run / "rounds/round_002/meta_rollouts.parquet", MetaRow))}
    by_disagreement = sorted(prompts, key=lambda name: -(prompts[name].disagreement or 0))
    assert give(browser, "sort", "disagreement down") == by_disagreement
    assert give(browser, "sort", "score up") == sorted(prompts, key=lambda name: prompts[name].score)
    assert give(browser, "low", "0.2") == sorted(
        (name for name in prompts if prompts[name].score >= 0.2), key=lambda name: prompts[name].score
    )
    assert give(browser, "low", "")[0] == min(prompts, key=lambda name: prompts[name].score)
    assert give(browser, "text", "BREAD NUMBER 17?") == ["How do I keep bread number 17?"]
    assert give(browser, "text", "") != []
    assert give(browser, "disagreement", "99") == []
    assert give(browser, "disagreement", "") != []
    assert browser.evaluate("document.getElementById('samples-count').textContent") == "40 of 40 prompts fit; the round has 40"
    assert browser.evaluate("document.querySelector('label.of-judged').hidden") is True


def test_the_evaluation_and_its_verdicts_in_a_browser(browser: Browser, full_run: Path) -> None:
    ours = {r.prompt_id: r for r in read_rows(full_run / "rounds/round_000/evaluation.parquet", EvaluationRow)}
    sft = {r.prompt_id: r for r in read_rows(full_run / "start/evaluation.parquet", EvaluationRow)}
    gaps = {r.prompt: (r.gold or 0) - (sft[key].gold or 0) for key, r in ours.items()}
    give(browser, "group", "judged-0")
    assert give(browser, "sort", "gain up") == sorted(gaps, key=lambda prompt: gaps[prompt])
    assert set(give(browser, "verdict", "lose")) == {prompt for prompt, gap in gaps.items() if -gap > 0.1}
    give(browser, "verdict", "")
    assert give(browser, "group", "shifted-2") != []


def test_what_a_model_wrote_runs_nowhere(browser: Browser) -> None:
    assert give(browser, "text", "document.title='owned'") == ["How do I keep bread number 0?"]
    shown = browser.evaluate(
        "(() => { const one = document.querySelector('.group:not([hidden]) .sample:not([hidden])'); one.open = true; "
        "return one.querySelector('.response p').textContent; })()"
    )
    assert EVIL in shown
    assert browser.evaluate("document.title") == "made-up · Rondo"
    assert browser.errors == []
    give(browser, "text", "")


@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_a_phone_and_a_desk(browser: Browser, tmp_path: Path, width: int) -> None:
    browser.evaluate("document.querySelectorAll('.sample').forEach(one => { one.open = true; })")
    browser.look(tmp_path / "seen.png", dark=True, width=width, height=900)
    assert browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    cut = browser.evaluate(
        "[...document.querySelectorAll('.controls label, .controls output, .response header')]"
        ".filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"
    )
    assert cut == []


def test_the_numbers_of_a_page_stay_below_a_few_megabytes(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(num_rounds=12, num=300, steps=1))
    groups = sample_browser(run).groups
    assert len(groups) == 16  # eight rounds of twelve
    assert {group.total for group in groups if group.judged} == {300}
    assert sum(len(r.text) + 700 for g in groups for p in g.prompts for r in p.responses) < 1.2 * MAX_BYTES
