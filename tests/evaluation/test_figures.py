import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from evaluation.curves import even_places, running_mean, spread
from evaluation.differences import gain, pair_differences, scaled, unseen
from evaluation.figures import all_figures
from evaluation.for_whom import person_rows
from evaluation.monitor_figures import distances, overoptimisation_figure, signs, signs_figure
from evaluation.people_figure import people_figure
from evaluation.round_figures import curves_by_round, perplexity, scaled_differences
from evaluation.run import MetricRow, Run, read_run
from evaluation.svg import Drawing, themed


@pytest.fixture(scope="module")
def run(full_run: Path) -> Run:
    return read_run(full_run)


@pytest.fixture(scope="module")
def figures(run: Run) -> tuple[Drawing, ...]:
    return all_figures(run)


def test_gain_by_hand(run: Run) -> None:
    start = [replace(run.start_rows[i], prompt_id=f"p{i}", proxy=value) for i, value in enumerate([0.0, 2.0])]  # std 1
    ours = [replace(start[1], proxy=5.0), replace(start[0], proxy=1.0)]  # other order; differences 3 and 1
    assert gain(ours, start, lambda row: row.proxy) == (2.0, pytest.approx(1.96 / np.sqrt(2)))


def test_gain_equals_scipys_paired_test(run: Run) -> None:
    mean, half = gain(run.round_rows[1], run.start_rows, lambda row: row.ensemble_mean)
    a, b = (np.array([row.ensemble_mean for row in rows]) for rows in (run.round_rows[1], run.start_rows))
    t = stats.ttest_rel(a, b).statistic  # mean / (s / sqrt N), s with N - 1
    assert mean * np.std(b) == pytest.approx((a - b).mean(), abs=1e-12)
    assert 1.96 * mean / half == pytest.approx(t * np.sqrt(24 / 23), rel=1e-12)


def test_gain_needs_the_same_prompts(run: Run) -> None:
    with pytest.raises(ValueError, match="have no response by SFT"):
        gain(run.start_rows, run.start_rows[1:], lambda row: row.proxy)


def test_pair_differences(run: Run) -> None:
    row = run.meta_rows[0][0]
    scores = {("a", 1.0), ("a", 4.0), ("a", 2.5), ("b", 7.0)}
    rows = [replace(row, prompt_id=prompt, score_metarm=score, score_vanilla=None) for prompt, score in sorted(scores)]
    assert pair_differences(rows, lambda r: r.score_metarm).tolist() == [1.5, 3.0, 1.5]
    assert len(pair_differences(rows, lambda r: r.score_vanilla)) == 0
    per_prompt = np.array([r.score_metarm for r in run.meta_rows[0]]).reshape(-1, 5, 1)
    reference = np.concatenate([pdist(scores) for scores in per_prompt])
    np.testing.assert_allclose(pair_differences(run.meta_rows[0], lambda r: r.score_metarm), reference, atol=1e-12)


