"""Chunks: what goes in comes out, bit for bit, in pieces of bounded size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokens.weights import Chunk, cast, in_chunks, pack


def weights() -> list[tuple[str, Tensor]]:
    torch.manual_seed(0)
    return [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7, dtype=torch.float32).to(torch.bfloat16)),
        ("scalar", torch.tensor(2.5)),
        ("ids", torch.arange(5)),
        ("turned", torch.randn(4, 6).T),
        ("none", torch.empty(0, 3)),
    ]


@pytest.mark.parametrize("max_bytes", [1, 64, 100, 10_000])
def test_what_goes_in_comes_out(max_bytes: int) -> None:
    chunks = list(in_chunks(weights(), max_bytes))
    out = [pair for chunk in chunks for pair in chunk.tensors()]
    assert [name for name, _ in out] == [name for name, _ in weights()]
    for (name, got), (_, wanted) in zip(out, weights(), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), name
    assert sum(chunk.num_bytes for chunk in chunks) == sum(x.nbytes for _, x in weights()) == 60 + 14 + 4 + 40 + 96
    assert all(chunk.num_bytes <= max_bytes or len(chunk.names) == 1 or chunk.num_bytes == 0 for chunk in chunks)


def test_chunks_by_hand() -> None:
    four = [(name, torch.zeros(10)) for name in "abcd"]  # 40 bytes each
    assert [chunk.names for chunk in in_chunks(four, 80)] == [("a", "b"), ("c", "d")]
    assert [chunk.names for chunk in in_chunks(four, 79)] == [("a",), ("b",), ("c",), ("d",)]
    assert list(in_chunks([], 80)) == []
    assert pack(four[:2]).buffer.nbytes == 128, "each begins at a multiple of 64"


def test_no_more_than_a_chunk_is_asked_for_ahead() -> None:
    asked: list[str] = []

    def one_by_one() -> object:
        for name in "abcd":
            asked.append(name)
            yield name, torch.zeros(10)

    chunks = in_chunks(one_by_one(), 80)  # type: ignore[arg-type]
    next(chunks)
    assert asked == ["a", "b", "c"], "the third closed the first chunk"


def test_a_chunk_in_memory_that_cannot_be_written_is_read_without_a_warning() -> None:
    chunk = pack(weights())
    chunk.buffer.setflags(write=False)
    assert torch.equal(dict(chunk.tensors())["a"], weights()[0][1])


def test_casting_leaves_whole_numbers_alone() -> None:
    out = dict(cast(weights(), torch.bfloat16))
    assert out["ids"].dtype == torch.int64 and {out[name].dtype for name in ("a", "b", "scalar")} == {torch.bfloat16}
    assert torch.equal(out["a"], weights()[0][1].to(torch.bfloat16))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one byte, got max_bytes 0"):
        list(in_chunks(weights(), 0))
    with pytest.raises(ValueError, match="2 names, 1 dtypes"):
        Chunk(("a", "b"), ("float32",), ((1,),), np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="a buffer of 64 bytes is expected"):
        Chunk(("a",), ("float32",), ((1,),), np.zeros(3, np.uint8))
