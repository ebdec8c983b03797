"""Pairs to ask about: what is written of judged pairs, and that nothing in it says who preferred what."""

from pathlib import Path

from preferences.pool import PoolPair, pair_key, pool_of, pool_text, read_pool

ROWS = [{"prompt": f"prompt {i}", "chosen": f"better {i}", "rejected": f"also {i}"} for i in range(20)]
TURNED = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]


def test_labels_leave_no_trace_and_equal_pairs_come_once() -> None:
    assert pool_of(ROWS, 100) == pool_of(TURNED, 100) == pool_of([*reversed(ROWS), *TURNED], 100)
    assert len(pool_of([*ROWS, *TURNED], 100)) == 20
    assert all(pair.a < pair.b for pair in pool_of(ROWS, 100))


def test_a_smaller_pool_is_the_beginning_of_a_larger_one() -> None:
    assert pool_of(ROWS, 7) == pool_of(ROWS, 20)[:7] and pool_of(ROWS, 0) == ()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pairs = (PoolPair("line\nbreak", "\x1b[31m", '"quoted"'), PoolPair("line\u2028separator", "ä", "👍"))
    path = tmp_path / "pool.jsonl"
    path.write_text(pool_text(pairs), encoding="utf-8")
    assert read_pool(path) == pairs


def test_of_equal_pairs_in_either_order_the_first_is_read(tmp_path: Path) -> None:
    pairs = (PoolPair("p", "one", "two"), PoolPair("p", "two", "one"), PoolPair("p", "same", "same"), PoolPair("q", "one", "two"))
    path = tmp_path / "pool.jsonl"
    path.write_text(pool_text(pairs) + "\n  \n", encoding="utf-8")
    assert read_pool(path) == (pairs[0], pairs[3])
    assert pair_key("p", "one", "two") == pair_key("p", "two", "one") != pair_key("q", "one", "two")
