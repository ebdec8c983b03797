"""A stage of customisation: it learns, it is the sum of its losses, and it goes on where it stopped, to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rm.config import LoraConfig, RewardConfig
from rm.domain_config import GeneralStageConfig
from rm.domain_fit import Imitation, Saving, StageStep, fit_stage
from rm.imitation import LanguageHead, imitation_loss
from rm.lora import add_lora
from rm.model import RewardModel
from rm.penalties import QuadraticPenalty
from rm.ranked import measure_sets, response_sequences, score_responses
from rm.ranking import comparisons, ranking_loss
from tests.rm.conftest import MakeModel
from tests.rm.toy import BAD, BOS, GOOD, PAD, response
from tokens.errors import UserError
from tokens.guards import BadNumber, GuardsConfig
from tokens.queries import Query
from tokens.records import SequenceBatch

REWARD = RewardConfig(microbatch_size=7)
STAGE = GeneralStageConfig(lr=3e-3, batch_size=8, warmup_ratio=0.1)


def toy_queries(number: int, seed: int = 0) -> list[Query]:
    """Good words beat mixed ones, which beat bad ones; every third query has two responses only."""
    generator = torch.Generator().manual_seed(seed)
    queries = []
    for i in range(number):
        best, worst = response(GOOD, generator), response(BAD, generator)
        middle = (best[0], worst[0], 2)
        kept = [(best, 1.0), (middle, 0.5), (worst, 0.0)] if i % 3 else [(worst, 0.0), (best, 1.0)]
        queries.append(Query(str(i), (BOS, 5), tuple(ids for ids, _ in kept), tuple(score for _, score in kept)))
    return queries


def fit(model: RewardModel, queries: list[Query], every: int = 16, **options: object) -> tuple[list[StageStep], list[int]]:
    steps: list[StageStep] = []
    looks: list[int] = []
    fit_stage(model, queries, STAGE, REWARD, 3, PAD, every, looks.append, steps.append, **options)  # type: ignore[arg-type]
    return steps, looks


def weights(model: RewardModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_learns_to_rank_and_is_measured_every_so_many_queries(make_model: MakeModel) -> None:
    model, held_out = make_model("mean"), {"toy": toy_queries(30, seed=9)}
    before = measure_sets(model, held_out, 8, PAD)["toy"]
    steps, looks = fit(model, toy_queries(100))
    assert looks == [0, 16, 32, 48, 64, 80, 96, 100] and [step.samples for step in steps][-2:] == [96, 100]
    after = measure_sets(model, held_out, 8, PAD)["toy"]
    assert after.accuracy > 0.9 > before.accuracy and after.loss < before.loss
    assert steps[0].lr == pytest.approx(STAGE.lr) and steps[-1].lr < steps[1].lr


def test_a_step_descends_the_sum_of_its_losses_whatever_the_microbatch(make_model: MakeModel, language_model: Path) -> None:
    queries = toy_queries(8)
    model = make_model("last")
    head = LanguageHead.load(language_model, model)
    start = [p.detach() + 0.01 for p in model.parameters()]
    penalty = QuadraticPenalty(list(model.parameters()), start, None, 0.5)
    compared = comparisons(queries)
    ranking = ranking_loss(score_responses(model, queries, PAD, 64), compared, compared.shape[1])
    preferred = [(q.prompt_ids, q.responses[i]) for q in queries for i in q.preferred]
    batch = SequenceBatch.from_ids([prompt for prompt, _ in preferred], [ids for _, ids in preferred], PAD)
    _, hidden, batch = model.states(batch)
    language = imitation_loss(hidden, batch, head, "response", len(preferred))
    pull = penalty()
    total = ranking + 0.3 * language + pull
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(total, [*model.parameters(), *head.parameters()])]).norm()
    steps, _ = fit(model, queries, imitation=Imitation(head, 0.3, "response"), penalty=penalty)
    step = steps[0]
    assert step.ranking == pytest.approx(float(ranking.detach()), abs=1e-5)
    assert step.imitation == pytest.approx(float(language.detach()), abs=1e-5)
    assert step.penalty == pytest.approx(float(pull.detach()), rel=1e-5)
    assert step.loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-4)


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize("adapters", [False, True])
def test_a_fit_that_was_cut_short_ends_as_if_it_had_not_been(
    make_model: MakeModel, language_model: Path, tmp_path: Path, adapters: bool
) -> None:
    def made() -> tuple[RewardModel, Imitation]:
        model = make_model("mean")
        head = LanguageHead.load(language_model, model)
        if adapters:
            add_lora(model, LoraConfig(rank=2), seed=1)
            head.requires_grad_(False)
        return model, Imitation(head, 0.1, "sequence")

    queries = toy_queries(50)
    whole, imitation = made()
    all_steps, all_looks = fit(whole, queries, imitation=imitation)
    kept: list[object] = []
    looks: list[int] = []
    saving = Saving(tmp_path / "checkpoints", "toy", lambda: list(looks), kept.append)
    cut, imitation = made()
    seen: list[StageStep] = []

    def until(number: int) -> Callable[[StageStep], None]:
        def on_step(step: StageStep) -> None:
            seen.append(step)
            if step.samples == number:
                raise Killed

        return on_step

    with pytest.raises(Killed):
        fit_stage(cut, queries, STAGE, REWARD, 3, PAD, 16, looks.append, until(40), imitation, None, saving)
    names = [path.name.split(".") for path in sorted(saving.folder.iterdir())]
    assert [(name[0], name[-1]) for name in names] == [("00000032", "json"), ("00000032", "safetensors")]
    assert names[0][1] == names[1][1]  # a name of its own, so that another process's state is not overwritten
    again, imitation = made()
    steps: list[StageStep] = []
    began = fit_stage(again, queries, STAGE, REWARD, 3, PAD, 16, looks.append, steps.append, imitation, None, saving)
    assert began == 32 and kept == [all_looks[:3]] and looks == all_looks and steps == all_steps[4:] and seen == all_steps[:5]
    expected, got = weights(whole), weights(again)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_weights_without_a_gradient_have_no_state_to_go_on_from(start: MakeModel, tmp_path: Path) -> None:
    """An encoder's checkpoint may hold layers that no score depends on."""
    saving = Saving(tmp_path, "toy", list, lambda kept: None)
    ends = []
    for _ in range(2):
        model = start("bert")
        model.model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        fit(model, toy_queries(16), saving=saving)  # the second time from the end of the first
        ends.append(weights(model))
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_a_checkpoint_of_another_fit_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    saving = Saving(tmp_path, "toy", list, lambda kept: None)
    fit(make_model("mean"), toy_queries(16), saving=saving)
    with pytest.raises(UserError, match=r"is of another fit \(there: 16 queries, .* here: 17 queries"):
        fit(make_model("mean"), toy_queries(17), saving=saving)
    model = make_model("mean")
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(UserError, match="is of another fit"):
        fit(model, toy_queries(16), saving=saving)


