"""The page of the papers' tables: what it says of made-up rows; and that every arm is a config that runs."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiments.common import RESULTS, Results
from benchmarks.on_test_prompts import prompts_of
from benchmarks.reproduce import __main__ as command
from benchmarks.reproduce.__main__ import PAGE, jobs, main
from benchmarks.reproduce.arms import AGAIN, ARMS, CHOSEN, ITEMS, run_for
from benchmarks.reproduce.claims import Claim, claims, table
from benchmarks.reproduce.figure import draw
from benchmarks.reproduce.page import page
from benchmarks.reproduce.play import RECIPE, digest_of
from benchmarks.reproduce.rows import at, best, elsewhere, evenness, fallen, gold, log_jumps, matched, of_arm, way_of
from cluster.load_config import load_config
from evaluation.svg import BLUE
from sandbox.config import WorldConfig
from sandbox.world import World


def row(arm: str, seed: int, golds: list[float], validation: list[float], kls: list[float]) -> dict[str, Any]:
    """A run with SFT at gold 0 and rounds as given; 0.1 less gold in the other domains."""
    told = ARMS[arm].elsewhere
    rounds: list[dict[str, Any]] = [{"round": -1, "gold": 0.0} | ({"elsewhere": {"gold": -0.1}} if told else {})]
    judged = {"win": 0.6, "tie": 0.1, "lose": 0.3, "margin": 0.3}
    for index, (mean, chosen, kl) in enumerate(zip(golds, validation, kls, strict=True)):
        other = {"elsewhere": {**judged, "gold": mean - 0.1}} if told else {}
        known = {"round": index, "validation": chosen, "gold": mean, "kl": kl, "proxy": 1.0, "perplexity": 9.0}
        rounds.append(known | judged | other)
    steps = {"step_kl": [0.0, 1.0, 2.0, 3.5], "step_score": [0.0, 1.0, 1.5, 2.0]}
    ran = {"keys": list(ARMS[arm].keys), "recipe": digest_of(RECIPE), "versions": {"git_commit": f"{seed}234567890"}}
    return {"arm": arm, "seed": seed, "rounds": rounds, **steps, **ran}


def test_every_arm_is_a_config() -> None:
    for arm in ARMS.values():
        load_config(RECIPE, list(arm.keys))
    assert {arm for item in ITEMS for arm in run_for(item)} == set(ARMS), "no arm is run for nothing, none is missing"
    assert all(item.base is None or item.base in item.arms for item in ITEMS)


def test_the_best_round_is_chosen_on_validation_prompts_and_never_by_what_is_reported() -> None:
    run = row("iterated", 1, [0.2, 0.9, 0.5], [0.3, 0.4, 0.4], [1.0, 4.0, 9.0])
    assert best(run)["round"] == 1, "of equal ones the first"
    assert fallen(run) == pytest.approx(0.4)
    assert fallen(row("iterated", 1, [0.9, 0.2, 0.3], [0.1, 0.4, 0.2], [1.0, 4.0, 9.0])) == pytest.approx(-0.1), "not the highest"
    assert best(row("iterated", 1, [0.2, 0.9], [0.5, 0.4], [1.0, 4.0]))["gold"] == 0.2, "though the other's gold is higher"


def test_gold_where_a_run_is_as_far_from_sft_as_asked() -> None:
    run = row("vanilla PPO", 1, [0.4, 0.6, 0.1], [0.1, 0.2, 0.0], [4.0, 16.0, 25.0])
    way = way_of([run], "vanilla PPO", 1)
    assert way == [(0.0, 0.0), (2.0, 0.4), (4.0, 0.6)], "up to its best round; what comes later has no say"
    assert (at(way, 0.0), at(way, 1.0), at(way, 3.0)) == (0.0, pytest.approx(0.2), pytest.approx(0.5)), "linear in sqrt(KL)"
    wound = row("vanilla PPO", 1, [0.4, 0.6], [0.1, 0.2], [16.0, 4.0])
    assert way_of([wound], "vanilla PPO", 1) == [(0.0, 0.0), (2.0, 0.6)], "no further from SFT than the best round"


def test_the_way_of_dpo_leads_by_its_other_learning_rates() -> None:
    given = zip(CHOSEN["DPO"], (0.3, 0.5, 0.6, 0.7, 0.1), (0.1, 0.2, 0.3, 0.4, 0.0), (1.0, 4.0, 9.0, 16.0, 25.0), strict=True)
    rows = [row(arm, 1, [mean], [chosen], [kl]) for arm, mean, chosen, kl in given]
    assert way_of(rows, "DPO", 1) == [(0.0, 0.0), (1.0, 0.3), (2.0, 0.5), (3.0, 0.6), (4.0, 0.7)], (
        "not by the rate that is too large"
    )
    near = row("vanilla PPO", 1, [0.5], [0.1], [4.0])
    assert matched([*rows, near], "DPO", "vanilla PPO") == [pytest.approx(0.0)], "0.5 at KL 4, not 0.35 of a straight line"


def test_the_further_of_two_is_taken_back_to_where_the_nearer_is() -> None:
    far = row("iterated", 1, [0.4, 0.8], [0.1, 0.2], [4.0, 16.0])
    near = row("vanilla PPO", 1, [0.5], [0.1], [4.0])
    assert matched([far, near], "iterated", "vanilla PPO") == [pytest.approx(-0.1)], "0.4 at KL 4, not 0.8 at 16"
    assert matched([far, near], "vanilla PPO", "iterated") == [pytest.approx(0.1)]


def test_how_steady_a_run_is() -> None:
    run = row("no KL", 1, [0.4], [0.1], [4.0])
    assert evenness({**run, "step_kl": [0.0, 2.0, 4.0, 6.0]}) == pytest.approx(1.0)
    assert evenness({**run, "step_kl": [0.0, 0.0, 0.0, 6.0]}) == pytest.approx(0.6), (
        "r of (0, 0, 0, 1) with (0, 1, 2, 3), squared"
    )
    assert log_jumps({**run, "step_score": [0.0, 2.0, 0.0, 2.0]}) == pytest.approx(log((32 / 9) ** 0.5 / 2))


def test_the_other_domains_take_the_place_of_the_own() -> None:
    rows = [row("iterated", 1, [0.4], [0.1], [4.0]), row("no KL", 1, [0.4], [0.1], [4.0])]
    (moved,) = elsewhere(rows)
    assert moved["arm"] == "iterated" and gold(moved) == pytest.approx(0.3) and moved["rounds"][0]["gold"] == -0.1
    assert gold(rows[0]) == 0.4, "a copy"


def test_a_tuned_arm_has_the_rounds_of_the_run_that_validation_prompts_choose() -> None:
    chosen, other, third = CHOSEN["vanilla PPO, tuned"]
    rows = [
        row(chosen, 1, [0.4, 0.6], [0.1, 0.5], [1.0, 4.0]),
        row(other, 1, [0.5, 0.9], [0.2, 0.3], [4.0, 9.0]),
        row(third, 1, [0.1, 0.2], [0.1, 0.2], [0.5, 1.0]),
    ]
    way = [(0.0, 0.0), (0.5**0.5, 0.1), (1.0, 0.2), (2.0, 0.5)]
    assert way_of(rows[1:] + rows[:1], "vanilla PPO, tuned", 1)[:2] == way[:2], "by the runs that were not chosen, too"
    assert {point for point, _ in way_of(rows, "vanilla PPO, tuned", 1)} == {0.0, 0.5**0.5, 1.0, 2.0}, "and no further"
    assert gold(of_arm(rows, "vanilla PPO, tuned")[1]) == 0.6, "though the test prompts like another more"


def test_dpo_chooses_its_learning_rate_on_validation_prompts() -> None:
    rows = [
        row(arm, 1, [gold], [chosen], [1.0])
        for arm, gold, chosen in zip(CHOSEN["DPO"], (0.9, 0.1, 0.5, 0.2, 0.3), (0.1, 0.3, 0.2, 0.2, 0.1), strict=True)
    ]
    assert of_arm(rows, "DPO")[1]["rounds"][1]["gold"] == 0.1
    assert of_arm(rows[:2], "DPO") == {}, "not before all are there"


@pytest.mark.parametrize(
    ("found", "above", "expected"),
    [
        ([0.1, 0.11, 0.12], True, "holds"),
        ([0.1, 0.11, 0.12], False, "does not hold"),
        ([-0.1, -0.11, -0.12], False, "holds"),
        ([-0.1, 0.2, 0.05], True, "cannot be told at this scale"),
        ([0.0, 0.0, 0.0], False, "does not hold"),
        ([0.01, -0.01, 0.005], True, "does not hold"),
        ([0.1, 0.11], True, "2 of 3 seeds run"),
        ([], True, "not run"),
    ],
)
def test_a_claim_is_judged_by_its_interval(found: list[float], above: bool, expected: str) -> None:
    assert Claim("a paper", "it is better", "gold", found, 3, above).verdict == expected


def test_how_much_is_no_effect_is_said_of_each_measure() -> None:
    tenth = [0.0, 0.01, 0.12]  # an interval up to about 0.2
    assert Claim("a paper", "it is calmer", "log", tenth, 3, True, 0.3).verdict == "does not hold"
    assert Claim("a paper", "it is calmer", "log", tenth, 3, True, 0.1).verdict == "cannot be told at this scale"


def test_what_was_not_run_says_so() -> None:
    text = page([])
    planned = sum(len(arm.seeds) for arm in ARMS.values())
    assert f"**0 of {planned} runs are done**" in text
    assert "same keys and seeds: not run." in " ".join(text.split()) and "a smaller one might" not in text
    assert "| DPO | not run |" in text and {claim.verdict for claim in claims([])} == {"not run"}
    assert "| k = 2 | 1 of 3 |" in page([row("k = 2", 1, [0.4], [0.1], [4.0])])


def test_every_verdict_is_of_arms_that_are_run_with_as_many_seeds() -> None:
    golds, gains, kls = [0.3, 0.32, 0.35, 0.4], [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    rows = [
        row(arm, seed, [*golds, 0.4 + seed / 100], [*gains, 0.5], [*kls, 5.0])
        for arm, made in ARMS.items()
        for seed in made.seeds
    ]
    assert not [claim for claim in claims(rows) if "run" in claim.verdict]
    assert "not run" not in table(rows)


def test_the_page_in_the_documents_is_that_of_the_rows() -> None:
    rows = Results(RESULTS / "reproduce.jsonl", ("arm", "seed")).rows()
    assert rows and PAGE.read_text() == page(rows)
    command.refuse_others(rows)
    drawn = (PAGE.parent / "img" / "reproduce.svg").read_text()
    assert all(f">{arm}<" in drawn for item in ITEMS if item.base for arm in item.arms if arm != AGAIN)


def test_rows_of_other_keys_are_refused() -> None:
    old = row("k = 2", 3, [0.4], [0.1], [4.0])
    with pytest.raises(
        SystemExit, match=r"'k = 2', seed 3, was run with --meta.samples_per_prompt 9, and the arm has --meta.* now"
    ):
        command.refuse_others([old | {"keys": ["--meta.samples_per_prompt", "9"]}])
    with pytest.raises(SystemExit, match=r"'k = 2', seed 3, was run with another reproduce.yaml \(0123, now [0-9a-f]{16}\)"):
        command.refuse_others([old | {"recipe": "0123"}])
    with pytest.raises(SystemExit, match="an arm that is not there: 'k = 3'"):
        command.refuse_others([old | {"arm": "k = 3"}])


def test_a_run_that_fails_leaves_the_others_to_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(name: str, arm: Any, seed: int) -> dict[str, Any]:
        if seed == 2:
            raise RuntimeError(f"{name}, seed 2: the run ended with 3")
        return row(name, seed, [0.3, 0.31, 0.32, 0.5 + seed / 100], [0.2, 0.3, 0.35, 0.4], [1.0, 2.0, 3.0, 4.0])

    monkeypatch.setattr(command, "play", play)
    with pytest.raises(SystemExit, match="1 of 5 runs failed, and are tried again by the same command: iterated, seed 2"):
        main(["--items", "1"], tmp_path, tmp_path / "page.md")
    assert "iterated, seed 2: the run ended with 3" in capsys.readouterr().out
    kept = [json.loads(line)["seed"] for line in (tmp_path / "reproduce.jsonl").read_text().splitlines()]
    assert kept == [1, 3, 4, 5]
    assert "4 of 5 seeds run" in (tmp_path / "page.md").read_text()


def test_no_two_arms_of_an_item_are_the_same_run() -> None:
    for item in ITEMS:
        configs = {arm: load_config(RECIPE, list(ARMS[arm].keys)) for arm in run_for(item) if arm != AGAIN}
        never_asked = {"vanilla_ppo": {"scorer"}, "dpo": {"scorer", "policy"}}
        said = {
            arm: config.model_dump_json(exclude={"name"} | never_asked.get(config.rounds.baseline, set()))
            for arm, config in configs.items()
        }
        assert len(set(said.values())) == len(said), f"{item.title}: what the arms differ in, their baseline never asks"


def test_test_prompts_are_of_the_own_domains_or_of_the_others() -> None:
    world = World(WorldConfig(num_texts=200, num_eval_prompts=16))
    own, others = prompts_of(world, True), prompts_of(world, False)
    domains = {prompt.text: prompt.domain for prompt in world.prompts("test")}
    assert own and others and {domains[text] for text in own}.isdisjoint(domains[text] for text in others)
    assert {domains[text] for text in own} <= set(world.train_domains)


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    seeds = (1, 2, 3, 4, 5)
    rows = [row("iterated", s, [0.3, 0.31, 0.32, 0.5 + s / 100], [0.2, 0.3, 0.35, 0.4], [1.0, 2.0, 3.0, 4.0]) for s in seeds]
    rows += [row("vanilla PPO", s, [0.2, 0.3], [0.2, 0.3], [1.0, 4.0]) for s in seeds]
    (tmp_path / "reproduce.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    main(["--page"], tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "**10 of " in text
    claim = "| Table 3 | it beats vanilla PPO, neither tuned | gold | above 0 |"
    line = next(line for line in text.splitlines() if line.startswith(claim))
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

    rows = [row(AGAIN, s, [0.3, 0.5 + s / 100], [0.2, 0.4], [1.0, 4.0]) for s in (1, 2, 3)]
    told = [row("k = 2", s, [0.2, 0.1 + s / 100], [0.2, 0.3], [1.0, 4.0]) for s in (1, 2, 3)]
    untold = [row("k = 2", s, [0.2, 0.5 + (-1) ** s], [0.2, 0.3], [1.0, 4.0]) for s in (1, 2, 3)]
    assert filled([*rows, *told]) > filled([*rows, *untold])


def test_one_seed_of_every_arm_of_an_item_before_the_next() -> None:
    assert jobs([1, 2], [1, 2])[:4] == [("iterated", 1), ("iterated", 2), ("M = 1", 1), ("vanilla PPO", 1)]
    everything = jobs([1, 2, 3, 4, 5, 6, 7], None)
    assert len(everything) == len(set(everything)) == sum(len(arm.seeds) for arm in ARMS.values())
