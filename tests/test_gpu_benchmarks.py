"""`make bench-gpu`: counts by hand, what the budget leaves out, what rows and tables say, and each case in the small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import engine, rounds
from benchmarks.gpu.__main__ import BEGIN, PAGE, main, measure, missing, run, write_page
from benchmarks.gpu.catalogue import NUMBERS, PARTS, Part
from benchmarks.gpu.device import Device, Measured, Roofs, datasheet_flops, find_device, measure_roofs
from benchmarks.gpu.mismatch import compared
from benchmarks.gpu.models import SHAPES, Shape, critic, forward_flops, language_model, multiplying, training_flops
from benchmarks.gpu.reward import padded_tokens
from benchmarks.gpu.rows import RESULTS, Row, Scene, Settings, append, floor_row, read, row, stored
from benchmarks.gpu.table import HEADS, NOT_RUN, cells, earlier, shown, table
from benchmarks.ratios.frame import Took, Turns
from evaluation.timeline import DRIVER, Span
from tokens.records import Pair

ROOFS = Roofs(500e12, 4e12, 50e9, 40e9)
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 989e12, ROOFS)
CPU = Scene(Device("cpu", "CPU", None, ROOFS), Settings(1, small=True))
FOUND = Measured(
    Turns({"ours": (Took(1.0, 1), Took(3.0, 1), Took(2.0, 1)), "other": (Took(4.0, 1),) * 3}), {"ours": 2.5, "other": 5.0}
)
PLACE = ("G1", "a step")
WITHOUT_VLLM = tuple(part for part in PARTS if part.needs == "torch")
FIRST = {part.ids[0]: part for part in reversed(WITHOUT_VLLM)}
"""The first part of each id."""


def part(name: str, seconds: float, *rows: Row, **changes: Any) -> Part:
    return replace(Part((("G1", name),), "another", seconds, lambda scene: iter(rows)), **changes)


def test_weights_that_multiply_by_hand_and_on_the_model() -> None:
    by_hand = 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert SHAPES["tiny"] == Shape(64, 96, 2, 2, 1, 512) and SHAPES["tiny"].backbone == by_hand
    assert multiplying(language_model("tiny", "cpu")) == by_hand + 64 * 512 == SHAPES["tiny"].with_logits
    assert multiplying(critic("tiny", "cpu")) == by_hand + 64 == SHAPES["tiny"].with_score
    assert SHAPES["1B"].with_score == 973148160, "as the rows that were measured before have it"


def test_sizes_are_what_their_names_say() -> None:
    for name in ("0.1B", "0.5B", "1B", "3B", "8B"):
        whole = SHAPES[name].with_logits + SHAPES[name].hidden * SHAPES[name].vocabulary
        assert whole / 1e9 == pytest.approx(float(name[:-1]), rel=0.35), name


def test_flops_by_hand() -> None:
    assert training_flops(10, 7) == 420 and training_flops(10, 7, frozen=True) == 280 and forward_flops(10, 7) == 140


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 2060", None),
    ],
)  # fmt: skip
def test_the_datasheet_is_found_by_the_name(name: str, tflops: float | None) -> None:
    assert datasheet_flops(name) == (None if tflops is None else tflops * 1e12)


def test_roofs_of_this_machine_are_numbers() -> None:
    roofs = measure_roofs("cpu")
    assert min(roofs.flops, roofs.bandwidth, roofs.to_host, roofs.from_host) > 1e6


def test_a_row_has_both_mfu_and_what_it_is_compared_with() -> None:
    found = row(PLACE, FOUND, "ours", "other", 0.25, 989e12, tokens=5)
    assert (found.seconds, found.spread, found.ratio, found.ratio_min, found.ratio_max) == (2.0, 1.0, 0.5, 0.25, 0.75)
    assert found.peak_gib == 2.5 and found.figures == {"tokens": 5, "their_seconds": 4.0, "their_peak_gib": 5.0}
    line = stored(found, Scene(H100, Settings()), 12.0)
    assert (
        line["mfu"] == 0.5 and line["mfu_of_gemm"] == 0.989 and line["device"] == "NVIDIA H100 80GB HBM3" and line["took"] == 12.0
    )
    unknown = stored(found, Scene(replace(H100, peak_flops=None), Settings()), 12.0)
    assert unknown["mfu"] is None and unknown["mfu_of_gemm"] == 0.989, "only what was measured"
    assert json.loads(json.dumps(line))["versions"]["torch"] == version("torch")


def test_a_floor_is_the_limit_of_one() -> None:
    found = floor_row(PLACE, FOUND, "ours", 0.5)
    assert (found.ratio, found.ratio_min, found.ratio_max, found.limit) == (4.0, 2.0, 6.0, 1.0)
    assert found.figures == {"floor_seconds": 0.5}


def test_the_last_row_of_a_case_counts_and_earlier_rows_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    old = {
        "case": "reward-1B",
        "seconds": 0.25,
        "mfu": 0.2,
        "mfu_of_gemm": 0.3,
        "peak_gib": 60.0,
        "device": "NVIDIA H200",
        "when": "2026-11-26T",
    }
    for line in (old, *({"id": "G1", "case": "a step", "seconds": s} for s in (1.0, 2.0))):
        append(line, path)
    rows, older = read(path)
    assert {place: line["seconds"] for place, line in rows.items()} == {PLACE: 2.0} and older == [old]
    assert "| reward-1B | 250 ms | 20.0% | 30.0% | 60.0 | H200, 2026-11-26 |" in earlier(older)
    assert read(tmp_path / "none.jsonl") == ({}, [])


def test_the_rows_that_were_measured_before_stay_readable() -> None:
    rows, older = read(RESULTS)
    assert len(older) == 17 and "| learner-7B-packed-recompute-lora | 5.39 s | 24.6% |" in earlier(older)
    assert "| sync-1B | 1.37 s | - | - | - |" in earlier(older), "it has no FLOPs"
    assert all(not line["small"] and line["device"].startswith("NVIDIA") for line in rows.values()), (
        "a CPU's row is none of a GPU"
    )
    assert set(rows) <= {place for part in PARTS for place in part.places}, "a row of a case that is none any more"


def test_the_table_says_what_was_not_run_and_what_did_not_fit() -> None:
    line = stored(row(PLACE, FOUND, "ours", "other", 0.25, 989e12, tokens=50000), Scene(H100, Settings()), 1.0) | {
        "when": "2026-11-27T"
    }
    full = dict(zip(HEADS, cells(PLACE, "the other", line), strict=True))
    assert (
        full["time"] == "2 s"
        and full["MFU"] == "50.0%"
        and full["peak, GiB"] == "2.5"
        and full["on"] == "H100 80GB HBM3, 2026-11-27"
    )
    assert full["ratio"] == "0.5 (0.25 to 0.75)" and full["to"] == "the other" and full["besides"].startswith("tokens 50,000, ")
    empty = cells(PLACE, "the other", None)
    assert len(empty) == len(HEADS) and empty[2] == NOT_RUN
    too_large = stored(Row(*PLACE, outcome="out of memory"), Scene(H100, Settings()), 1.0)
    assert len(cells(PLACE, "", too_large)) == len(HEADS) and cells(PLACE, "", too_large)[2] == "out of memory"
    parts = [part("b", 1, places=(("G10", "later"),)), part("a step", 1)]
    assert [text.split(" | ")[0] for text in table({PLACE: line}, parts).splitlines()[2:]] == ["| G1", "| G10"], "by id"
    assert "not run" in shown({}, parts) and "tokens" not in shown({PLACE: line}, parts)


def test_what_does_not_fit_into_the_budget_is_left_out_and_smaller_ones_behind_it_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]

    def slow(scene: Scene) -> Iterator[Row]:
        now[0] += 90
        yield Row("G1", "first", seconds=1.0)

    parts = [part(name, seconds, Row("G1", name, seconds=1.0)) for name, seconds in (("first", 60), ("large", 8), ("small", 5))]
    parts[0] = replace(parts[0], measure=slow)
    assert run(parts, CPU, tmp_path / "gpu.jsonl", 100.0, lambda: now[0]) == []
    assert [case for _, case in read(tmp_path / "gpu.jsonl")[0]] == ["first", "small"]
    assert "left out: G1 large: takes about 12 s, and 10 s are left" in capsys.readouterr().out, "90 for 60, so 12 for 8"


def test_out_of_memory_is_a_row_and_another_failure_is_told_and_costs_no_other_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(scene: Scene) -> Iterator[Row]:
        yield Row("G2", "one", seconds=1.0)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore words")

    def broken(scene: Scene) -> Iterator[Row]:
        yield from ()
        raise RuntimeError("a kernel is missing")

    two = Part((("G2", "one"), ("G2", "two")), "", 1.0, too_large)
    outcomes = [(found.case, found.outcome) for found in measure(two, CPU)]
    assert outcomes == [("one", "measured"), ("two", "out of memory")]
    parts = [replace(two, places=(("G3", "broken"),), measure=broken), two]
    assert run(parts, CPU, tmp_path / "gpu.jsonl", None, lambda: 0.0) == ["G3 broken"]
    rows = read(tmp_path / "gpu.jsonl")[0]
    assert rows["G2", "two"]["figures"] == {"said": "CUDA out of memory. Tried to allocate 8 GiB"} and len(rows) == 2
    assert "a kernel is missing" in capsys.readouterr().err


def test_what_an_environment_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = part("engine", 1, needs="vllm")
    monkeypatch.setattr("benchmarks.gpu.__main__.find_spec", lambda name: None)
    assert missing(wanted, "cuda") == "G1 needs ray and vllm, which this environment lacks: `make env-gpu` installs them"
    assert missing(part("torch", 1), "cpu") is None
    assert missing(part("cuda", 1, needs="cuda"), "cpu") == "G1 needs a GPU, and this is measured on the CPU"


@pytest.mark.parametrize(
    ("words", "said"), [(["--device", "cpu"], "--device cpu needs --small"), (["--only", "G11"], "invalid choice: 'G11'")]
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "no CUDA device here" in capsys.readouterr().err


def test_every_comparison_has_cases_and_every_case_is_there_once() -> None:
    places = [place for part in PARTS for place in part.places]
    assert len(set(places)) == len(places) and {number for number, _ in places} == set(NUMBERS)
    assert {number for part in WITHOUT_VLLM for number in part.ids} == {"G1", "G2", "G3", "G4", "G9", "G10"}
    first = []
    for each in WITHOUT_VLLM:
        if sum(part.seconds for part in [*first, each]) <= 240:
            first.append(each)
    assert {number for part in first for number in part.ids} >= {"G1", "G2", "G3", "G4", "G9", "G10"}, (
        "in four minutes, one of each"
    )


def test_the_page_is_what_the_committed_rows_make(tmp_path: Path) -> None:
    copy = tmp_path / PAGE.name
    copy.write_text(PAGE.read_text())
    write_page(RESULTS, copy)
    assert copy.read_text() == PAGE.read_text(), "it is not of the rows: python -m benchmarks.gpu --page"
    assert PAGE.read_text().count(BEGIN) == 2


def test_bytes_that_decoding_must_read_by_hand() -> None:
    shape = SHAPES["tiny"]
    assert engine.cache_bytes(shape) == 2 * 2 * 32 * 2, "keys and values, layers, width of one head, bytes"
    weights, cached = 2 * shape.with_logits, engine.cache_bytes(shape)
    assert engine.decode_floor(shape, 3, [2, 1], 10.0) == pytest.approx((2 * weights + cached * (3 + 4 + 3)) / 10)


def test_padded_tokens_by_hand() -> None:
    lengths = [(3, 1), *((2, 2),) * 7, (9, 4)]
    batch = [Pair(f"p{i}", (1,), (2,) * a, (2,) * b) for i, (a, b) in enumerate(lengths)]
    assert padded_tokens(batch) == 8 * 4 + 8 * 10 + 2 * 5, "sequences of 4, seven of 3 | 10, 2, six of 3 | 3, 5"


def test_views_of_one_sampler_are_compared_token_by_token() -> None:
    sampled, alone = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.0, -2.5])
    found = compared(sampled, torch.tensor([-1.0, -2.5, -2.5]), alone)
    assert found["kl_k1"] == pytest.approx(0.0) and found["kl_k3"] > 0 and found["largest_gap"] == 0.5
    assert found["as_alone"] == pytest.approx(2 / 3)


def test_shares_of_a_step_are_of_the_drivers_waiting_within_steps() -> None:
    spans = [
        Span("sample", DRIVER, 0, 0, 0.0, 3.0),
        Span("policy", DRIVER, 0, 0, 3.0, 4.0),
        Span("reward", DRIVER, 0, None, 4.0, 9.0),
    ]
    assert rounds.shares([*spans, Span("sample", "rollout-0", 0, 0, 0.0, 3.0)]) == {"share_sample": 0.75, "share_policy": 0.25}


@pytest.mark.parametrize("way", rounds.WAYS)
@pytest.mark.parametrize("cuda", [True, False])
def test_a_round_of_each_way_is_a_config_that_is_accepted(way: str, cuda: bool) -> None:
    from cluster.load_config import load_config

    config = load_config(rounds.CONFIG, rounds.words("0.5B", way, cuda))
    assert config.policy.max_lag == rounds.WAYS[way][1] and config.sft.shape.hidden_size == SHAPES["0.5B"].hidden
    assert (config.resources.learner.num_gpus > 0) is cuda


@pytest.mark.parametrize("number", ["G1", "G2", "G3", "G4", "G9", "G10"])
def test_a_case_gives_its_rows_in_the_small(number: str, tmp_path: Path) -> None:
    small = FIRST[number]
    assert run([small], CPU, tmp_path / "gpu.jsonl", None, lambda: 0.0) == []
    rows = read(tmp_path / "gpu.jsonl")[0]
    assert tuple(rows) == small.places
    for line in rows.values():
        assert line["small"] and line["seconds"] > 0 and line["mfu"] is None and line["device"] == "CPU"
    if number == "G4":
        assert all(line["figures"]["to_nats"] < 1e-4 for line in rows.values())
    if number == "G9":
        assert rows["G9", "trainer's log-probs, 0.5B, one at a time"]["figures"]["as_alone"] == 1.0
        assert all(line["figures"]["kl_k3"] < 0.01 for line in rows.values()), "the same policy, but for rounding"
    if number == "G10":
        assert rows["G10", "checkpoint, 0.1B"]["figures"]["same_bits"] is True
    if number == "G3":
        assert rows["G3", "scoring by 4 heads, 1B"]["figures"]["scores_to"] < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("number", [number for number, each in enumerate(PARTS) if each.needs != "vllm"])
def test_a_case_gives_its_rows_on_a_gpu(number: int, tmp_path: Path) -> None:
    each = PARTS[number]
    scene = Scene(find_device("cuda"), Settings(1, small=True))
    assert run([each], scene, tmp_path / "gpu.jsonl", None, lambda: 0.0) == []
    rows = read(tmp_path / "gpu.jsonl")[0]
    assert tuple(rows) == each.places and all(line["peak_gib"] > 0 for line in rows.values())


def test_a_ppo_step_gives_its_row_in_the_small(tmp_path: Path) -> None:
    steps = [part for part in WITHOUT_VLLM if "PPO" in part.places[0][1]]
    with_adapters = next(part for part in steps if "LoRA" in part.places[0][1])
    assert run([steps[0], with_adapters], CPU, tmp_path / "gpu.jsonl", None, lambda: 0.0) == []
    assert all(line["flops"] > 0 for line in read(tmp_path / "gpu.jsonl")[0].values())
