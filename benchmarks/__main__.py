"""How long our ways take beside what one would do instead.

    python -m benchmarks                              # all comparisons, each in a process of its own
    python -m benchmarks --only C1 C4                 # some of them
    python -m benchmarks --page                       # the tables of README.md and docs/benchmarks.md, from the rows

Each row is appended to benchmarks/results/bench.jsonl as it is found; the table shows the last of each case (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.ratios.catalogue import CASES, NUMBERS
from benchmarks.ratios.rows import RESULTS, Row, Settings, read, write
from benchmarks.ratios.table import amount, details, hardware, measured, put, shown, table
from tokens.durable import write_file

ROOT = Path(__file__).resolve().parents[1]
STEADY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_MAX_": "0", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "RAY_DISABLE_IMPORT_WARNING": "1",
}  # fmt: skip
"""Environment of a measuring process: freed memory is kept, so that no way pays for pages that another has given back."""


def comparison(number: str) -> Callable[[Settings], Iterator[Row]]:
    """What measures a comparison; only its own module is imported, for what it imports counts."""
    match number:
        case "C1":
            from benchmarks.ratios.ensembles import measure
        case "C2":
            from benchmarks.ratios.shared_prompts import measure
        case "C3":
            from benchmarks.ratios.reward_epochs import measure
        case "C4":
            from benchmarks.ratios.metarm_steps import measure
        case "C5":
            from benchmarks.ratios.rollouts import measure
        case "C6":
            from benchmarks.ratios.sync import measure
        case "C7":
            from benchmarks.ratios.ppo_steps import measure
        case "C8":
            from benchmarks.ratios.whole_rounds import measure
        case "C9":
            from benchmarks.ratios.checkpoints import measure
        case "C10":
            from benchmarks.ratios.strengths import measure
        case "C11":
            from benchmarks.ratios.driver import measure
        case _:
            raise ValueError(f"there is no comparison {number}: expected one of {', '.join(NUMBERS)}")
    return measure


def here(number: str, settings: Settings, results: Path) -> None:
    """Measure one comparison in this process; its rows are written as they come."""
    import torch

    torch.set_num_threads(settings.threads)
    units = {case.place: case.unit for case in CASES}
    for row in comparison(number)(settings):
        unit = units[row.id, row.case]
        write([row], results)
        print(
            f"{row.id} {row.case}: {amount(row.ours, unit)} against {amount(row.alternative, unit)}, ratio {row.ratio:.3g} "
            f"({row.ratio_min:.3g} to {row.ratio_max:.3g}); {row.equality}",
            flush=True,
        )


def all_of(numbers: Sequence[str], settings: Settings, results: Path) -> list[str]:
    """Measure each in a process of its own, one after another.

    Returns:
        Those that failed.
    """
    failed = []
    for number in numbers:
        words = ["--repetitions", str(settings.repetitions), "--threads", str(settings.threads), "--results", str(results)]
        words += ["--small"] if settings.small else []
        environment = {**os.environ, **STEADY, "OMP_NUM_THREADS": str(settings.threads)}
        command = [sys.executable, "-m", "benchmarks", "--here", number, *words]
        if subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode:
            failed.append(number)
    return failed


def write_pages(results: Path, readme: Path, page: Path) -> None:
    """Put the tables of the rows that are there into README and page."""
    rows = read(results)
    on = f"Measured on: {hardware(rows)}."
    write_file(readme, put(readme.read_text(), f"{measured(rows)}\n\n{on}"))
    text = put(page.read_text(), f"{table(rows)}\n\n{on}")
    write_file(page, put(text, details(rows), number=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the table.

    Args:
        arguments: None takes the process's own.

    Returns:
        Exit status: 1 if a comparison failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NUMBERS, choices=NUMBERS, metavar="C1", help="some of them")
    parser.add_argument("--repetitions", type=int, default=7, help="pairs of each case (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of either side (default: the machine's cores)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append rows to")
    parser.add_argument(
        "--page", action="store_true", help="measure nothing; write the tables of README.md and docs/benchmarks.md"
    )
    parser.add_argument("--small", action="store_true", help="at a size at which nothing can be learned")
    parser.add_argument("--here", choices=NUMBERS, help="measure this one in this process")
    options = parser.parse_args(arguments)
    settings, results = Settings(options.repetitions, options.threads, options.small), options.results.resolve()
    if options.page:
        write_pages(results, ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
        return 0
    if options.here:
        here(options.here, settings, results)
        return 0
    failed = all_of(options.only, settings, results)
    print(shown(read(results)))
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
