"""Turns on an engine: a change goes before the next step, and nobody is kept out for ever."""

from __future__ import annotations

import threading

import pytest

from actors.turns import Turns


def test_a_change_waits_for_one_step_and_no_more() -> None:
    turns, log = Turns(), list[str]()
    inside, go_on = threading.Event(), threading.Event()

    def change() -> None:
        with turns.change():
            log.append("change")

    def steps() -> None:
        for number in range(3):
            with turns.step():
                log.append(f"step {number}")
                if number == 0:
                    inside.set()
                    go_on.wait()
                    while not turns._changes:
                        pass

    stepping = threading.Thread(target=steps)
    stepping.start()
    assert inside.wait(10)
    changing = threading.Thread(target=change)
    changing.start()
    go_on.set()
    for thread in (stepping, changing):
        thread.join(10)
    assert log == ["step 0", "change", "step 1", "step 2"]


def test_a_failure_gives_the_turn_back() -> None:
    turns = Turns()
    for turn in (turns.step, turns.change, turns.step):
        with pytest.raises(KeyError), turn():
            raise KeyError


def test_several_threads_never_hold_it_together() -> None:
    turns, holders, most = Turns(), [0], [0]

    def work(turn: str) -> None:
        for _ in range(300):
            with getattr(turns, turn)():
                holders[0] += 1
                most[0] = max(most[0], holders[0])
                holders[0] -= 1

    threads = [threading.Thread(target=work, args=(turn,)) for turn in ("step", "step", "change", "change")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and most == [1]
