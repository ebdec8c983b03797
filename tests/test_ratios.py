"""`make bench`: how turns are taken, what the rows and the tables say, and each comparison at a size that teaches nothing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.__main__ import ROOT, comparison, here, write_pages
from benchmarks.ratios import frame, trl_environment
from benchmarks.ratios.catalogue import CASES, NUMBERS, Case
from benchmarks.ratios.child import MARK, Child
from benchmarks.ratios.frame import Took, Turns, take_turns
from benchmarks.ratios.metarm_steps import Steps
from benchmarks.ratios.ppo_steps import SHAPES, WORDS, save_endless, shares
from benchmarks.ratios.reward_epochs import work
from benchmarks.ratios.rows import RESULTS, Settings, read, row, write
from benchmarks.ratios.scenery import reward_model
from benchmarks.ratios.table import BEGIN, END, NOT_RUN, aim_of, amount, cells, met, put, shown, table
from benchmarks.ratios.trl_environment import NotMade, trl_python
from sandbox.tokenizer import SPECIALS
from tokens.records import Pair

TURNS = Turns({"ours": (Took(1.0, 0.5), Took(4.0, 0.5), Took(3.0, 0.5)), "other": (Took(2.0, 1.0),) * 3}, (0.5, 2.5, 1.0))
CASE = Case("C1", "ours", "the other", "a half", 0.6)


def found(**changes: Any) -> dict[str, Any]:
    """A stored row."""
    plain = {
        "ours": 0.5, "alternative": 1.0, "ratio": 0.5, "ratio_min": 0.4, "ratio_max": 0.75, "cpu_ratio": 0.45, "limit": 0.25,
        "from_limit": 2.0, "equality": "to 1e-6", "repetitions": 7, "threads": 2, "load": [0.5, 1.0], "figures": {},
        "hardware": {"cpu": "a processor", "cores": 2}, "when": "2026-11-27T10:00:00+00:00",
    }  # fmt: skip
    return plain | changes


def test_turns_are_interleaved_their_order_is_turned_round_and_the_first_of_each_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order = itertools.count(), list[str]()
    monkeypatch.setattr(frame.time, "perf_counter", lambda: float(next(clock)))
    ways = {name: (lambda name=name: order.append(name)) for name in "abc"}
    turns = take_turns(ways, 3, clock=lambda: 0.0, prepare=lambda name: order.append(name.upper()))
    assert "".join(order) == "CcBbAa" + "AaBbCc" + "CcBbAa" + "AaBbCc"
    assert {name: len(took) for name, took in turns.took.items()} == {"a": 3, "b": 3, "c": 3} and len(turns.load) == 3
    with pytest.raises(ValueError, match="got 3 and 0"):
        take_turns(ways, 0)


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    turns = Turns({"ours": (Took(1, 1), Took(2, 1), Took(9, 1)), "other": (Took(1, 2), Took(8, 2), Took(3, 2))})
    spread = turns.ratio("ours", "other")
    assert (spread.middle, spread.least, spread.most, spread.cpu) == (1.0, 0.25, 3.0, 0.5)
    assert turns.seconds("ours") / turns.seconds("other") == pytest.approx(2 / 3), "what it would be"


def test_cpu_time_that_was_too_short_to_be_counted_gives_no_ratio() -> None:
    turns = Turns({"ours": (Took(1, 1), Took(1, 1)), "other": (Took(1, 1), Took(1, 0.0))})
    assert turns.ratio("ours", "other").cpu is None


def test_a_row_has_what_it_was_measured_on_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    settings, path = Settings(3, 2), tmp_path / "bench.jsonl"
    first = row(("C1", "ours"), TURNS, ("ours", "other"), settings, 0.5, "equal", mib=3)
    assert first.ratio == 1.5 and first.from_limit == 3.0 and (first.ratio_min, first.ratio_max) == (0.5, 2.0)
    write([first], path)
    write([row(("C1", "ours"), TURNS, ("other", "ours"), settings, None, "equal")], path)
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert {
        "id",
        "ours",
        "alternative",
        "ratio",
        "ratio_min",
        "ratio_max",
        "limit",
        "equality",
        "versions",
        "hardware",
    } <= stored[0].keys()
    assert stored[0]["load"] == [0.5, 2.5, 1.0] and stored[0]["figures"] == {"mib": 3} and stored[0]["from_limit"] == 3.0
    assert stored[1]["from_limit"] is None
    assert read(path) == {("C1", "ours"): stored[1]} and read(tmp_path / "none.jsonl") == {}


def test_an_aim_is_a_ratio_or_a_multiple_of_the_limit_or_seconds() -> None:
    assert met(CASE, found()) == "yes" and met(CASE, found(ratio=0.9)) == "**no**, 1.50 ×"
    of_limit = Case("C1", "ours", "the other", "a half", 1.5, of_limit=True)
    assert met(of_limit, found()) == "**no**, 1.33 ×" and aim_of(of_limit) == "≤ 1.5 × limit"
    at_most = Case("C1", "ours", "the other", "none", aim_seconds=0.1)
    assert met(at_most, found()) == "**no**, 5.00 ×" and aim_of(at_most) == "≤ 100 ms"
    assert met(Case("C1", "ours", "the other", "none"), found()) == aim_of(Case("C1", "o", "t", "n")) == "-"


def test_what_has_no_row_reads_not_run_and_what_has_one_is_in_the_table() -> None:
    missing = Case("C2", "more", "nothing", "none", 0.1)
    lines = table({("C1", "ours"): found()}, [CASE, missing]).splitlines()
    assert lines[2] == "| C1 | ours | the other | 500 ms | 1 s | 0.5 (0.4 to 0.75) | 0.45 | 0.25 | 2 | ≤ 0.6 | yes |"
    assert lines[3].startswith("| C2 | more | nothing | not run | ") and lines[3].endswith("| ≤ 0.1 |  |")
    assert NOT_RUN in shown({}, [CASE]) and "yes" in shown({("C1", "ours"): found()}, [CASE])
    assert cells(CASE, {("C1", "ours"): found(cpu_ratio=None, limit=None, from_limit=None)})[6:9] == ("-", "-", "-")


def test_amounts_are_read_in_the_unit_that_reads_best() -> None:
    assert [amount(x, "s") for x in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 µs"] and amount(3.0, "MiB") == "3 MiB"


def test_a_page_keeps_what_stands_outside_its_markers() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nbetween\n{BEGIN}\n{END}\nafter\n"
    assert put(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nbetween\n{BEGIN}\n{END}\nafter\n"
    assert put(page, "new", 1) == f"before\n{BEGIN}\nold\n{END}\nbetween\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="no pair of markers number 2"):
        put(page, "new", 2)


def test_every_case_belongs_to_a_comparison_and_has_a_name_of_its_own() -> None:
    assert len({case.place for case in CASES}) == len(CASES)
    assert len({comparison(number).__module__ for number in NUMBERS}) == len(NUMBERS), "each has its own"
    with pytest.raises(ValueError, match="there is no comparison C0"):
        comparison("C0")


def test_readme_and_page_are_what_the_committed_rows_make(tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("README.md", "benchmarks.md")]
    originals = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
    for copy, original in zip(copies, originals, strict=True):
        copy.write_text(original.read_text())
    write_pages(RESULTS, *copies)
    for copy, original in zip(copies, originals, strict=True):
        assert copy.read_text() == original.read_text(), f"{original.name} is not of the rows: python -m benchmarks --page"
    assert set(read()) <= {case.place for case in CASES}, "a row of a case that is none any more"


MANY = {("C11", f"{number} rollout actors") for number in (16, 64)}
"""What a test has no room for."""


def rows_of(number: str, folder: Path) -> None:
    """Measure it in the small; there must be a row of each case."""
    here(number, Settings(1, 1, small=True), folder / "bench.jsonl")
    assert set(read(folder / "bench.jsonl")) == {case.place for case in CASES if case.id == number} - MANY


@pytest.mark.parametrize("number", ["C1", "C2"])
def test_a_comparison_gives_a_row_for_each_of_its_cases(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_of(number, tmp_path)
    assert f"{number} " in capsys.readouterr().out


OTHERS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


@pytest.mark.slow
@OTHERS
@pytest.mark.parametrize("number", ["C3", "C4", "C5", "C6", "C8", "C10", "C11"])
def test_the_longer_comparisons_too(number: str, tmp_path: Path) -> None:
    rows_of(number, tmp_path)


@pytest.mark.slow
@OTHERS
def test_a_ppo_step_beside_trl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        made = trl_python()
    except NotMade as error:
        pytest.skip(f"needs a package index: {error}")
    monkeypatch.setattr(trl_environment, "_run", lambda *_: pytest.fail("it is there already"))
    assert trl_python() == made
    rows_of("C7", tmp_path)
    figures = read(tmp_path / "bench.jsonl")["C7", "PPO step"]["figures"]
    assert sum(share for name, share in figures.items() if name.endswith("_share")) == pytest.approx(1, abs=0.01)


def test_without_a_package_index_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "Collecting trl\nERROR: No matching distribution found for trl==1.12.0\n")
    monkeypatch.setattr(trl_environment.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(NotMade, match=r"could not make an environment: ERROR: No matching distribution .* leave C7 out"):
        trl_python()
    assert trl_environment.cache() == tmp_path / "rondo" / "trl-1.12.0"


def test_shares_of_a_step_are_of_its_median_and_the_update_is_cut_in_two() -> None:
    slow = {"sample": 2.0, "score": 1.0, "policy": 6.0, "sync": 0.5, "record": 0.5}
    odd = {"sample": 9.0, "score": 9.0, "policy": 6.0, "sync": 9.0, "record": 9.0}
    assert shares([slow, odd, slow], 0.25) == {
        "sample_share": 0.2,
        "score_share": 0.1,
        "logprobs_share": 0.15,
        "learn_share": 0.45,
        "sync_share": 0.05,
        "record_share": 0.05,
    }


def test_the_model_of_the_ppo_steps_never_draws_a_special_token(tmp_path: Path) -> None:
    save_endless(tmp_path, SHAPES[True])
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.randint(len(SPECIALS), len(SPECIALS) + WORDS, (4, 24))).logits.log_softmax(-1)
    assert logprobs.shape[-1] == len(SPECIALS) + WORDS
    assert logprobs[..., : len(SPECIALS)].max() < -100 and logprobs[..., len(SPECIALS) :].exp().max() < 0.5


def test_a_child_answers_each_request_and_one_that_ended_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    twice = f"import sys\nfor line in sys.stdin: print('chatter'); print('{MARK}' + line.strip() * 2, flush=True)"
    child = Child("a child", [sys.executable, "-c", twice], os.environ)
    assert [child.ask(1), child.ask(23)] == [11, 2323]
    child.end()
    assert child.process.returncode == 0
    ended = Child("a child", [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"], os.environ)
    with pytest.raises(RuntimeError, match="a child ended with status 3"):
        ended.ask(None)
    ended.end()


def test_a_metarm_step_and_a_deep_copy_leave_one_gradient_and_theta_as_it_was() -> None:
    steps = Steps(reward_model(small=True), 8, 16)
    before = [p.detach().clone() for p in steps.theta]
    assert steps.difference() < 1e-5
    for way in steps.ways().values():
        way()
    assert all(torch.equal(a, b) for a, b in zip(before, steps.theta, strict=True)), "the learning rate is 0"


def test_tokens_that_ours_needs_and_computes_by_hand() -> None:
    def of(prompt: int, *lengths: tuple[int, int]) -> list[Pair]:
        return [Pair(f"p{i}", (3 + i,) * prompt, (20,) * a, (21,) * b) for i, (a, b) in enumerate(lengths)]

    assert work(of(6, (1, 2), (3, 1)), 2) == (9 + 10, 9 + 10), "a prompt before both of its responses, a pair to a pass"
    assert work(of(6, (1, 2), (3, 1)), 4) == (9 + 10, 10 + 10), "both pairs in one pass, as wide as the wider"
    assert work(of(1, (8, 8), (8, 8), (4, 4)), 2) == (17 + 17 + 9, 4 * 9 + 2 * 5), "too little to save; the last step has a pair"
