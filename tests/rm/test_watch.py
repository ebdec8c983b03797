"""Looking at a fit while it runs, and stopping it early."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rm.model import RewardModel
from rm.training import Watch
from tests.rm.toy import MakeModel, fit, shifted, toy_pairs, weights


class Score:
    """A measurement that says what it was told to, and remembers the weights that it saw."""

    def __init__(self, model: RewardModel, values: Sequence[float]) -> None:
        self.model, self.values = model, list(values)
        self.steps: list[int] = []
        self.seen: list[Tensor] = []

    def __call__(self, step: int) -> float:
        self.steps.append(step)
        self.seen.append(weights(self.model))
        return self.values[len(self.steps) - 1]


def test_a_watched_fit_is_measured_every_few_steps_and_at_its_end(make_model: MakeModel) -> None:
    model, plain = make_model(), make_model()
    score = Score(model, [0.9, 0.1, 0.2, 0.3])
    result, _ = fit(model, toy_pairs(80), epochs=1, watch=Watch(3, score, None))
    fit(plain, toy_pairs(80), epochs=1)
    assert score.steps == [3, 6, 9, 10]
    assert result.best_step is None and result.num_steps == 10
    assert torch.equal(weights(model), weights(plain))  # looking changes nothing, and without patience the last weights stay
    assert torch.equal(weights(model), score.seen[-1])


@pytest.mark.parametrize(
    ("values", "patience", "measured", "best"),
    [
        ([0.5, 0.7, 0.7, 0.6, 0.9], 2, [2, 4, 6, 8], 1),  # the first of equals; stops before the fifth
        ([0.5, 0.7, 0.6, 0.8, 0.7], 2, [2, 4, 6, 8, 10], 3),
        ([0.5, 0.6, 0.7, 0.8, 0.9], 1, [2, 4, 6, 8, 10], 4),
    ],
)
def test_the_best_weights_are_kept(
    make_model: MakeModel, values: list[float], patience: int, measured: list[int], best: int
) -> None:
    model = make_model()
    score = Score(model, values)
    result, steps = fit(model, toy_pairs(80), shifted(), eta=0.1, epochs=1, watch=Watch(2, score, patience))
    assert score.steps == measured
    assert len(steps) == result.num_steps == measured[-1]
    assert result.best_step == measured[best]
    assert torch.equal(weights(model), score.seen[best])
    assert not torch.equal(score.seen[0], score.seen[1])


def test_a_bad_watch_and_a_bad_measurement_are_refused(make_model: MakeModel) -> None:
    for every, patience in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="every >= 1 and patience >= 1"):
            Watch(every, lambda step: 0.0, patience)
    with pytest.raises(FloatingPointError, match="the validation measurement is nan at step 2 of 5"):
        fit(make_model(), toy_pairs(40), epochs=1, watch=Watch(2, lambda step: math.nan, None))
