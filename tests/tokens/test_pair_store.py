"""Pairs in arrays come out as they went in."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tokens.pair_store import PairStore, PairStoreBuilder
from tokens.records import Pair

PAIRS = [
    Pair("a", (1, 5), (6, 2), (7, 8, 2), "tea", 0.25, 0.1),
    Pair("ü-2", (1,), (9, 2), (2,)),
    Pair("", (1, 5, 5, 5), (6, 2**31 - 1), (7, 2), "tea", -1.5),
]


def test_what_is_put_in_comes_out() -> None:
    store = PairStore.of(PAIRS)
    assert list(store) == PAIRS and len(store) == 3 and store[-1] == PAIRS[-1] and list(store.ids) == ["a", "ü-2", ""]
    assert {type(id_) for pair in store for id_ in pair.prompt_ids} == {int} and type(store[0].margin) is float
    assert PAIRS[1] in store and Pair("a", (1,), (2,), (3,)) not in store
    for index in (3, -4):
        with pytest.raises(IndexError):
            store[index]


def test_views_share_the_arrays() -> None:
    store = PairStore.of(PAIRS)
    view = store.take(np.array([2, 0]))
    assert list(view) == [PAIRS[2], PAIRS[0]] and list(view[1:]) == [PAIRS[0]] and list(view.ids) == ["", "a"]
    assert view.tokens is store.tokens and view[:1].tokens is store.tokens
    assert view == PairStore.of([PAIRS[2], PAIRS[0]]) and view != store and store != PAIRS
    plain = store.plain()
    assert [(pair.margin, pair.smoothing) for pair in plain] == [(0.0, 0.0)] * 3
    assert [pair.chosen_ids for pair in plain] == [pair.chosen_ids for pair in PAIRS] and store[0].margin == 0.25


def test_it_travels_without_a_copy_of_its_arrays() -> None:
    store = PairStore.of(PAIRS * 1000)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(store, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 2000 and len(buffers) >= 7
    again = pickle.loads(data, buffers=buffers)  # noqa: S301 - our own bytes
    assert again == store and np.shares_memory(again.tokens, store.tokens)


def test_no_pairs_and_ids_that_do_not_fit() -> None:
    assert list(PairStore.of([])) == [] and not PairStore.of([])
    with pytest.raises(OverflowError):
        PairStoreBuilder().add(Pair("a", (2**31,), (1,), (2,)))
