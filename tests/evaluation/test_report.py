import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.report import pick_samples, write_report
from evaluation.run import read_run
from tokens.errors import UserError

LOADING_TAGS = {"script", "link", "iframe", "frame", "object", "embed", "base", "img", "image", "video", "audio", "form"}
LOADING_ATTRIBUTES = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "formaction", "background", "ping"}


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its attributes, its text, as one pass over the file."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.styles = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_style = tag == "style"
        for name, value in attrs:
            if name in LOADING_ATTRIBUTES:
                self.references.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "style":
                self.styles += f"{value}\n"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def html(full_run: Path) -> str:
    return (full_run / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def single_run(make_run) -> Path:  # type: ignore[no-untyped-def]
    """Real data: no gold, no vanilla model to compare with, one round of one step."""
    run = make_run(num_rounds=1, gold=False, vanilla=False, steps=1)
    write_report(run)
    return Path(run)


def test_it_loads_nothing(page: Page, html: str) -> None:
    """And runs no script but its own: tests/evaluation/test_sample_browser.py."""
    assert page.tags & LOADING_TAGS == {"script"}
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.handlers
    assert "@import" not in page.styles
    assert set(re.findall(r"url\((.)", page.styles)) <= {"#"}
    assert "default-src 'none'" in html
    assert re.findall(r"https?://", html) == []


def test_what_a_model_wrote_stays_text(page: Page, html: str) -> None:
    from_conftest = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quotes\" $x^2$"
    assert from_conftest in page.text
    assert html.count("<script") == 1
    assert "# <b>not bold</b>" in page.text  # the config too


def test_the_page_says_what_the_ledger_says(page: Page, full_run: Path) -> None:
    raw = json.loads((full_run / "ledger.json").read_text("utf-8"))
    last = raw["rounds"][2]["evaluation"]
    assert f"wins {last['win']:.0%} and loses {last['lose']:.0%} against SFT under the gold reward" in page.text
    assert f"{last['margin']:+.2f}, 95% interval {last['margin_low']:+.2f} to {last['margin_high']:+.2f}" in page.text
    for part in raw["rounds"]:
        assert f"{part['evaluation']['proxy']:.2f}" in page.text
    assert "Collapse" in page.text
    assert "reward.start" in page.text
    assert "round 0: 0.05; round 1: 0.06" in page.text  # a choice that changed between rounds
    meta = raw["rounds"][2]["reward"]
    assert "MetaRM in round 2" in page.text and "J alone rises by inflation" in page.text
    for key in ("J_heldout_before", "J_heldout_after", "J_heldout", "spread_heldout_before", "spread_heldout_after"):
        assert f"{meta[key]:.3f}" in page.text
    assert f"{meta['duplicate_share']:.1%}" in page.text
    assert "J, kept weights" in page.text
    assert "2031-05-03" in page.text


def test_a_ledger_of_before_the_held_out_numbers_is_still_read(make_run) -> None:  # type: ignore[no-untyped-def]
    run = make_run(num_rounds=1, num=8, steps=1)
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    kept = ("loss", "accuracy", "validation_accuracy", "J_before", "J_after", "displacement", "alignment_cos")
    ledger["rounds"][0]["reward"] = {key: ledger["rounds"][0]["reward"][key] for key in kept}
    (run / "ledger.json").write_text(json.dumps(ledger), "utf-8")
    text = Page(write_report(run).read_text("utf-8")).text
    assert "‖θ′ − θ‖" in text and "kept weights" not in text


def test_samples_are_picked_by_the_rule(full_run: Path) -> None:
    run = read_run(full_run)
    samples = pick_samples(run)
    gold = [{row.prompt_id: row.gold or 0.0 for row in rows} for rows in (run.start_rows, run.round_rows[-1])]
    gains = sorted(gold[1][key] - gold[0][key] for key in gold[0])
    assert [sample.why.split(":")[0] for sample in samples] == ["most gained"] * 2 + ["typical"] * 2 + ["most lost"] * 2
    assert samples[0].why == f"most gained: {gains[-1]:+.2f}"
    assert samples[-1].why == f"most lost: {gains[0]:+.2f}"
    assert [response.who for response in samples[0].responses] == ["SFT", "round 0", "round 1", "round 2"]


def test_real_data_has_no_gold_and_says_who_judged(single_run: Path) -> None:
    page = Page((single_run / "report.html").read_text("utf-8"))
    assert "under the reward ensemble" in page.text
    assert "can be fooled along with it" in page.text
    assert "gold reward" not in page.text
    assert "RM acc." not in page.text


def test_the_same_files_give_the_same_bytes(single_run: Path) -> None:
    before = (single_run / "report.html").read_bytes()
    write_report(single_run)
    assert (single_run / "report.html").read_bytes() == before


def test_an_earlier_report_survives_a_failure(single_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(single_run, tmp_path / "run"))
    (run / "report.html").write_text("earlier")

    def full(self: Path, content: bytes) -> int:
        self.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.report.render", lambda run: "new")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == b"earlier"
    assert not [path for path in run.iterdir() if path.suffix == ".tmp"]


def test_it_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
