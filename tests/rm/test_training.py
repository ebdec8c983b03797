"""Fitting: order of the data, what eta does, learning, and what is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rm.batches import score_sequences
from rm.config import MetaConfig, RewardConfig
from rm.records import RewardStep
from rm.training import fit_reward_model, learning_rate_factor
from rm.validation import score_sets
from tests.rm.toy import BOS, EOS, PAD, MakeModel, ascended_on, count_rows, fit, response, shifted, toy_pairs, weights
from tokens.errors import UserError
from tokens.records import SequenceBatch


def test_it_learns_a_separable_toy(make_model: MakeModel) -> None:
    model = make_model("mean")
    held_out = toy_pairs(60, seed=9)
    before = score_sets(model, {"held out": held_out}, 16, PAD)["held out"]
    result, steps = fit(model, toy_pairs(64), epochs=3)
    after = score_sets(model, {"held out": held_out}, 16, PAD)["held out"]
    assert before.accuracy < 0.9 < after.accuracy
    assert after.loss < 0.5 * before.loss
    assert result.num_steps == len(steps) == 24
    assert result.loss == pytest.approx(sum(s.loss for s in steps[-6:]) / 6)
    assert result.accuracy == pytest.approx(sum(s.accuracy for s in steps[-6:]) / 6)
    assert result.meta is None
    assert "reward/J" not in steps[0].as_dict()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_eta_zero_is_vanilla_and_sees_the_pairs_in_the_same_order(make_model: MakeModel, pooling: str) -> None:
    pairs = toy_pairs(20)
    vanilla, zero = make_model(pooling), make_model(pooling)
    _, plain = fit(vanilla, pairs)
    _, meta = fit(zero, pairs, shifted(), eta=0.0)
    assert [(s.loss, s.accuracy, s.lr) for s in plain] == [(s.loss, s.accuracy, s.lr) for s in meta]
    assert torch.equal(weights(vanilla), weights(zero))


@pytest.mark.parametrize("with_meta", [False, True])
def test_a_fit_whose_steps_are_divided_ends_where_one_that_is_not_ends(make_model: MakeModel, with_meta: bool) -> None:
    whole, divided = make_model("mean"), make_model("mean")
    meta = shifted() if with_meta else None
    at_once = [count_rows(model) for model in (whole, divided)]
    _, steps = fit(whole, toy_pairs(20), meta)
    _, others = fit(divided, toy_pairs(20), meta, reward={"backward_size": 4})
    assert [max(rows) for rows in at_once] == [16, 4], "8 pairs, and 2"
    assert [step.accuracy for step in others] == pytest.approx([step.accuracy for step in steps])
    torch.testing.assert_close(weights(divided), weights(whole), rtol=0, atol=1e-5)


def test_eta_changes_the_weights_and_raises_j_at_the_ascended_ones(make_model: MakeModel) -> None:
    pairs = toy_pairs(20)
    vanilla, model = make_model("mean"), make_model("mean")
    fit(vanilla, pairs)
    result, steps = fit(model, pairs, shifted(), eta=0.1)
    assert float((weights(vanilla) - weights(model)).norm()) > 1e-3
    measured = [step.meta for step in steps if step.meta is not None and step.meta.difference_ascended is not None]
    assert len(measured) == 2  # the first and the last
    for step in measured:
        assert step.difference_ascended is not None
        assert step.difference_ascended > step.difference
    entry = result.as_dict()
    assert entry["J_after"] is not None
    assert entry["J_before"] is not None
    assert entry["J_after"] > entry["J_before"]
    assert entry["displacement"] == pytest.approx(steps[-1].as_dict()["reward/displacement"])  # 6 steps: the last alone


def test_j_is_taken_within_each_prompt(make_model: MakeModel) -> None:
    meta = shifted(m=5, k=3)
    _, steps = fit(make_model("mean"), toy_pairs(8), meta, eta=0.1, epochs=1)
    model, expected = make_model("mean"), 0.0
    used = ascended_on(meta)
    assert len(used) == 4
    for group in used:
        scores = score_sequences(model, group, 8, PAD).tolist()
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            expected += 2 / 9 / (1 + math.exp(-abs(scores[i] - scores[j]))) / 4
    assert steps[0].meta is not None
    assert steps[0].meta.difference == pytest.approx(expected, abs=1e-6)


def test_disabled_is_vanilla(make_model: MakeModel) -> None:
    pairs = toy_pairs(12)
    vanilla, disabled = make_model(), make_model()
    fit(vanilla, pairs)
    result, _ = fit(disabled, pairs, shifted(), eta=0.5, enabled=False)
    assert result.meta is None
    assert torch.equal(weights(vanilla), weights(disabled))


def test_a_fit_repeats_and_its_seed_matters(make_model: MakeModel) -> None:
    pairs = toy_pairs(20)
    models = [make_model() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        fit(model, pairs, shifted(), eta=0.1, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_every_pair_is_seen_once_an_epoch_and_the_short_batch_is_averaged_over_itself(make_model: MakeModel) -> None:
    model, pairs = make_model(), toy_pairs(10)
    _, steps = fit(model, pairs, epochs=2)
    assert [s.num_pairs for s in steps] == [8, 2, 8, 2]
    assert [s.step for s in steps] == [1, 2, 3, 4]
    untrained = make_model()
    one = RewardConfig(lr=1e-12, batch_size=8)
    steps = []
    fit_reward_model(untrained, pairs, None, one, MetaConfig(), 5, PAD, steps.append)
    loss = score_sets(make_model(), {"all": pairs}, 4, PAD)["all"].loss
    assert (8 * steps[0].loss + 2 * steps[1].loss) / 10 == pytest.approx(loss, abs=1e-6)


def test_every_prompt_of_s_k_comes_up_before_any_repeats(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = SequenceBatch.from_ids.__func__  # type: ignore[attr-defined]

    def spy(
        cls: type[SequenceBatch], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> SequenceBatch:
        seen.extend(tuple(p) for p in prompts if p[1] >= 40)
        return original(cls, prompts, responses, pad_id)  # type: ignore[no-any-return]

    monkeypatch.setattr(SequenceBatch, "from_ids", classmethod(spy))
    meta = [[((BOS, 40 + i), (10 + j, EOS)) for j in range(2)] for i in range(9)]
    (kept_back,) = {p for [(p, _), _] in meta} - {p for [(p, _), _] in ascended_on(meta)}
    fit(make_model(), toy_pairs(32), meta, eta=0.0, epochs=1)  # 4 steps of 4 prompts; on the first and last they are scored again
    drawn = [p for p in seen if p != kept_back][::2]
    first, again, second, third, fourth, once_more = (drawn[i : i + 4] for i in range(0, 24, 4))
    assert len(drawn) == 24 and first == again and fourth == once_more
    assert len({*first, *second}) == len({*third, *fourth}) == 8
    assert first + second != third + fourth


def test_duplicates_are_counted(make_model: MakeModel) -> None:
    meta = [[((BOS, 5), (10, EOS)), ((BOS, 5), (10, EOS)), ((BOS, 5), (10, EOS)), ((BOS, 5), (11, EOS))]] * 3
    result, steps = fit(make_model(), toy_pairs(8), meta, eta=0.1, epochs=1)
    assert steps[0].duplicates == 4
    assert steps[0].as_dict()["reward/duplicates"] == 4.0
    assert result.as_dict()["duplicate_share"] == 0.5


def test_learning_rate_by_hand(make_model: MakeModel) -> None:
    assert [learning_rate_factor(s, 10, 0.2) for s in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    assert [learning_rate_factor(s, 4, 0.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate_factor(0, 1, 0.1) == 1.0
    for step in (-1, 4):
        with pytest.raises(ValueError, match="not one of 4"):
            learning_rate_factor(step, 4, 0.1)
    _, steps = fit(make_model(), toy_pairs(40), epochs=2)
    assert [s.lr for s in steps] == pytest.approx([3e-3 * learning_rate_factor(i, 10, 0.1) for i in range(10)])


def test_no_pairs_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="no preference pairs"):
        fit(make_model(), [])


@pytest.mark.parametrize("with_meta", [False, True])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights(make_model: MakeModel, with_meta: bool) -> None:
    model = make_model()
    kept: list[Tensor] = []

    def spoil(step: RewardStep) -> None:
        if step.step == 2:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if n.endswith("score.weight")).fill_(math.nan)
            kept.append(weights(model))

    meta_config = MetaConfig(eta=0.1, prompts_per_step=4)
    with pytest.raises(FloatingPointError, match=r"is nan at step 3 of 5 .*the weights themselves are not finite"):
        fit_reward_model(
            model, toy_pairs(10), shifted() if with_meta else None, RewardConfig(batch_size=2), meta_config, 0, PAD, spoil
        )
    assert torch.equal(weights(model).nan_to_num(7.0), kept[0].nan_to_num(7.0))


def test_a_gradient_that_is_not_finite_stops_the_fit(make_model: MakeModel) -> None:
    model = make_model()
    parameter = next(model.parameters())
    parameter.register_hook(lambda g: g * math.inf)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"gradient norm .* is (nan|inf) at step 3 of 4 .*; 3 in a row"):
        fit(model, toy_pairs(16))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_do_not_depend_on_the_batch_and_keep_their_order(make_model: MakeModel, pooling: str) -> None:
    model = make_model(pooling)
    generator = torch.Generator().manual_seed(3)
    sequences = [((BOS, 5), response(range(10, 40), generator)) for _ in range(11)]
    alone = torch.cat([model(SequenceBatch.from_ids([p], [r], PAD)).detach() for p, r in sequences])
    for batch_size in (1, 4, 100):
        scores = score_sequences(model, sequences, batch_size, PAD)
        assert not scores.requires_grad
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    assert score_sequences(model, [], 4, PAD).shape == (0,)
    with pytest.raises(ValueError, match="batch_size"):
        score_sequences(model, sequences, 0, PAD)


def test_prototypes_are_trained_clipped_and_reported(make_model: MakeModel) -> None:
    contrastive = {"method": "swav", "num_prototypes": 6}
    steps: list[RewardStep] = []
    for meta in (None, shifted()):
        _, steps = fit(make_model("mean"), toy_pairs(16), meta, eta=0.1, epochs=1, reward={"contrastive": contrastive})
        row = steps[-1].as_dict()
        assert row["reward/contrastive"] > 0
        assert row["reward/loss"] == pytest.approx(row["reward/preference_loss"] + 0.1 * row["reward/contrastive"], rel=1e-5)
    assert steps[0].meta is not None
    assert steps[0].gradient_norm > steps[0].meta.gradient_norm  # the prototypes' gradient is clipped with theta's


def test_packing_and_dropout_are_passed_on(make_model: MakeModel) -> None:
    plain, packed, dropped = (make_model("mean") for _ in range(3))
    pairs, meta = toy_pairs(20), shifted()
    fit(plain, pairs, meta, eta=0.1, epochs=1)
    result, _ = fit(packed, pairs, meta, eta=0.1, epochs=1, reward={"packing": True})
    torch.testing.assert_close(weights(packed), weights(plain), rtol=0, atol=2e-4)
    assert result.as_dict()["J_heldout"] is not None
    before = torch.get_rng_state()
    fit(dropped, pairs, meta, eta=0.1, epochs=1, reward={"dropout": 0.2})
    assert float((weights(dropped) - weights(plain)).abs().max()) > 1e-3
    assert torch.equal(torch.get_rng_state(), before)
