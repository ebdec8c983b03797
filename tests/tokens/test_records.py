"""A rollout knows which weights drew which of its tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokens.records import Prompt, Rollout, Swap

ROLLOUT = Rollout(Prompt("p", "", (1,)), 0, (5, 6, 7, 2), "", (-1.0,) * 4, policy_version=3, finished=True)


def test_age_is_the_mean_over_tokens() -> None:
    assert ROLLOUT.age(3) == 0 and ROLLOUT.age(5) == 2
    assert replace(ROLLOUT, swaps=(Swap(1, 4), Swap(3, 5))).age(5) == (2 + 1 + 1 + 0) / 4
    assert replace(ROLLOUT, swaps=(Swap(0, 4),)).age(4) == 0, "it waited while the new weights came"


@pytest.mark.parametrize(
    "swaps", [(Swap(4, 4),), (Swap(-1, 4),), (Swap(1, 3),), (Swap(2, 4), Swap(2, 5)), (Swap(1, 5), Swap(2, 4))], ids=str
)
def test_swaps_that_cannot_be_are_refused(swaps: tuple[Swap, ...]) -> None:
    with pytest.raises(ValueError, match=r"p/0: swaps must rise .* from version 3 and within 4 tokens"):
        replace(ROLLOUT, swaps=swaps)