def test_running_mean_and_spread() -> None:
    assert running_mean([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert running_mean([1.0, 2.0], 1) == [1.0, 2.0]
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2]
    assert even_places(0, 6, 8) == [0, 1, 2, 3, 4, 5, 6] and even_places(1, 1, 8) == [1]
    assert even_places(0, 20, 8) == [0, 3, 6, 9, 12, 15, 18] and even_places(1, 100, 8) == [1, 14, 27, 40, 53, 66, 79, 92]


def test_scaled_differences_forget_the_scale_and_keep_the_shape() -> None:
    raw = np.array([0.5, 0.0, 2.0, 1.0])
    assert scaled(raw).tolist() == [0.25, 0.0, 1.0, 0.5]
    np.testing.assert_array_equal(scaled(7.0 * raw), scaled(raw))
    assert scaled(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert scaled(np.zeros(0)).tolist() == []


def test_figure_16_is_of_the_prompts_that_the_ascent_never_saw(run: Run) -> None:
    def figure(*backs: set[str]) -> Drawing:
        rows = tuple(
            tuple(replace(row, kept_back=row.prompt_id in back) for row in of_round)
            for of_round, back in zip(run.meta_rows, backs, strict=True)
        )
        found = scaled_differences(replace(run, meta_rows=rows))
        assert found is not None
        return found

    num = len(run.meta_rows)
    prompts = sorted({row.prompt_id for row in run.meta_rows[-1]})
    few, none = figure(*[set(prompts[:3])] * num), figure(*[set[str]()] * num)
    assert "On the prompts of S_k that the ascent never saw, 30 differences a round." in few.caption  # 3 prompts, 5 responses
    assert "not recorded in every round" in none.caption and few.wide != none.wide
    assert figure(*[set(prompts[:3])] * (num - 1), set()).caption == none.caption
    assert unseen(run.meta_rows[-1]) == (run.meta_rows[-1], False)


def test_perplexity_is_that_of_the_tokens() -> None:
    """Two responses of 2 and 4 tokens: exp of the mean of -log ref over their six tokens, from what a step logs."""
    policy, reference = ([-0.5, -1.0], [-0.25, -0.5, -2.0, -1.5]), ([-1.0, -1.5], [-0.5, -0.25, -3.0, -2.0])
    tokens = [value for response in policy for value in response]
    kl = np.mean([sum(a) - sum(b) for a, b in zip(policy, reference, strict=True)])
    values = {"policy/entropy": -float(np.mean(tokens)), "policy/kl": float(kl), "policy/length": 3.0}
    run = SimpleNamespace(metrics=(MetricRow(0, 0, "policy", values), MetricRow(0, 1, "policy", {"policy/length": 3.0})))
    expected = np.exp(-np.mean([value for response in reference for value in response]))
    assert perplexity(run) == [(0, 0, pytest.approx(expected))]  # type: ignore[arg-type]


def test_one_round_has_no_rounds_to_lay_over_each_other(run: Run) -> None:
    assert curves_by_round(replace(run, metrics=tuple(row for row in run.metrics if row.round == 0))) is None


def test_every_asked_figure_is_there(figures: tuple[Drawing, ...]) -> None:
    assert [figure.name for figure in figures] == [
        "reward-round", "reward-step", "outcomes", "time", "kl", "perplexity", "by-round", "over-optimisation", "signs",
        "differences", "scaled-differences", "meta", "meta-heldout", "timeline",
    ]  # fmt: skip


def test_svg_can_stand_in_one_page(figures: tuple[Drawing, ...]) -> None:
    """Well-formed, ids unique over the page, references resolved, colours the page's own, text as text, nothing from outside."""
    seen: set[str] = set()
    for figure, variant in product(figures, ("wide", "narrow")):
        svg = figure.wide if variant == "wide" else figure.narrow
        root = ElementTree.fromstring(svg)
        ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(ids)
        colours = set(re.findall(r"(?:fill|stroke): (?!none)([^;\"]+)", svg))
        assert all(re.fullmatch(r"var\(--[a-z0-9]+\)", colour) for colour in colours), colours
        assert not re.search(r"https?:|DejaVu|<metadata|<image|<script", svg)
        assert len(root.findall(".//text")) > 4


def test_figures_show_the_data(figures: tuple[Drawing, ...], run: Run) -> None:
    by_name = {figure.name: figure.wide for figure in figures}
    e = run.ledger.rounds[2].evaluation
    assert f"{e.win:.0%}" in by_name["outcomes"]
    assert f"{sum(run.ledger.rounds[0].seconds.values()):.0f} s" in by_name["time"]
    assert "sample_meta" in by_name["time"]
    assert "gold" in by_name["reward-round"]


def test_a_figure_without_data_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No metrics and no S_k: the curves by step and MetaRM's figures go, the others stay."""
    monkeypatch.setattr("evaluation.svg._render", lambda prefix, title, width, height, draw: "<svg/>")
    empty = replace(run, metrics=(), meta_rows=((), (), ()), timeline=())
    assert [figure.name for figure in all_figures(empty)] == [
        "reward-round", "outcomes", "time", "kl", "perplexity", "over-optimisation", "signs",
    ]  # fmt: skip


def test_a_run_that_people_pay_shows_everybody_with_the_worst_off_first(run: Run) -> None:
    assert people_figure(run) is None, "nobody in particular pays"
    names, sft = ("ann", "bob", "cleo"), [[0.0, 0.0, 0.0]] * 3
    ours = [[1.0, -1.0, 0.5], [1.1, -1.1, -0.5], [0.9, -0.9, 0.1]]
    found = all_figures(replace(run, people=person_rows(names, ours, sft, None, None)))
    (figure,) = (figure for figure in found if figure.name == "people")
    assert "better than SFT for 1, worse for 1, not told apart for 1" in figure.caption
    assert "worst off is bob with -1.00" in figure.caption and "one in forty" in figure.caption
    true = person_rows(names, ours, sft, [[2.0, math.nan, math.nan]] * 3, sft)
    told = people_figure(replace(run, people=true))
    assert told is not None and "of 1 people, by the true reward of each" in told.caption and told.wide != figure.wide


def test_themed_refuses_what_is_no_svg() -> None:
    with pytest.raises(ValueError, match="no <svg> element"):
        themed("<p>", "a", "b")


def test_rewards_by_distance_are_those_of_the_ledger_in_units_of_sft(run: Run) -> None:
    proxy, gold = distances(run)
    sft = [row.gold for row in run.start_rows if row.gold is not None]
    assert (proxy.name, gold.name) == ("proxy", "gold") and not proxy.steps, "the made-up steps have a gold reward alone"
    last = run.ledger.rounds[-1].evaluation
    assert last.gold is not None
    assert gold.rounds[-1] == pytest.approx((last.kl, (last.gold - np.mean(sft)) / np.std(sft)))
    assert len(gold.steps) == sum("policy/gold" in row.values for row in run.metrics)
    previous = replace(run.ledger.rounds[-1], choices={"policy.reference": "previous"})
    other = replace(run, ledger=replace(run.ledger, rounds=(*run.ledger.rounds[:-1], previous)))
    assert not any(each.steps for each in distances(other)), "their KL is not from SFT"


def test_signs_of_the_steps_stand_at_their_kl_from_sft(run: Run) -> None:
    """What PPO measures at each step (length, disagreement) is drawn where the step was monitored, and nothing of another KL."""
    steps = tuple(
        MetricRow(0, step, phase, values)
        for step in (1, 2)
        for phase, values in (
            ("policy", {"policy/kl": 4.0, "policy/length": 9.0 + step, "policy/ensemble_std": 0.5}),
            ("monitor", {"monitor/self_bleu": 0.5, "monitor/distance": 3.0} if step == 2 else {}),
        )
        if values
    )
    assert run.ledger.start.numbers.get("length") is not None
    assert {sign.title: sign.steps for sign in signs(replace(run, metrics=steps)) if sign.steps} == {
        "tokens": [(4.0, 11.0)],
        "members' disagreement": [(4.0, 0.5)],
        "self-BLEU": [(4.0, 0.5)],
    }
    previous = replace(run.ledger.rounds[-1], choices={"policy.reference": "previous"})
    other = replace(run, metrics=steps, ledger=replace(run.ledger, rounds=(*run.ledger.rounds[:-1], previous)))
    assert not any(sign.steps for sign in signs(other)), "their KL is not from SFT"


def test_disagreement_on_sfts_responses_is_that_of_the_members_of_the_rounds(run: Run) -> None:
    (sign,) = (sign for sign in signs(run) if sign.title == "members' disagreement")
    assert sign.told[0] == (run.ledger.start.kl, pytest.approx(0.19)) and len(sign.told) == 1 + len(run.ledger.rounds)
    first = run.ledger.rounds[0]
    unsaid = {key: value for key, value in first.evaluation.numbers.items() if key != "sft_ensemble_std"}
    earlier = replace(first, evaluation=replace(first.evaluation, numbers=unsaid))
    (sign,) = (
        sign
        for sign in signs(replace(run, ledger=replace(run.ledger, rounds=(earlier, *run.ledger.rounds[1:]))))
        if sign.title == "members' disagreement"
    )
    assert len(sign.told) == len(run.ledger.rounds), "what an earlier version did not write is not drawn"


def test_what_an_earlier_version_wrote_has_no_signs(run: Run) -> None:
    ledger = replace(
        run.ledger, rounds=tuple(replace(r, evaluation=replace(r.evaluation, numbers={})) for r in run.ledger.rounds)
    )
    assert signs_figure(replace(run, ledger=ledger)) is None and overoptimisation_figure(replace(run, ledger=ledger)) is None
