"""Choosing the next pair: against determinants, against draws, and nothing twice."""

import math

import numpy as np
import pytest
import torch

from rm.asking import choose, drawn, expected_accuracy, information, updated
from rm.features_config import WAYS, By
from rm.person import Person, fit_person

N, D = 40, 4


def rows(number: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def person() -> Person:
    return fit_person(rows(6, seed=1), 0.5, torch.ones(D, dtype=torch.float64))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nobody() -> torch.Tensor:
    return torch.zeros(N, dtype=torch.bool)


def test_information_is_what_an_answer_does_to_the_determinant(person: Person) -> None:
    differences, precision = rows(), torch.linalg.inv(person.covariance)
    for row, gain in zip(differences, information(differences, person, person.weights), strict=True):
        p = 1 / (1 + math.exp(-float(row @ person.weights)))
        after = precision + p * (1 - p) * torch.outer(row, row)
        assert float(gain) == pytest.approx(float(torch.linalg.det(after) / torch.linalg.det(precision)) - 1, rel=1e-9)


def test_the_pair_chosen_by_information_leaves_the_smallest_covariance(person: Person) -> None:
    differences, asked, precision = rows(), nobody(), torch.linalg.inv(person.covariance)
    for _ in range(5):
        left = [i for i in range(N) if not asked[i]]
        rewards = (differences @ person.weights).sigmoid()
        after = [
            torch.linalg.det(
                torch.linalg.inv(precision + rewards[i] * (1 - rewards[i]) * torch.outer(differences[i], differences[i]))
            )
            for i in left
        ]
        best = choose(differences, asked, person, "information", seeded())
        assert best == left[int(torch.stack(after).argmin())]
        asked[best] = True


def test_information_by_hand() -> None:
    person = Person(
        torch.tensor([math.log(3), 0.0], dtype=torch.float64), torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    )
    differences = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(
        information(differences, person, person.weights), torch.tensor([0.375, 1.0, 0.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("by", WAYS)
def test_no_pair_comes_twice_and_a_seed_gives_one_order(person: Person, by: By) -> None:
    differences = rows()

    def order(seed: int) -> list[int]:
        asked, generator, places = nobody(), seeded(seed), []
        while not asked.all():
            places.append(choose(differences, asked, person, by, generator))
            asked[places[-1]] = True
        return places

    assert sorted(order(1)) == list(range(N)) and order(1) == order(1)
    assert (order(1) == order(2)) == (by == "information")
    with pytest.raises(ValueError, match="every pair of the pool was asked"):
        choose(differences, ~nobody(), person, by, seeded())


@pytest.mark.parametrize("by", WAYS)
def test_pairs_at_the_end_that_were_asked_change_nothing(person: Person, by: By) -> None:
    more = torch.cat([rows(), 100 * rows(5, seed=9)])
    asked = torch.cat([nobody(), torch.ones(5, dtype=torch.bool)])
    assert choose(more, asked, person, by, seeded(4)) == choose(rows(), nobody(), person, by, seeded(4))


def test_thompson_takes_the_pair_that_tells_most_at_its_draw(person: Person) -> None:
    weights, covariance = drawn(person, seeded(7)).numpy(), person.covariance.numpy()
    p = 1 / (1 + np.exp(-(rows().numpy() @ weights)))
    tells = [p[i] * (1 - p[i]) * row @ covariance @ row for i, row in enumerate(rows().numpy())]
    assert choose(rows(), nobody(), person, "thompson", seeded(7)) == int(np.argmax(tells))


@pytest.mark.parametrize("by", ["information", "thompson"])
def test_a_pair_of_equal_features_comes_last(person: Person, by: By) -> None:
    differences, asked = rows(6), torch.zeros(6, dtype=torch.bool)
    differences[2] = 0
    order = []
    for seed in range(6):
        order.append(choose(differences, asked, person, by, seeded(seed)))
        asked[order[-1]] = True
    assert order[-1] == 2


def test_draws_have_the_persons_mean_and_covariance(person: Person) -> None:
    generator = seeded(3)
    draws = torch.stack([drawn(person, generator) for _ in range(20_000)])
    torch.testing.assert_close(draws.mean(0), person.weights, rtol=0, atol=0.04)
    torch.testing.assert_close(draws.T.cov(), person.covariance, rtol=0.06, atol=0.05)


def test_random_draws_every_pair_that_is_left_alike(person: Person) -> None:
    asked, generator = nobody(), seeded(5)
    asked[4:] = True
    counts = np.bincount([choose(rows(), asked, person, "random", generator) for _ in range(2_000)], minlength=N)
    assert not counts[4:].any() and counts[:4].min() > 430  # 500 each; a standard deviation is 19


def test_expected_accuracy_by_hand_and_when_sure() -> None:
    covariance = torch.diag(torch.tensor([1e-9, 8 / math.pi], dtype=torch.float64))
    person = Person(torch.tensor([-math.log(3), math.sqrt(2) * math.log(4)], dtype=torch.float64), covariance)
    assert expected_accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), person) == pytest.approx((0.75 + 0.8) / 2, rel=1e-6)


def test_going_on_from_a_prior_is_the_fit_itself_and_from_a_posterior_comes_near_it() -> None:
    answers, towards = rows(30, seed=2), torch.full((D,), 0.3, dtype=torch.float64)
    whole = fit_person(answers, 2.0, towards)
    from_prior = updated(fit_person(answers[:0], 2.0, towards), answers)
    torch.testing.assert_close(from_prior.weights, whole.weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(from_prior.covariance, whole.covariance, rtol=1e-6, atol=1e-8)
    one_by_one = fit_person(answers[:0], 2.0, towards)
    for row in answers:
        one_by_one = updated(one_by_one, row[None])
    apart = (one_by_one.weights - whole.weights) / whole.covariance.diag().sqrt()
    assert float(apart.abs().max()) < 0.35  # of a standard deviation
    torch.testing.assert_close(updated(whole, answers[:0]).weights, whole.weights)


def test_bad_input(person: Person) -> None:
    with pytest.raises(ValueError, match="unknown way to choose a pair 'luck': expected one of information, thompson, random"):
        choose(rows(), nobody(), person, "luck", seeded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(3,\) marks and \(4,\) weights"):
        choose(rows(), nobody()[:3], person, "random", seeded())
