"""Outer steps over domains: what a batch's lower level is, what is learnt, and what stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from rm.bilevel import NEVER
from rm.bilevel_config import GeneralizeConfig, check_domains
from rm.bilevel_fit import OuterLoop, OuterStep, ReferredQuery, Shift, distribution_of, fit_general
from rm.config import RewardConfig
from rm.hypergradient import ClosedForm, Form, Unrolled, form_of
from rm.model import RewardModel
from rm.ranked import measure_sets, score_responses
from tests.rm.conftest import MakeModel
from tests.rm.test_domain_fit import toy_queries
from tests.rm.toy import PAD, shifted
from tokens.errors import UserError
from tokens.guards import BadNumber, GuardsConfig

REWARD = RewardConfig(lr=3e-3, microbatch_size=64)


def referred(number: int, seed: int = 0, offset: float = 0.3) -> list[ReferredQuery]:
    """Toy queries whose reference policy prefers what comes first."""
    return [
        ReferredQuery(query, tuple(-offset * place for place in range(len(query.responses))))
        for query in toy_queries(number, seed)
    ]


def loop(steps: int, form: Form | None = None, beta: float = 1.0) -> OuterLoop:
    return OuterLoop(steps, 2, 8, beta, form or ClosedForm())


def fit(model: RewardModel, how: OuterLoop, seed: int = 4, **options: Any) -> list[OuterStep]:
    steps: list[OuterStep] = []
    domains = {name: referred(24, seed=number) for number, name in enumerate(("cooking", "travel", "garden"))}
    fit_general(model, domains, how, REWARD, seed, PAD, steps.append, **options)
    return steps


def test_the_lower_level_of_a_batch_is_over_each_querys_own_responses() -> None:
    queries = referred(4)  # 2, 3, 3, 2 responses
    distribution, places = distribution_of("cooking", queries)
    assert distribution.reference.shape == (4, 3) and float(distribution.reference[0, 2]) == pytest.approx(NEVER)
    assert places.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert distribution.contrast.shape[1] == 1 + 3 + 3 + 1
    assert distribution.contrast[:, 0].tolist() == [1, 0]  # the first query's second response is the better one
    assert float(distribution.lead[0]) == pytest.approx(-0.3)


def test_the_first_step_is_the_mean_of_the_domains_closed_forms(make_model: MakeModel) -> None:
    model = make_model("mean")
    queries = {name: referred(8, seed=number) for number, name in enumerate(("cooking", "travel"))}
    by_hand = []
    for own in queries.values():
        losses = []
        for each in own:
            scores = score_responses(model, [each.query], PAD, 64).detach()
            log_policy = torch.tensor(each.reference) + 2.0 * scores
            losses += [-functional.logsigmoid(log_policy[i] - log_policy[j]) for i, j in each.query.comparisons]
        by_hand.append(float(torch.stack(losses).mean()))
    steps: list[OuterStep] = []
    fit_general(model, queries, loop(1, beta=2.0), REWARD, 0, PAD, steps.append)
    assert steps[0].upper == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    assert steps[0].by_domain == pytest.approx(dict(zip(queries, by_hand, strict=True)), rel=1e-5)


@pytest.mark.parametrize("form", [ClosedForm(), Unrolled(10, 1.0)], ids=["closed", "unrolled"])
def test_it_learns_what_holds_in_every_domain(make_model: MakeModel, form: Form) -> None:
    model, held_out = make_model("mean"), {"money": toy_queries(30, seed=9)}
    before = measure_sets(model, held_out, 64, PAD)["money"].accuracy
    steps = fit(model, loop(40, form))
    assert measure_sets(model, held_out, 64, PAD)["money"].accuracy > 0.9 > before
    assert sum(step.upper for step in steps[-5:]) < sum(step.upper for step in steps[:5])
    assert [step.step for step in steps] == list(range(1, 41)) and all(step.gradient_norm > 0 for step in steps)
    counts = [sum(name in step.by_domain for step in steps) for name in ("cooking", "travel", "garden")]
    assert max(counts) - min(counts) <= 1 and sum(counts) == 80


def test_the_same_seed_gives_the_same_model(make_model: MakeModel) -> None:
    first, second, other = make_model("mean"), make_model("mean"), make_model("mean")
    for model, seed in ((first, 4), (second, 4), (other, 5)):
        fit(model, loop(3), seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_beside_metarm_an_ascent_of_length_0_changes_nothing_and_another_does(make_model: MakeModel) -> None:
    plain, still, moved = make_model("mean"), make_model("mean"), make_model("mean")
    groups = shifted(m=4, k=3)
    fit(plain, loop(2))
    fit(still, loop(2), shift=Shift(groups, 0.0, 2))
    fit(moved, loop(2), shift=Shift(groups, 5.0, 2))
    largest = [
        max(float((a - b).detach().abs().max()) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
        for other in (still, moved)
    ]
    assert largest[0] < 1e-6 < 1e-4 < largest[1]


def test_one_domain_and_an_empty_one_are_refused(make_model: MakeModel) -> None:
    for domains in ({"cooking": referred(4)}, {"cooking": referred(4), "travel": []}):
        with pytest.raises(ValueError, match="expected two domains or more with queries each"):
            fit_general(make_model("mean"), domains, loop(1), REWARD, 0, PAD, lambda step: None)


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_a_diverging_inner_optimisation_ends_the_fit_by_its_domains_name(make_model: MakeModel, beta: float) -> None:
    domains = {"cooking": referred(24, offset=0.0), "travel": referred(24, seed=1, offset=0.0)}
    model = make_model("mean")
    with pytest.raises(UserError, match=r"inner optimisation of (cooking|travel) diverges"):
        fit_general(model, domains, loop(1, Unrolled(3, 1e9), beta=beta), REWARD, 0, PAD, lambda step: None)


def test_rewards_that_are_not_finite_end_the_fit_by_the_domains_name(make_model: MakeModel) -> None:
    model = make_model("mean")
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(BadNumber, match=r"a reward of the domain (cooking|travel|garden)"):
        fit(model, loop(2), guards=GuardsConfig(in_a_row=1))


def test_a_reference_that_does_not_fit_its_query_is_refused() -> None:
    query = toy_queries(1)[0]
    for reference in ((0.0,), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="expected a finite log-probability of each of 2 responses"):
            ReferredQuery(query, reference)


LABELLED = {"preferences": "p.jsonl", "texts": "t.jsonl"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"domains": {}}, "names none"),
        ({"domains": {"cooking": LABELLED}}, "names one, cooking"),
        (
            {"domains": {"cooking": LABELLED, "travel": {"preferences": "p.jsonl"}}},
            "generalize.domains.travel has no texts to fine-tune its reference policy on",
        ),
        ({"domains": {"cooking": LABELLED, "travel": {"texts": "t.jsonl"}}}, "generalize.domains.travel has no preferences"),
        (
            {"domains": {"cooking": LABELLED, "travel": LABELLED}, "targets": {"law": {}}},
            "generalize.targets.law has no texts",
        ),
    ],
)
def test_domains_that_nothing_can_be_learnt_from_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_domains(GeneralizeConfig.model_validate(tree))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"beta": 0}, "beta multiplies the reward in the lower level and must be above 0, got 0"),
        ({"curves": [1.0, -2.0]}, "must be above 0, got -2"),
        ({"domains": {"law": LABELLED}, "targets": {"Law": LABELLED}}, "law is named twice"),
        ({"domains": {"a/b": LABELLED}}, "a name has letters"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GeneralizeConfig.model_validate(tree)


def test_every_form_can_be_asked_for() -> None:
    forms = [
        form_of(GeneralizeConfig.model_validate({"form": name})) for name in ("closed", "unrolled", "first_order", "implicit")
    ]
    assert [type(form).__name__ for form in forms] == ["ClosedForm", "Unrolled", "Unrolled", "Implicit"]
    assert GeneralizeConfig(beta=2.0, curves=(1.0, 2.0)).betas == (2.0, 1.0)
