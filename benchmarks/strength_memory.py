"""How much memory a strength run holds for each pair: pairs as records of Python's numbers, and as in `tokens.pair_store`.

    python -m benchmarks.strength_memory --pairs 20000 100000

Made-up pairs of about 60 tokens, each case in a process of its own. For each number of pairs, by how much the process's resident
memory grows at most above what it held before (Python, its libraries, the texts), sampled every 2 ms:

    tuples    encoded into a tuple of records
    store     encoded into a store
    parts     what else the driver makes of N pairs: folds, parts, and the file of texts, written part by part

Prints the rows and appends them to benchmarks/results/strength_memory.jsonl. Training processes unpack records once more each;
the arrays of a store they read where Ray put them (tests/tokens/test_pair_store.py).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.versions import versions

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

CASES = ("tuples", "store", "parts")
RESULTS = Path(__file__).parent / "results" / "strength_memory.jsonl"
TOKENS = (20, 20, 20)
"""Of prompt, chosen and rejected, on the average."""
WORDS = [f"w{i}" for i in range(2000)]
SIZE = 512
"""Pairs a part."""


def make_up(num_pairs: int, path: Path, seed: int = 0) -> None:
    """Write pairs of random words to a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = random.Random(seed)

    def text(mean: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(mean // 2, mean + mean // 2)))

    table = {
        name: pa.array([text(mean) for _ in range(num_pairs)], pa.large_string())
        for name, mean in zip(("prompt", "chosen", "rejected"), TOKENS, strict=True)
    }
    ids = pa.array([f"pair-{i}" for i in range(num_pairs)], pa.large_string())
    domain = pa.array([""] * num_pairs, pa.large_string())
    parquet.write_table(pa.table({"id": ids, **table, "domain": domain}), path)


def measure(case: str, path: Path) -> dict[str, Any]:
    """One case, in this process.

    Args:
        case: of ``CASES``.
        path: of the pairs.
    """
    from datasets import Dataset
    from pyarrow import parquet

    from preferences.encode import encode_pairs
    from preferences.sets import PreferenceSet
    from sandbox.tokenizer import make_tokenizer

    table = parquet.read_table(path)
    pairs, tokenizer = PreferenceSet(Dataset(table), "made up", "explicit"), make_tokenizer(WORDS)
    encode_pairs(pairs.with_table(table.slice(0, 200)), tokenizer, 100, 100, drop=False)  # what is loaded once
    make = {"tuples": _tuples, "store": _store, "parts": _parts}[case](pairs, tokenizer)
    began = time.perf_counter()
    with Growth() as growth:
        _held = make()  # until the growth is read
    row: dict[str, Any] = {"id": "strength_memory", "what": case, "num_pairs": len(pairs)}
    row |= {"seconds": round(time.perf_counter() - began, 2), "bytes_per_pair": round(growth.most / len(pairs), 1)}
    return row


def _tuples(pairs: PreferenceSet, tokenizer: Any) -> Callable[[], Any]:
    from preferences.encode import encode_prompt, encode_response
    from tokens.records import Pair

    def record(row: dict[str, str]) -> Pair:
        chosen, rejected = (encode_response(tokenizer, row[side]) for side in ("chosen", "rejected"))
        return Pair(row["id"], encode_prompt(tokenizer, row["prompt"]), chosen, rejected, row["domain"])

    return lambda: tuple(record(row) for row in pairs.rows)


def _store(pairs: PreferenceSet, tokenizer: Any) -> Callable[[], Any]:
    from preferences.encode import encode_pairs

    return lambda: encode_pairs(pairs, tokenizer, 100, 100, drop=False)[0]


def _parts(pairs: PreferenceSet, tokenizer: Any) -> Callable[[], None]:
    import numpy as np

    from cluster.strength_parts import folds_of, plan_parts, write_texts

    def write() -> None:
        folds = folds_of(pairs, 2, 0)
        parts = plan_parts([("train", pairs, folds, np.ones(len(pairs), dtype=bool))], SIZE)
        with tempfile.TemporaryDirectory() as folder:
            write_texts(Path(folder) / "texts.parquet", parts, {"train": pairs})

    return write


def _resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Growth:
    """By how many bytes this process's resident memory grows at most, while the context lasts."""

    def __init__(self) -> None:
        self.most, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Growth:
        self.start = _resident()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self.over.wait(0.002)
            self.most = max(self.most, _resident() - self.start)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure every case in a process of its own, print and append the rows.

    Args:
        arguments: of the command line; None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The rows; none for the process of one case, which prints its own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--case", nargs=2, metavar=("CASE", "FILE"), help="measure this one in this process, and print its row")
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(measure(options.case[0], Path(options.case[1]))))
        return []
    rows = []
    for num_pairs in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.parquet"
            make_up(num_pairs, path)
            for case in CASES:
                command = [sys.executable, "-m", "benchmarks.strength_memory", "--case", case, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append(row | {"versions": versions()})
                print(", ".join(f"{key} {value}" for key, value in row.items() if key != "id"), flush=True)
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


if __name__ == "__main__":
    main()
