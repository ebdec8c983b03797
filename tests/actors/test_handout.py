"""Handing out prompts by hand: sizes of pieces, what a dead engine left, what is refused."""

from __future__ import annotations

import random

import pytest

from actors.handout import LEAST_SAMPLES, HandOut, Piece
from actors.rollout import CHUNK, occurrences
from tokens.records import Prompt, Rollout


def prompts(number: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", (1,)) for i in range(number)]


def answer(piece: Piece) -> list[Rollout]:
    """Each text says which prompt of the batch it answers, with which occurrence."""
    return [
        Rollout(prompt, sample, (2,), f"{piece.start + i}/{before}", (0.0,), piece.version, True)
        for i, (prompt, before) in enumerate(zip(piece.prompts, piece.occurrences, strict=True))
        for sample in range(piece.samples_per_prompt)
    ]


def test_how_often_a_prompt_came_before_is_counted_over_the_whole_batch() -> None:
    a, b = prompts(2)
    assert occurrences([a, b, a, a, b]) == (0, 0, 1, 2, 1)
    work = HandOut(4)
    work.add([a, b] * 16, 1, 0, 0)
    first, second = work.take(), work.take()
    assert (first.occurrences[:4], second.start, second.occurrences[:2]) == ((0, 0, 1, 1), 16, (8, 8))


def test_pieces_are_an_equal_share_of_half_of_what_is_left() -> None:
    work = HandOut(2)
    work.add(prompts(100), 4, 0, 0)
    sizes = []
    while work.waiting:
        sizes.append(len(work.take().prompts))
    assert sizes[:4] == [25, 19, 14, 11] and sum(sizes) == 100
    assert min(sizes[:-1]) == LEAST_SAMPLES // 4, "4 prompts of 4 samples; the last piece is what remains"
    work.add(prompts(1000), 1, 0, 0)
    assert len(work.take().prompts) == CHUNK, "as many as an engine takes at once"


def test_a_piece_that_was_lost_comes_next_and_the_batch_is_whole_and_in_order() -> None:
    work = HandOut(2)
    number = work.add(prompts(40), 2, 7, 3)
    first, second = work.take(), work.take()
    assert work.again(first, "rollout-1").lost == ("rollout-1",)
    assert work.done(second, answer(second)) is None
    again = work.take()
    assert (again.start, again.prompts, again.seed, again.lost) == (0, first.prompts, 7, ("rollout-1",))
    whole = work.done(again, answer(again))
    while whole is None:
        piece = work.take()
        whole = work.done(piece, answer(piece))
    assert number == 1 and not work.waiting and work.samples == (0, 0, 0)
    assert [(r.prompt.id, r.sample, r.text) for r in whole] == [(f"p{i}", k, f"{i}/0") for i in range(40) for k in range(2)]


def test_an_answer_counts_once() -> None:
    work = HandOut(2)
    work.add(prompts(40), 1, 0, 0)
    piece = work.take()
    work.done(piece, answer(piece))
    with pytest.raises(KeyError):
        work.done(piece, answer(piece))
    lost = work.take()
    work.again(lost, "rollout-0")
    with pytest.raises(KeyError):
        work.done(lost, answer(lost))
    assert work.samples == (len(piece.prompts), 40, len(piece.prompts))


def test_an_answer_that_lacks_a_sample_is_refused() -> None:
    work = HandOut(1)
    work.add(prompts(4), 4, 0, 0)
    piece = work.take()
    for wrong in (answer(piece)[:-1], answer(piece)[::-1], [*answer(piece)[:-1], answer(piece)[0]]):
        with pytest.raises(RuntimeError, match="4 of each of the 4 were asked for"):
            HandOut.done(work, piece, wrong)
        work._out.add((piece.batch, piece.start))


def test_what_is_out_of_a_batch_that_failed_comes_back_for_nothing() -> None:
    work = HandOut(2)
    number = work.add(prompts(40), 1, 0, 0)
    other = work.add(prompts(4), 1, 0, 0)
    first, second = work.take(), work.take()
    work.again(first, "rollout-0")
    work.drop(number)
    assert work.done(second, answer(second)) is None and work.again(second, "rollout-1").lost == ("rollout-1",)
    assert work.take().batch == other and not work.waiting


@pytest.mark.parametrize("seed", range(5))
def test_engines_that_come_and_go_at_random_lose_and_double_nothing(seed: int) -> None:
    chance, work = random.Random(seed), HandOut(4)
    asked = {work.add(prompts(chance.randint(1, 200)), chance.randint(1, 5), 0, 0) for _ in range(3)}
    out: list[Piece] = []
    finished: list[list[Rollout]] = []
    while len(finished) < len(asked):
        if work.waiting and len(out) < 4:
            out.append(work.take())
            continue
        piece = out.pop(chance.randrange(len(out)))
        if chance.random() < 0.3:
            work.again(piece, "rollout-9")
        elif (whole := work.done(piece, answer(piece))) is not None:
            finished.append(whole)
    for whole in finished:
        texts = [rollout.text for rollout in whole]
        k = 1 + max(rollout.sample for rollout in whole)
        assert texts == [f"{i}/0" for i in range(len(whole) // k) for _ in range(k)]
