"""What a fit descends: each pair's margin and smoothing, dropout views, and the seed that everything follows from."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rm.batches import features_of, pair_sequences, score_sequences, scores_of
from rm.config import ContrastiveConfig, RewardConfig
from rm.contrastive import simcse_loss, swav_loss
from rm.losses import bradley_terry_loss, pair_accuracy, preference_loss
from rm.model import RewardModel
from rm.objective import DROPOUT_SEED_OFFSET, PreferenceObjective
from tests.rm.toy import count_rows
from tokens.errors import UserError
from tokens.ranks import ALONE, Ranks
from tokens.records import Pair

MakeModel = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
GOOD, BAD = range(10, 25), range(25, 40)
VARIANTS = [(method, on) for method in ("simcse", "swav") for on in ("pairs", "differences")]


def response(words: range, generator: torch.Generator) -> tuple[int, ...]:
    length = int(torch.randint(2, 7, (1,), generator=generator))
    return (*(words[int(i)] for i in torch.randint(len(words), (length,), generator=generator)), EOS)


def toy_pairs(n: int, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [Pair(f"p{i}", (BOS, 5 + i % 4), response(GOOD, generator), response(BAD, generator)) for i in range(n)]


def weighted(pairs: list[Pair]) -> list[Pair]:
    return [replace(pair, margin=0.3 * (i % 4) - 0.4, smoothing=0.1 * (i % 3)) for i, pair in enumerate(pairs)]


def contrast(method: str, on: str = "pairs", dropout: float = 0.05, **given: Any) -> ContrastiveConfig:
    prototypes = 10 if method == "swav" else None
    return ContrastiveConfig.model_validate(
        {"method": method, "on": on, "dropout": dropout, "num_prototypes": prototypes, "beta": 0.3} | given
    )


def objective(model: RewardModel, seed: int = 5, **reward: Any) -> PreferenceObjective:
    return PreferenceObjective(model, RewardConfig(**reward), PAD, ALONE, seed)


def gradients(model: RewardModel, loss: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


# Margin and smoothing


def test_without_either_it_is_the_plain_loss_to_the_bit(make_model: MakeModel) -> None:
    model, pairs = make_model("mean"), toy_pairs(9)
    chosen, rejected = scores_of(model, pair_sequences(pairs), PAD, 4, share=True).chunk(2)
    plain = bradley_terry_loss(chosen, rejected, 9)
    loss = objective(model, microbatch_size=4)(pairs)
    assert loss.equal(plain)
    assert gradients(model, loss).equal(gradients(model, plain))


@pytest.mark.parametrize(
    ("reward", "computed"),
    [
        ({}, 8 + 2 * 3),
        ({"dropout": 0.1}, 2 * (8 + 3)),
        ({"lora": {"rank": 2, "dropout": 0.1}}, 2 * (8 + 3)),
        ({"packing": True}, 2 * (8 + 3)),
    ],
    ids=["plain", "dropout", "adapters' dropout", "packed"],
)
def test_chosen_and_rejected_share_their_prompt_where_nothing_forbids_it(
    make_model: MakeModel, reward: dict[str, Any], computed: int
) -> None:
    model, seen = make_model("mean"), list[int]()
    prompt = (1, 5, 6, 7, 8, 9, 10, 11)
    pairs = [Pair(f"p{i}", (*prompt[:-1], 11 + i), (20, 21, 2), (22, 23, 2)) for i in range(4)]
    fit_by = objective(model, **reward)
    fit_by(pairs)  # tries out what the model can do
    model.model.base_model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    fit_by(pairs)
    assert sum(seen) == 4 * computed


def test_each_pairs_margin_and_smoothing_reach_the_loss(make_model: MakeModel) -> None:
    model, pairs = make_model("mean"), weighted(toy_pairs(9))
    chosen, rejected = score_sequences(model, pair_sequences(pairs), 32, PAD).chunk(2)
    margin, smoothing = torch.tensor([p.margin for p in pairs]), torch.tensor([p.smoothing for p in pairs])
    of_pairs = objective(model)
    loss = of_pairs(pairs)
    torch.testing.assert_close(loss, preference_loss(chosen, rejected, margin, smoothing, 9), rtol=0, atol=1e-6)
    assert abs(float(loss.detach() - bradley_terry_loss(chosen, rejected, 9))) > 1e-3
    assert float(of_pairs.accuracy) == float(pair_accuracy(chosen, rejected))
    assert of_pairs.parts == {} and of_pairs.parameters() == []


@pytest.mark.parametrize("num_pairs", [1, 7])
def test_the_parts_of_two_ranks_sum_to_the_whole(make_model: MakeModel, num_pairs: int) -> None:
    model, pairs = make_model("mean"), weighted(toy_pairs(num_pairs))
    whole = objective(model)
    loss = whole(pairs)
    mesh = cast(DeviceMesh, SimpleNamespace(size=lambda: 2))
    parts = [PreferenceObjective(model, RewardConfig(), PAD, Ranks(rank, 2, mesh), 5) for rank in range(2)]
    torch.testing.assert_close(sum(part(pairs) for part in parts), loss, rtol=0, atol=1e-6)
    assert sum(float(part.accuracy) for part in parts) == pytest.approx(float(whole.accuracy))


@pytest.mark.parametrize(("most", "sizes"), [(None, [18]), (2, [2] * 9), (5, [4, 4, 4, 4, 2]), (100, [18])])
def test_terms_sum_to_the_loss_and_hold_no_more_sequences_than_asked_for(
    make_model: MakeModel, most: int | None, sizes: list[int]
) -> None:
    model, pairs = make_model("mean", dtype=torch.float64), weighted(toy_pairs(9))
    whole = objective(model)
    loss = whole(pairs)
    expected = gradients(model, loss)
    rows = count_rows(model)
    of_pairs, seen = objective(model, backward_size=most), []
    terms = []
    for term in of_pairs.terms(pairs):
        terms.append(term())
        seen.append(sum(rows))
        rows.clear()
    assert seen == sizes
    torch.testing.assert_close(sum(terms), loss, rtol=0, atol=1e-8)  # Llama's norms round to float32
    torch.testing.assert_close(sum(gradients(model, term) for term in terms), expected, rtol=0, atol=1e-8)
    assert float(of_pairs.accuracy) == pytest.approx(float(whole.accuracy))


@pytest.mark.parametrize("num_pairs", [1, 7])
def test_two_ranks_make_as_many_terms_of_as_many_sequences(make_model: MakeModel, num_pairs: int) -> None:
    model, pairs = make_model("mean"), weighted(toy_pairs(num_pairs))
    mesh, reward = cast(DeviceMesh, SimpleNamespace(size=lambda: 2)), RewardConfig(backward_size=4)
    loss, rows = objective(model)(pairs), count_rows(model)
    parts, passes = [], []
    for rank in range(2):
        rows.clear()
        parts += [term() for term in PreferenceObjective(model, reward, PAD, Ranks(rank, 2, mesh), 5).terms(pairs)]
        passes.append(list(rows))
    assert passes[0] == passes[1] and max(passes[0]) <= 4
    torch.testing.assert_close(sum(parts), loss, rtol=0, atol=1e-6)


def test_what_compares_all_rows_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"backward_size is 8, and contrastive\.method simcse compares all rows"):
        RewardConfig(backward_size=8, contrastive=contrast("simcse"))


# Contrastive


@pytest.mark.parametrize(("method", "on"), VARIANTS)
def test_the_total_is_the_sum_assembled_by_hand_on_the_same_masks(make_model: MakeModel, method: str, on: str) -> None:
    model, pairs = make_model("mean"), weighted(toy_pairs(12))
    both = objective(model, seed=8, contrastive=contrast(method, on, dropout=0.2), microbatch_size=5)
    loss = both(pairs)
    drawn = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(8 + DROPOUT_SEED_OFFSET)))
    torch.manual_seed(drawn)
    with model.dropout(0.2):
        first, second = (features_of(model, pair_sequences(pairs), PAD, 5) for _ in range(2))
    assert not first.allclose(second, atol=1e-3)
    margin, smoothing = torch.tensor([p.margin for p in pairs]), torch.tensor([p.smoothing for p in pairs])
    preferences = [preference_loss(*model.score(view).chunk(2), margin, smoothing, 12) for view in (first, second)]
    rows = [view if on == "pairs" else view[:12] - view[12:] for view in (first, second)]
    if method == "simcse":
        term = simcse_loss(rows[0], rows[1], 0.05)
    else:
        (prototypes,) = both.parameters()
        term = swav_loss(rows[0], rows[1], prototypes, 0.1, 0.05, 3)
    expected = sum(preferences) / 2 + 0.3 * term
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=0, atol=1e-5)
    assert both.parts["reward/contrastive"] == pytest.approx(float(term.detach()), abs=1e-5)
    assert both.parts["reward/preference_loss"] == pytest.approx(sum(float(p.detach()) for p in preferences) / 2, abs=1e-5)
    assert both.parts["reward/view_cos"] < 0.999
    assert ("reward/prototypes_effective" in both.parts) == (method == "swav")
    accuracies = [float(pair_accuracy(*model.score(view).chunk(2))) for view in (first, second)]
    assert float(both.accuracy) == pytest.approx(sum(accuracies) / 2)


@pytest.mark.parametrize(("method", "on"), VARIANTS)
def test_neither_microbatch_nor_packing_matters_where_dropout_is_off(make_model: MakeModel, method: str, on: str) -> None:
    """A rate so small that no mask ever drops anything."""
    model, pairs = make_model("mean"), weighted(toy_pairs(12))
    settings = contrast(method, on, dropout=1e-12)
    whole = objective(model, contrastive=settings, microbatch_size=64)(pairs)
    for other in ({"microbatch_size": 5}, {"microbatch_size": 7, "packing": True}):
        loss = objective(model, contrastive=settings, **other)(pairs)
        torch.testing.assert_close(loss, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients(model, loss), gradients(model, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "on"), VARIANTS)
def test_training_lowers_the_loss(make_model: MakeModel, method: str, on: str) -> None:
    model, pairs = make_model("mean"), toy_pairs(16)
    total = objective(model, contrastive=contrast(method, on, dropout=0.1))
    prototypes = [p.detach().clone() for p in total.parameters()]
    optimizer = torch.optim.AdamW([*model.parameters(), *total.parameters()], lr=3e-3, weight_decay=0.0)
    seen: list[dict[str, float]] = []
    for _ in range(30):
        loss = total(pairs)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        seen.append({"total": float(loss.detach()), **total.parts})

    def mean(name: str, steps: list[dict[str, float]]) -> float:
        return sum(step[name] for step in steps) / len(steps)

    for name in ("total", "reward/contrastive", "reward/preference_loss"):
        assert mean(name, seen[-5:]) < 0.9 * mean(name, seen[:5]), name
    assert float(pair_accuracy(*score_sequences(model, pair_sequences(toy_pairs(40, seed=9)), 64, PAD).chunk(2))) > 0.9
    assert all(not left.equal(right) for left, right in zip(prototypes, total.parameters(), strict=True))


def test_prototypes_are_trained_beside_the_model_and_are_no_part_of_it(make_model: MakeModel) -> None:
    model = make_model("mean")
    names = set(model.state_dict())
    swav = objective(model, contrastive=contrast("swav"))
    (prototypes,) = swav.parameters()
    assert prototypes.shape == (10, 32) and set(model.state_dict()) == names
    torch.autograd.backward(swav(toy_pairs(12)))
    assert prototypes.grad is not None and bool(prototypes.grad.any())
    assert objective(model, contrastive=contrast("simcse")).parameters() == []


def test_a_last_batch_too_small_has_the_preference_loss_alone(make_model: MakeModel) -> None:
    swav = objective(make_model("mean"), contrastive=contrast("swav", "differences"))
    loss = swav(toy_pairs(5))
    assert set(swav.parts) == {"reward/preference_loss"}
    assert float(loss.detach()) == swav.parts["reward/preference_loss"]
    swav(toy_pairs(6))
    assert "reward/contrastive" in swav.parts


def test_what_cannot_work_is_refused_before_any_step(make_model: MakeModel) -> None:
    model = make_model("mean")
    with pytest.raises(UserError, match=r"reward\.batch_size.*num_prototypes"):
        objective(model, contrastive=ContrastiveConfig(method="swav"), batch_size=8)
    with pytest.raises(UserError, match=r"reward\.dropout"):
        objective(model, contrastive=contrast("simcse"), dropout=0.1)
    mesh = cast(DeviceMesh, SimpleNamespace(size=lambda: 2))
    with pytest.raises(UserError, match="2 processes"):
        PreferenceObjective(model, RewardConfig(contrastive=contrast("simcse")), PAD, Ranks(0, 2, mesh), 5)


# Dropout and seeds


@pytest.mark.parametrize("reward", [{"dropout": 0.2}, {"contrastive": contrast("simcse", dropout=0.2)}])
def test_masks_follow_from_the_seed_alone(make_model: MakeModel, reward: dict[str, Any]) -> None:
    model, pairs = make_model("mean"), toy_pairs(12)

    def losses(seed: int) -> list[float]:
        of_seed = objective(model, seed=seed, **reward)
        return [float(of_seed(pairs).detach()) for _ in range(3)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = losses(5)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert losses(5) == one
    assert losses(6) != one
    assert len(set(one)) == 3  # every call draws new masks


def test_dropout_alone_is_one_view_of_the_preference_loss(make_model: MakeModel) -> None:
    model, pairs = make_model("mean"), toy_pairs(12)
    dropped = objective(model, seed=8, dropout=0.2)
    loss = dropped(pairs)
    drawn = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(8 + DROPOUT_SEED_OFFSET)))
    torch.manual_seed(drawn)
    with model.dropout(0.2):
        chosen, rejected = scores_of(model, pair_sequences(pairs), PAD, 32).chunk(2)
    assert loss.equal(bradley_terry_loss(chosen, rejected, 12))
    off = objective(model, seed=8)(pairs)
    assert abs(float((loss - off).detach())) > 1e-4
    assert dropped.parts == {}
    assert objective(model, seed=9)(pairs).equal(off)  # without dropout the seed says nothing
