"""The page of the papers' tables: what it says of made-up rows; and that every arm is a config that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce.__main__ import jobs, main
from benchmarks.reproduce.arms import ARMS, CHOSEN, ITEMS, run_for
from benchmarks.reproduce.figure import draw
from benchmarks.reproduce.page import at_kl, best, claims, fallen, of_arm, page, verdict
from benchmarks.reproduce.play import RECIPE
from cluster.load_config import load_config
from evaluation.svg import BLUE


def row(arm: str, seed: int, golds: list[float], validation: list[float], kls: list[float]) -> dict[str, Any]:
    """A run with SFT at gold 0 and rounds as given."""
    rounds: list[dict[str, Any]] = [{"round": -1, "gold": 0.0}]
    for index, (gold, chosen, kl) in enumerate(zip(golds, validation, kls, strict=True)):
        judged = {"win": 0.6, "tie": 0.1, "lose": 0.3, "margin": 0.3, "proxy": 1.0}
        rounds.append({"round": index, "validation": chosen, "gold": gold, "kl": kl} | judged)
    return {"arm": arm, "seed": seed, "rounds": rounds, "step_kl": []}


def test_every_arm_is_a_config() -> None:
    for arm in ARMS.values():
        load_config(RECIPE, list(arm.keys))
    assert {arm for item in ITEMS for arm in run_for(item)} == set(ARMS), "no arm is run for nothing, none is missing"
    assert all(item.base is None or item.base in item.arms for item in ITEMS)


def test_the_best_round_is_chosen_on_validation_prompts_and_never_by_what_is_reported() -> None:
    run = row("iterated", 1, [0.2, 0.9, 0.5], [0.3, 0.4, 0.4], [1.0, 4.0, 9.0])
    assert best(run)["round"] == 1, "of equal ones the first"
    assert fallen(run) == pytest.approx(0.4)
    assert best(row("iterated", 1, [0.2, 0.9], [0.5, 0.4], [1.0, 4.0]))["gold"] == 0.2, "though the other's gold is higher"


def test_gold_where_another_run_is_as_far_from_sft() -> None:
    run = row("vanilla PPO", 1, [0.4, 0.6], [0.1, 0.2], [4.0, 16.0])
    assert at_kl(run, 0.0) == 0.0
    assert at_kl(run, 1.0) == pytest.approx(0.2), "half the way in sqrt(KL)"
    assert at_kl(run, 9.0) == pytest.approx(0.5)
    assert at_kl(run, 100.0) == pytest.approx(0.6), "no further than its last round"


def test_dpo_chooses_its_learning_rate_on_validation_prompts() -> None:
    rows = [
        row(arm, 1, [gold], [chosen], [1.0])
        for arm, gold, chosen in zip(CHOSEN["DPO"], (0.9, 0.1, 0.5), (0.1, 0.3, 0.2), strict=True)
    ]
    assert of_arm(rows, "DPO")[1]["rounds"][1]["gold"] == 0.1
    assert of_arm(rows[:2], "DPO") == {}, "not before all are there"


@pytest.mark.parametrize(
    ("differences", "above", "expected"),
    [
        ([0.1, 0.11, 0.12], True, "holds"),
        ([0.1, 0.11, 0.12], False, "does not hold"),
        ([-0.1, -0.11, -0.12], False, "holds"),
        ([-0.1, 0.2, 0.05], True, "cannot be told at this scale"),
        ([0.1], True, "not run"),
        ([], True, "not run"),
    ],
)
def test_a_claim_is_judged_by_its_interval(differences: list[float], above: bool, expected: str) -> None:
    assert verdict(differences, above) == expected


def test_what_was_not_run_says_so() -> None:
    text = page([])
    planned = sum(len(arm.seeds) for arm in ARMS.values())
    assert f"**0 of {planned} runs are done**" in text
    assert "| DPO | not run |" in text and "holds" not in claims([]).replace("does not hold", "")


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    seeds = (1, 2, 3, 4, 5)
    rows = [row("iterated", s, [0.3, 0.5 + s / 100], [0.2, 0.4], [1.0, 4.0]) for s in seeds]
    rows += [row("vanilla PPO", s, [0.2, 0.3], [0.2, 0.3], [1.0, 4.0]) for s in seeds]
    (tmp_path / "reproduce.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    main(["--page"], tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "**10 of " in text
    line = next(line for line in text.splitlines() if line.startswith("| Table 3: iterated beats vanilla PPO"))
    assert "**+0.230 ± 0.020**" in line and line.endswith("| 5 | holds |"), line
    assert "**+0.230" in next(line for line in text.splitlines() if line.startswith("| iterated | 5 |"))
    assert "](img/reproduce.svg)" in text
    drawn = (tmp_path / "img" / "reproduce.svg").read_text()
    assert "iterated" in drawn and "vanilla PPO" in drawn and "60%" in drawn, "win, of every round"
    assert "best of 16" not in drawn, "it was not run"
    assert all(arm in drawn for arm in ITEMS[-1].arms), "each ablation has its place, run or not"


def test_the_picture_fills_a_dot_where_the_interval_leaves_zero_out(tmp_path: Path) -> None:
    def filled(rows: list[dict[str, Any]]) -> int:
        draw(rows, tmp_path / "one.svg")
        return (tmp_path / "one.svg").read_text().count(f"fill: {BLUE}; stroke: {BLUE}")

    rows = [row("iterated", s, [0.3, 0.5 + s / 100], [0.2, 0.4], [1.0, 4.0]) for s in (1, 2, 3)]
    told = [row("k = 2", s, [0.2, 0.1 + s / 100], [0.2, 0.3], [1.0, 4.0]) for s in (1, 2, 3)]
    untold = [row("k = 2", s, [0.2, 0.5 + (-1) ** s], [0.2, 0.3], [1.0, 4.0]) for s in (1, 2, 3)]
    assert filled([*rows, *told]) > filled([*rows, *untold])


def test_one_seed_of_every_arm_of_an_item_before_the_next() -> None:
    assert jobs([1, 2], [1, 2])[:4] == [("iterated", 1), ("iterated", 2), ("vanilla PPO", 1), ("DPO, lr 1e-4", 1)]
    everything = jobs([1, 2, 3, 4, 5, 6, 7], None)
    assert len(everything) == len(set(everything)) == sum(len(arm.seeds) for arm in ARMS.values())