def test_numbers_that_go_wrong_name_their_step(make_model: MakeModel) -> None:
    model = make_model("mean")
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(BadNumber, match=r"the loss is nan at step 1 of 2 of a stage.*the weights themselves are not finite"):
        fit(model, toy_queries(16))


def test_a_step_whose_numbers_go_wrong_is_left_out_within_the_budget(make_model: MakeModel) -> None:
    def broken_at(*bad: int) -> tuple[RewardModel, Callable[[], torch.Tensor]]:
        model, calls = make_model("mean"), iter(range(100))
        return model, lambda: model.head.weight.sum() * (float("nan") if next(calls) in bad else 0.0)

    model, penalty = broken_at(1)
    steps, looks = fit(model, toy_queries(32), penalty=penalty)
    assert [step.samples for step in steps] == [8, 24, 32] and looks == [0, 16, 32]
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    model, penalty = broken_at(0, 1)
    with pytest.raises(BadNumber, match=r"step 2 of 4 of a stage.*2 in a row \(guards.in_a_row\); lower the stage's"):
        fit(model, toy_queries(32), penalty=penalty, guards=GuardsConfig(in_a_row=2))
    model, penalty = broken_at(0, 1)
    with pytest.raises(BadNumber, match="the number of steps with a finite gradient is 0 at the end of a stage of 2"):
        fit(model, toy_queries(16), penalty=penalty)


def test_queries_without_a_comparison_are_refused(make_model: MakeModel) -> None:
    tied = Query("t", (BOS,), ((5,), (6,)), (1.0, 1.0))
    with pytest.raises(ValueError, match="a comparison each"):
        fit(make_model("mean"), [tied])


def test_springs_hold_a_fit_back(make_model: MakeModel) -> None:
    moved = []
    for coef in (0.0, 30.0):
        model = make_model("mean")
        start = weights(model)
        penalty = QuadraticPenalty.at(list(model.parameters()), None, coef)
        fit(model, toy_queries(50), penalty=penalty)
        moved.append(sum(float((value - start[name]).square().sum()) for name, value in model.state_dict().items()))
    assert moved[1] < 0.5 * moved[0]


def test_response_sequences_are_laid_out_query_by_query() -> None:
    first, second = toy_queries(2)
    assert response_sequences([first, second]) == [
        *((first.prompt_ids, ids) for ids in first.responses),
        *((second.prompt_ids, ids) for ids in second.responses),
    ]
