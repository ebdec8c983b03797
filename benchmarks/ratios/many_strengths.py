"""C10's second half: memory while a hundred thousand pairs are scored, by a member that is next to nothing.

    python -m benchmarks.ratios.many_strengths STORAGE PAIRS SIZE THREADS

That is the driver of a strength run's second stage: Ray Data's pool, a file for each part. It is killed (SIGKILL) after a
twentieth of the parts; the same command goes on with the others, and its memory is looked at: the driver's and the scoring
process's, resident, several times a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from benchmarks.ratios.child import ROOT
from benchmarks.ratios.engines import local_ray
from benchmarks.ratios.frame import Took, Turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.strength_memory import make_up
from cluster.config import RunConfig
from cluster.console import Console
from cluster.strength_directory import StrengthDirectory
from cluster.strength_parts import plan_parts, write_texts
from cluster.strength_scores import score

SIZES = {False: (100_000, 1000), True: (400, 20)}
"""Pairs, and pairs of a part; by whether it is to be small."""
MIB, LOOK_S, PATIENCE_S = 1 << 20, 0.2, 600.0
NAME = "many"


@dataclass(frozen=True)
class Look:
    """What was seen at once.

    Args:
        parts: files that were there.
        driver: resident memory, MiB.
        scorer: of the scoring processes, MiB.
    """

    parts: int
    driver: float
    scorer: float

    @property
    def both(self) -> float:
        """MiB."""
        return self.driver + self.scorer


def config_of(storage: str, size: int, threads: int) -> RunConfig:
    """One member, one scoring process."""
    return RunConfig.model_validate(
        {
            "name": NAME,
            "storage": storage,
            "data": {"preferences": "made up"},
            "strength": {"num_members": 1, "rows_per_block": size},
            "evaluation": {"judge": "ensemble"},
            "resources": {"scorer": {"num_cpus": 1, "threads": threads}},
        }
    )


def serve(storage: str, number: int, size: int, threads: int) -> None:
    """Score what is not scored yet."""
    from datasets import Dataset

    from benchmarks.ratios.strengths import save_members
    from preferences.sets import PreferenceSet

    config = config_of(storage, size, threads)
    directory = StrengthDirectory(config)
    directory.inspect()
    cache = str(Path(storage) / "cache")
    pairs = PreferenceSet(Dataset.from_parquet(f"{storage}/pairs.parquet", cache_dir=cache), "made up", "explicit")
    parts = plan_parts([("train", pairs, np.zeros(number, dtype=np.int64), np.ones(number, dtype=bool))], size)
    with directory.open(), local_ray():
        directory.logs.mkdir(exist_ok=True)
        members = directory.members(0)
        if not directory.texts.is_file():
            save_members(members, 1, hidden_size=16)
            write_texts(directory.texts, parts, {"train": pairs})
        score(config, Console(), directory, members / "0", parts, pairs)


def looks(process: subprocess.Popen[bytes], strengths: Path) -> Iterator[Look]:
    """Until it ends."""
    driver, deadline = psutil.Process(process.pid), time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            scorers = [p for p in driver.children(recursive=True) if "StrengthScorer" in p.name() + " ".join(p.cmdline()[:1])]
            memory = sum(p.memory_info().rss for p in scorers) / MIB
            yield Look(len(list(strengths.glob("part-*.parquet"))), driver.memory_info().rss / MIB, memory)
        except psutil.NoSuchProcess:
            pass
        time.sleep(LOOK_S)


def begin(storage: Path, number: int, size: int, threads: int) -> subprocess.Popen[bytes]:
    """The driver."""
    words = [str(storage), str(number), str(size), str(threads)]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.ratios.many_strengths", *words], cwd=ROOT)


def measure_memory(settings: Settings) -> Row:
    """At the end against after the first tenth."""
    from preferences.strength import read_strengths

    number, size = SIZES[settings.small]
    total = number // size
    with TemporaryDirectory() as name:
        storage = Path(name)
        make_up(number, storage / "pairs.parquet")
        strengths = StrengthDirectory(config_of(name, size, settings.threads)).strengths
        first = begin(storage, number, size, settings.threads)
        for seen in looks(first, strengths):
            if seen.parts >= max(1, total // 20):
                break
        first.kill()
        first.wait()
        kept = {path.name: path.stat().st_mtime_ns for path in strengths.glob("part-*.parquet")}
        second = begin(storage, number, size, settings.threads)
        seen_of = list(looks(second, strengths))
        second.kill()  # nothing where it has ended
        if second.wait():
            raise RuntimeError(f"the scoring of {number} pairs ended with status {second.returncode}; what it printed says why")
        ids = read_strengths(strengths).ids
        again = sum((strengths / name).stat().st_mtime_ns != written for name, written in kept.items())
    scoring = [look for look in seen_of if look.scorer and look.parts > len(kept)]
    tenth = next(look for look in scoring if look.parts >= len(kept) + (total - len(kept)) // 10)
    late = max(scoring[-max(1, len(scoring) // 10) :], key=lambda look: look.both)
    once = "each pair once" if len(ids) == len(set(ids)) == number else "PAIRS ARE MISSING"
    equality = f"{once}; of {len(kept)} parts that a killed driver left, {again} were made again"
    load = round(os.getloadavg()[0], 2)
    turns = Turns({"late": (Took(late.both, 0.0),), "tenth": (Took(tenth.both, 0.0),)}, (load,))
    few = Settings(1, settings.threads, settings.small)
    figures = {
        "driver_mib": [round(tenth.driver), round(late.driver)], "scorer_mib": [round(tenth.scorer), round(late.scorer)],
        "pairs": number, "parts": total,
    }  # fmt: skip
    return row(("C10", "memory of 100,000 pairs"), turns, ("late", "tenth"), few, 1.0, equality, **figures)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
