"""The comparison of ways to choose a pair: what is counted, on people made up here."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import asking
from benchmarks.experiments.people_data import People, Texts
from rm.features_config import WAYS, By

T, D = 60, 3


def people() -> tuple[People, torch.Tensor]:
    """Two people whose gold reward is linear in the features, on texts of two splits."""
    phi = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tastes = np.array([[2.0, 0.0, 0.0], [0.0, -2.0, 1.0]])
    names = tuple(map(str, range(T)))
    start = {"train": (0, T // 2, 3), "validation": (T // 2, T // 2, 3), "test": (T // 2, T, 3)}
    texts = Texts(names, names, np.array(["x"] * T), start, (), np.zeros((T, 12)))  # type: ignore[arg-type]
    gold = tastes @ phi.numpy().T
    return People(texts, ("ann", "bob"), 1, gold, gold.mean(0), 3.0, seed=4), phi


def test_answers_until_an_accuracy_is_reached() -> None:
    flat = [0.5] * (asking.ASKED + 1)
    assert asking.needed(flat, 0.5) == 0 and asking.needed(flat, 0.6) == math.inf
    rising = [0.5, 0.7, 0.6, 0.8, *[0.8] * (asking.ASKED - 3)]
    assert asking.needed(rising, 0.65) == pytest.approx(0.75) and asking.needed(rising, 0.75) == pytest.approx(2.75)
    assert [asking.fewer(rising, rising, n) for n in (1, 3)] == [0, 0]  # against itself, whether or not a curve dips
    assert asking.fewer(rising, flat, 3) == 3 - asking.ASKED


def test_a_pool_holds_a_pair_once_however_it_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "POOL", 15)
    pool = asking.pool_of(people()[0].texts, 1)
    assert len({frozenset(map(int, pair)) for pair in pool}) == len(pool) == 15


@pytest.mark.parametrize("by", WAYS)
def test_a_person_who_follows_the_features_becomes_known(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ASKED", 20)
    who, phi = people()
    pool = who.texts.pairs("train", 40, random.Random(0))
    accuracy, expected, foretold = asking.asked(who, 1, phi, pool, torch.zeros(D, dtype=torch.float64), by)
    assert accuracy[0] == 0.5 and accuracy[-1] > 0.85  # before any answer all rewards are equal
    assert expected[0] == 0.5 and ((foretold >= 0) & (foretold <= 1)).all()
    # tastes as strong as these (|w| is 6.7) are far outside the prior N(0, I): the profile grows sure, and is modest
    assert 0.65 < expected[-1] <= foretold[-1] and expected[-1] > expected[3]


def test_the_report_counts_what_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = range(asking.ASKED + 1)
    gains = {"information": 0.02, "thompson": 0.01, "random": 0.01}
    rows = [
        {"by": by, "seed": seed, "expected": [0.7] * len(steps), "foretold": [0.6 + 0.01 * seed] * len(steps),
         "accuracy": [min(0.9, 0.5 + 0.001 * seed + gain * n) for n in steps]}
        for by, gain in gains.items() for seed in (1, 2, 3)
    ]  # fmt: skip
    asking.report(rows, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| random | +0.0 ± 0.0 |") for line in said)
    saved = next(i for i, line in enumerate(said) if line.startswith("answers fewer"))
    assert said[saved + 3].startswith("| information | **+5.0 ± 0.0** | **+10.0 ± 0.0** |")
    assert said[saved + 4].startswith("| thompson | +0.0 ± 0.0 |")
    assert any(line.startswith("| random | 0.080 ± 0.025 |") for line in said)
    assert (tmp_path / "asking.png").stat().st_size > 10_000
