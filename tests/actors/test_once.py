"""Work that is asked for twice is done once."""

from __future__ import annotations

import pytest

from actors.once import Once, OutOfDate


def test_work_is_done_once_and_answered_for_as_often_as_it_is_asked_for() -> None:
    done: list[int] = []
    once: Once[int] = Once()

    def work(number: int) -> int:
        return once(number, lambda: done.append(number) or 10 * number)

    assert [work(number) for number in (3, 3, 4, 4, 4, 6)] == [30, 30, 40, 40, 40, 60]
    assert done == [3, 4, 6]
    with pytest.raises(OutOfDate, match="number 4 was asked for, and number 6 is done"):
        work(4)
    once.forget()  # what the numbers counted was taken back to an earlier state
    assert work(4) == 40 and done == [3, 4, 6, 4]


def test_work_that_failed_is_not_done() -> None:
    once: Once[str] = Once()

    def fail() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        once(1, fail)
    assert once(1, lambda: "yes") == "yes"
