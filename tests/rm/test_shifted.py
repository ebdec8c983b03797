"""S_k: who is kept back, what a repeated response costs, and that the parts are the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rm.batches import Encoded, scores_of
from rm.config import RewardConfig
from rm.losses import difference_loss
from rm.model import RewardModel
from rm.shifted import ShiftedSamples, kept_back, num_duplicates
from rm.spread import Separation
from tests.rm.toy import count_rows
from tokens.errors import UserError
from tokens.ranks import ALONE, Ranks

PAD, BOS, EOS = 0, 1, 2
MakeModel = Callable[..., RewardModel]
Groups = list[list[Encoded]]


def samples(m: int, k: int = 3, words: int = 30, seed: int = 1) -> Groups:
    """Few words make many responses alike."""
    generator = torch.Generator().manual_seed(seed)

    def response() -> tuple[int, ...]:
        length = int(torch.randint(1, 4, (1,), generator=generator))
        return (*(10 + torch.randint(words, (length,), generator=generator)).tolist(), EOS)

    return [[((BOS, 5, 3 + i), response()) for _ in range(k)] for i in range(m)]


def shifted(model: RewardModel, groups: Groups, m: int = 4, seed: int = 5, ranks: Ranks = ALONE) -> ShiftedSamples:
    return ShiftedSamples(groups, model, RewardConfig(microbatch_size=4), m, seed, PAD, ranks)


def gradient(model: RewardModel, value: Tensor) -> Tensor:
    model.zero_grad()
    torch.autograd.backward(value)
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def test_who_is_kept_back_is_known_from_number_and_seed(make_model: MakeModel) -> None:
    groups = samples(40, k=2, words=2)
    found = shifted(make_model("mean"), groups, seed=5)
    back = kept_back(40, 5)
    assert [groups[place] for place in sorted(back)] == found.heldout and len(back) == 4
    assert [group for place, group in enumerate(groups) if place not in back] == found.groups
    assert kept_back(40, 6) != back and len(kept_back(2, 5)) == 1 and not kept_back(1, 5)


def test_repeated_responses_are_scored_once_and_count_as_before(make_model: MakeModel) -> None:
    model = make_model("mean", dtype=torch.float64)
    model._can_share = False  # Llama's norms round to float32: behind a shared prompt sums agree to 1e-8 only
    groups = samples(5, k=6, words=2)
    flat = [sequence for group in groups for sequence in group]
    assert num_duplicates(groups) == 30 - len(set(flat)) >= 5
    data = shifted(model, groups)
    assert data.duplicate_share == num_duplicates(groups) / 30
    all_scored = difference_loss(scores_of(model, flat, PAD, 4).view(5, 6))
    expected = gradient(model, all_scored)
    rows = count_rows(model)
    once = data.difference(groups)
    assert sum(rows) == len(set(flat))
    assert float(once.detach()) == pytest.approx(float(all_scored.detach()), abs=1e-12)
    torch.testing.assert_close(gradient(model, once), expected, rtol=0, atol=1e-12)


def test_j_of_all_alike_is_its_least_and_has_no_gradient(make_model: MakeModel) -> None:
    model = make_model("last", dtype=torch.float64)
    group: list[Encoded] = [((BOS, 5), (10, EOS))] * 4
    value = shifted(model, [group]).difference([group])
    assert float(value.detach()) == 3 / 8
    assert not bool(gradient(model, value).any())


@pytest.mark.parametrize(("m", "kept_back"), [(1, 0), (2, 1), (9, 1), (19, 1), (20, 2), (45, 4)])
def test_a_tenth_of_the_prompts_is_kept_back_and_never_drawn(make_model: MakeModel, m: int, kept_back: int) -> None:
    groups = samples(m)
    data = shifted(make_model(), groups)
    assert len(data.heldout) == kept_back
    assert sorted([*data.heldout, *data.groups]) == sorted(groups)
    drawn = [group[0][0] for batch in itertools.islice(data.batches, 30) for group in batch]
    assert set(drawn) == {group[0][0] for group in data.groups}
    if m == 45:
        assert shifted(make_model(), groups).heldout == data.heldout
        assert shifted(make_model(), groups, seed=6).heldout != data.heldout


def test_the_parts_add_up_to_j_of_all_that_are_not_kept_back(make_model: MakeModel) -> None:
    model = make_model("mean", dtype=torch.float64)
    data = shifted(model, samples(12), m=4)  # 11 prompts: 4, 4 and 3
    parts = [part() for part in data.parts()]
    assert len(parts) == 3
    flat = [sequence for group in data.groups for sequence in group]
    whole = difference_loss(scores_of(model, flat, PAD, 100).view(11, 3))
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), abs=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize(("most", "sizes"), [(None, [33]), (2, [3] * 11), (7, [6] * 5 + [3])])
def test_terms_sum_to_j_and_divide_no_prompt(make_model: MakeModel, most: int | None, sizes: list[int]) -> None:
    model = make_model("mean", dtype=torch.float64)
    data = shifted(model, samples(12), m=11)
    data.reward = RewardConfig(backward_size=most)
    whole = data.difference(data.groups)
    expected, rows = gradient(model, whole), count_rows(model)
    terms, seen = [], []
    for term in data.terms(data.groups):
        terms.append(term())
        seen.append(sum(rows))
        rows.clear()
    assert sum(seen) == sum(len(set(group)) for group in data.groups)
    assert [most_of >= held > 0 for most_of, held in zip(sizes, seen, strict=True)] == [True] * len(sizes)
    assert float(sum(terms).detach()) == pytest.approx(float(whole.detach()), abs=1e-12)  # type: ignore[union-attr]
    torch.testing.assert_close(sum(gradient(model, term) for term in terms), expected, rtol=0, atol=1e-12)


def test_what_is_measured_is_kept_back(make_model: MakeModel) -> None:
    model = make_model("mean")
    data = shifted(model, samples(25, k=4, words=2))
    flat = [sequence for group in data.heldout for sequence in group]
    with torch.no_grad():
        expected = Separation.of(scores_of(model, flat, PAD, 100).view(2, 4))
    found = data.measure()
    assert found.difference == pytest.approx(expected.difference, abs=1e-6)
    assert found.spread == pytest.approx(expected.spread, abs=1e-5)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_all_ranks_make_equally_many_passes_and_their_parts_add_up(make_model: MakeModel, m: int) -> None:
    """Without processes: each rank's part is computed here in turn. Repeats lie unevenly on the ranks."""

    class ThreeProcesses:
        def size(self) -> int:
            return 3

    alike: list[Encoded] = [((BOS, 4), (10, EOS))] * 6
    groups = [alike if i % 2 else group for i, group in enumerate(samples(m, k=6))]
    model = make_model("mean", dtype=torch.float64)
    whole = shifted(model, groups).difference(groups)
    rows = count_rows(model)
    parts, passes = [], []
    for rank in range(3):
        rows.clear()
        data = shifted(model, groups, ranks=Ranks(rank, 3, cast(DeviceMesh, ThreeProcesses())))
        parts.append(data.difference(groups))
        passes.append(len(rows))
    assert len(set(passes)) == 1
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), abs=1e-12)  # type: ignore[union-attr]


def test_bad_samples_are_refused(make_model: MakeModel) -> None:
    good = samples(3)
    mixed: Groups = [[((BOS, 5), (10, EOS)), ((BOS, 6), (11, EOS))]]
    cases: list[tuple[Groups, str]] = [
        ([], "at least 1"),
        (samples(2, k=1), r"k >= 2 .* got \[1\]"),
        ([*good, good[0][:2]], r"same number .* got \[2, 3\]"),
        (mixed, "mixes responses to different prompts"),
    ]
    for groups, message in cases:
        with pytest.raises(UserError, match=message):
            shifted(make_model(), groups)
