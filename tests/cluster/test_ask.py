"""``ask``: the page in a real browser, the terminal, and the profile that both write."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster.ask import Asking, prepare
from cluster.ask_page import AskServer
from cluster.cli import main
from cluster.console import Console
from rm.features import fingerprint
from rm.person import Person
from rm.profiles import read_profile
from tests.browser import CHROMIUM, Browser
from tests.cluster.people import PROMPTS, SIDES, write_feature_model, write_pool

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \x1b[31m[bold]{{ 7 * 7 }}"
CHOICES = ("a", "b", "a", "skip", "b", "undo", "undo", "a", "b", "b")
KEYS = {"a": "a", "b": "b", "skip": "s", "undo": "u", "done": "d"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_feature_model(tmp_path_factory.mktemp("people") / "model")
    rows = [(prompt, *sides) for prompt in PROMPTS for sides in SIDES]
    write_pool(path / "pool.jsonl", [*rows, *((f"{number} {EVIL}", f"{EVIL} one", f"two {EVIL}") for number in range(4))])
    return path


def in_terminal(monkeypatch: pytest.MonkeyPatch, choices: Sequence[str], *arguments: object) -> int:
    """The exit code of ``ask --terminal`` with these answers typed; the input ends after them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{KEYS[choice]}\n" for choice in choices)))
    return main(["ask", *map(str, arguments), "--terminal"])


def read(path: Path) -> tuple[Person, dict[str, Any]]:
    """The person of a profile, and all else that is in it but the name."""
    content: dict[str, Any] = json.loads(path.read_text())
    return read_profile(path).person, {k: v for k, v in content.items() if k not in ("name", "weights", "covariance")}


