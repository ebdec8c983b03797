"""The paper's tables made again, in the small.

    python -m benchmarks.reproduce                           # all that is not there yet; hours on two cores
    python -m benchmarks.reproduce --items 1 2 --seeds 1 2   # a part of it
    python -m benchmarks.reproduce --page                    # the page and its picture again, from the rows that are there

Each arm (benchmarks.reproduce.arms) is a whole run for each of its seeds, by the command that users start, so a run that was cut
short goes on where it stopped, and one that fails leaves the others to be run. A row for each is appended to
benchmarks/results/reproduce.jsonl as it ends, and docs/reproduce.md and its picture, docs/img/reproduce.svg, are written from
these rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.common import RESULTS, Results
from benchmarks.reproduce.arms import ARMS, ITEMS, run_for
from benchmarks.reproduce.figure import draw
from benchmarks.reproduce.page import page
from benchmarks.reproduce.play import RECIPE, ROOT, digest_of, play
from tokens.durable import write_file

PAGE = ROOT / "docs" / "reproduce.md"


def jobs(items: Sequence[int], seeds: Sequence[int] | None) -> list[tuple[str, int]]:
    """Arms and seeds: one seed of all arms of an item after another, the items in order, nothing twice."""
    found: dict[tuple[str, int], None] = {}
    for number in items:
        arms = [arm for item in ITEMS if item.number == number for arm in run_for(item)]
        for seed in sorted({seed for arm in arms for seed in ARMS[arm].seeds}):
            found.update({(arm, seed): None for arm in arms if seed in ARMS[arm].seeds and (seeds is None or seed in seeds)})
    return list(found)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS, out: Path = PAGE) -> None:
    """Run what is missing; write the page after each run.

    Args:
        arguments: None takes the process's own.
        results: folder of the rows.
        out: the page; its picture goes into img/ beside it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = sorted({item.number for item in ITEMS})
    parser.add_argument("--items", type=int, nargs="+", default=numbers, choices=numbers)
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of those that an arm has (default: all)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    kept = Results(results / "reproduce.jsonl", ("arm", "seed"))
    refuse_others(kept.rows())
    left = [] if options.page else kept.missing(jobs(options.items, options.seeds), lambda job: job)
    began, failed = time.monotonic(), []
    for number, (name, seed) in enumerate(left):
        passed = time.monotonic() - began
        ahead = f", about {passed / number * (len(left) - number) / 60:.0f} min left" if number else ""
        print(f"{number + 1} of {len(left)}: {name}, seed {seed}{ahead}", flush=True)
        try:
            row = play(name, ARMS[name], seed)
        except RuntimeError as error:
            failed.append(f"{name}, seed {seed}")
            print(error, flush=True)
            continue
        kept.append(row)
        print("   gold " + ", ".join(f"{each['gold']:+.2f}" for each in row["rounds"]), flush=True)
        tell(kept.rows(), out)
    tell(kept.rows(), out)
    print(f"{out}: {len(kept.rows())} rows")
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(left)} runs failed, and are tried again by the same command: {'; '.join(failed)}"
        )


def tell(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the page and its picture.

    Args:
        rows: of the results.
        out: the page; its picture goes into img/ beside it.
    """
    write_file(out, page(rows))
    draw(rows, out.parent / "img" / "reproduce.svg")


def refuse_others(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of arms that have other keys now, or of another recipe, would count as what they are not.

    Raises:
        SystemExit: if there is one.
    """
    now = digest_of(RECIPE)
    for row in rows:
        if row["recipe"] != now:
            raise SystemExit(
                f"{row['arm']!r}, seed {row['seed']}, was run with another {RECIPE.name} ({row['recipe']}, now {now}): take the "
                "rows of that recipe out of reproduce.jsonl, and the directories runs/reproduce-* out of the storage root: then "
                "they are run again"
            )
        if row["arm"] not in ARMS:
            raise SystemExit(f"reproduce.jsonl has a row of an arm that is not there: {row['arm']!r}; take its rows out")
        theirs, ours = (" ".join(keys) or "no keys" for keys in (row["keys"], ARMS[row["arm"]].keys))
        if theirs != ours:
            raise SystemExit(
                f"{row['arm']!r}, seed {row['seed']}, was run with {theirs}, and the arm has {ours} now: take its rows out of "
                "reproduce.jsonl, or give the arm a name of its own"
            )


if __name__ == "__main__":
    main()