class Page:
    """``python -m cluster ask`` in a process of its own, and the link that it says."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "cluster", "ask", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        said, self.link = "", ""
        while not self.link:
            line = self.process.stdout.readline()
            assert line, said
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line):
                self.link = found[0]

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=240)


def texts(browser: Browser) -> dict[str, str]:
    found: dict[str, str] = browser.evaluate(
        "Object.fromEntries(['number', 'prompt', 'text-a', 'text-b', 'answers', 'accuracy', 'trouble'].map("
        "(id) => [id, document.getElementById(id).textContent]))"
    )
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)")
def test_a_browser_and_a_terminal_write_the_same_profile(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = tmp_path / "page.json", tmp_path / "terminal.json"
    with Page(model, "--name", "Ann", "--out", theirs) as page, Browser(tmp_path / "browser") as browser:
        browser.open(page.link)
        browser.wait_for("!busy")
        assert texts(browser)["answers"] == "0 answers" and not theirs.exists()
        for place, choice in enumerate(CHOICES):
            before = browser.evaluate("state.number")
            if place % 2:
                browser.click(f"[data-choice={choice}]")
            else:
                browser.press(KEYS[choice])
            browser.wait_for(f"!busy && state.number === {before + (-1 if choice == 'undo' else 1)}")
        shown = texts(browser)
        assert shown["number"] == "7. Which do you prefer?" and shown["trouble"] == ""
        assert shown["answers"] == "6 answers" and re.fullmatch(r"\d\d%", shown["accuracy"])
        assert read_profile(theirs).num_answers == 6  # written after every answer, not at the end
        browser.press("d")
        browser.wait_for("state.finished && !document.getElementById('finished').hidden")
        assert "After 6 answers" in browser.evaluate("document.getElementById('summary').textContent")
        assert page.process.wait(240) == 0
        assert browser.evaluate("document.title") == "Ann · Rondo" and browser.errors == []
    assert in_terminal(monkeypatch, (*CHOICES, "done"), model, "--out", ours) == 0
    (page_person, page_rest), (terminal_person, terminal_rest) = read(theirs), read(ours)
    assert page_rest == terminal_rest and terminal_rest["num_answers"] == 6
    torch.testing.assert_close(page_person.weights, terminal_person.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(page_person.covariance, terminal_person.covariance, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["page.json", "terminal.json"]  # no answers anywhere


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)")
def test_the_page_looks_right_and_texts_are_only_texts(model: Path, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool.jsonl", [(f"{EVIL} {'very ' * 40}long", f"{EVIL}\n\nx{'y' * 300}", f"two {EVIL}")])
    interview, profile = prepare(Asking(model, "me", pairs=pool, out=tmp_path / "p.json"), Console())
    with AskServer(interview, "me", str(profile), "", 0) as server, Browser(tmp_path / "browser") as browser:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        browser.open(server.link)
        browser.wait_for("!busy")
        shown = texts(browser)
        assert {shown["text-a"], shown["text-b"]} == {f"{EVIL}\n\nx{'y' * 300}", f"two {EVIL}"} and shown["prompt"].startswith(
            EVIL
        )
        assert browser.evaluate("[document.title, document.images.length, document.scripts.length]") == ["me · Rondo", 0, 1]
        loaded = browser.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert set(loaded) <= {server.link + "state", f"http://127.0.0.1:{server.server_port}/favicon.ico"}
        shades = {}
        for name, dark, width, height in (("light", False, 1280, 900), ("dark", True, 1280, 900), ("phone", False, 390, 844)):
            browser.look(tmp_path / f"{name}.png", dark, width, height)
            assert browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0, name
            boxes = browser.evaluate(
                "[...document.querySelectorAll('button')].map((b) => b.getBoundingClientRect()).map((r) => [r.height, r.bottom])"
            )
            assert all(tall >= 44 and bottom <= height for tall, bottom in boxes), name  # big enough to touch, always in sight
            with Image.open(tmp_path / f"{name}.png") as image:
                shades[name] = image.convert("L").getpixel((4, 4))
                assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
        assert shades["light"] > 200 and shades["dark"] < 60
        browser.press("a")  # the only pair: the pool is used up
        browser.wait_for("state.finished")
        assert "Every pair of the pool was shown." in browser.evaluate("document.getElementById('summary').textContent")
        serving.join(240)
        assert not serving.is_alive() and browser.errors == []


def test_it_is_stopped_by_ctrl_c_with_every_answer_kept_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, stopped, whole = tmp_path / "answers.jsonl", tmp_path / "stopped.json", tmp_path / "whole.json"
    in_terminal(monkeypatch, ("a",), model, "--out", stopped, "--answers", answers)
    in_terminal(monkeypatch, ("b", "undo", "b", "a"), model, "--out", stopped, "--answers", answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 3 and {row["model"] for row in rows} == {fingerprint(model)}
    with Page(model, "--out", stopped, "--answers", answers) as page:
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(240) == 130
    in_terminal(monkeypatch, ("b", "b", "undo"), model, "--out", stopped, "--answers", answers)
    in_terminal(monkeypatch, ("a", "b", "a", "b"), model, "--out", whole, "--answers", tmp_path / "whole.jsonl")
    assert answers.read_text() == (tmp_path / "whole.jsonl").read_text()
    ours, theirs = read_profile(stopped), read_profile(whole)
    assert ours.num_answers == theirs.num_answers == 4
    assert float((ours.person.weights - theirs.person.weights).abs().max()) < 1e-6
    asked = [
        (row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in map(json.loads, answers.read_text().splitlines())
    ]
    assert len(set(asked)) == 4


def test_without_answers_it_goes_on_from_the_profile(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "p.json"
    in_terminal(monkeypatch, ("a", "b", "a"), model, "--out", profile)
    before = read_profile(profile)
    in_terminal(monkeypatch, ("b",), model, "--out", profile)
    after = read_profile(profile)
    assert (before.num_answers, after.num_answers) == (3, 4)
    assert float(after.person.covariance.det()) < float(before.person.covariance.det())


def test_the_default_profile_lies_beside_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(model, tmp_path / "model"))
    assert in_terminal(monkeypatch, ("a",), model, "--name", "Zoe B") == 0
    assert read_profile(model / "profiles" / "Zoe B.json", fingerprint(model)).name == "Zoe B"


def test_texts_do_not_steer_the_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = write_pool(tmp_path / "pool.jsonl", [(EVIL, f"{EVIL}\nsecond line", "two")])
    assert in_terminal(monkeypatch, ("undo", "a"), model, "--out", tmp_path / "p.json", "--pairs", pool) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"\x1b[31m[bold]" in said and "│ second line" in said
    assert "There is no answer to undo." in said and "Every pair of the pool was shown." in said


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no pair of two different responses"),
        ('{"prompt": "x", "a": "same", "b": "same"}', "holds no pair of two different responses"),
        ("{", "line 1: no JSON"),
        ('\n{"prompt": "x", "a": "y"}', "line 2: got"),
        ('{"prompt": "x", "a": "y", "b": 3}', "line 1: prompt, a and b must be texts that are not empty"),
        ('{"prompt": "x", "a": "y", "b": "\\ud800"}', "line 1: prompt, a and b must be texts that are not empty"),
        ('{"prompt": "x", "a": "y", "b": " "}', "line 1: prompt, a and b must be texts that are not empty"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_bad_pool_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, words: str) -> None:
    (tmp_path / "pool.jsonl").write_text(lines, "latin-1")
    assert main(["ask", str(model), "--terminal", "--pairs", str(tmp_path / "pool.jsonl")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_bad_input_is_said_before_anything_is_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_feature_model(tmp_path / "other", d=5, seed=9)
    write_pool(other / "pool.jsonl")
    like = write_feature_model(tmp_path / "like", seed=9)
    write_pool(like / "pool.jsonl")
    profile, answers = tmp_path / "p.json", tmp_path / "answers.jsonl"
    in_terminal(monkeypatch, ("a", "b"), model, "--out", profile, "--answers", answers)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(answers.read_text().replace(fingerprint(model), fingerprint(other)))
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[object, ...], str]] = [
        ((other, "--out", profile), "is a profile of d = 3 and the model has d = 5"),
        ((like, "--out", profile), "is a profile of the model"),
        ((model, "--answers", foreign), "holds answers of the model"),
        ((model, "--out", profile, "--name", "ann"), "is the profile of 'me', got 'ann'"),
        ((model, "--out", profile, "--answers", tmp_path / "new.jsonl"), "was fitted to 2, some of which were not kept"),
        ((model, "--answers", tmp_path / "answers.txt"), "expected a name that ends in .jsonl"),
        ((model, "--l2", "0"), "--l2 is 0: a number above 0 is expected"),
        ((model, "--name", "../x"), "a person's name has letters"),
        ((model, "--port", "80"), "--terminal asks without a page"),
        ((tmp_path / "empty",), "holds no feature model"),
        ((model, "--pairs", tmp_path / "none.jsonl"), "none.jsonl, cannot be read"),
    ]
    capsys.readouterr()
    for arguments, words in cases:
        assert main(["ask", *map(str, arguments), "--terminal"]) == 2, words
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1, said.err
        assert "Which response" not in said.out
