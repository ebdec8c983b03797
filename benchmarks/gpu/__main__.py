"""What one NVIDIA GPU makes of the house's steps (G1 to G10), the most important first.

    python -m benchmarks.gpu                                  # everything that this environment can run
    python -m benchmarks.gpu --budget 500                     # what fits into so many seconds
    python -m benchmarks.gpu --only G1 G2                     # some of it
    python -m benchmarks.gpu --small --device cpu             # all that needs no GPU, at a size that teaches nothing
    python -m benchmarks.gpu --page                           # the tables of docs/benchmarks.md, from the rows

G1 to G4, G9 and G10 need torch and transformers alone, and a part of G6 and G7; the rest needs vLLM (`make env-gpu`). A row
is appended to benchmarks/results/gpu.jsonl as soon as it is found (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.catalogue import NUMBERS, PARTS, Part
from benchmarks.gpu.device import Kind, find_device
from benchmarks.gpu.rows import RESULTS, Row, Scene, Settings, append, read, stored
from benchmarks.gpu.table import cells, earlier, shown, table
from benchmarks.ratios.table import put
from tokens.durable import write_file

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN = "<!-- made by `python -m benchmarks.gpu --page` -->"
Clock = Callable[[], float]


def missing(part: Part, kind: Kind) -> str | None:
    """What a part lacks here, in a sentence; None if nothing.

    Args:
        part: to be measured.
        kind: of the device.
    """
    what = " and ".join(part.ids)
    if part.needs == "cuda" and kind == "cpu":
        return f"{what} needs a GPU, and this is measured on the CPU"
    lacking = [name for name in ("ray", "vllm") if part.needs == "vllm" and find_spec(name) is None]
    if lacking:
        return f"{what} needs {' and '.join(lacking)}, which this environment lacks: `make env-gpu` installs them"
    return None


def measure(part: Part, scene: Scene) -> Iterator[Row]:
    """The rows of a part; of what did not fit into the device's memory, rows that say so.

    Args:
        part: of the catalogue.
        scene: of the measurement.
    """
    left = list(part.places)
    try:
        for row in part.measure(scene):
            left.remove(row.place)
            yield row
    except torch.cuda.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        yield from (Row(*place, outcome="out of memory", figures={"said": said}) for place in left)


def run(parts: Sequence[Part], scene: Scene, results: Path | None, budget: float | None, clock: Clock) -> list[str]:
    """Measure part after part, as long as the next one fits into what is left of the budget; smaller ones behind it may.

    Where the parts so far took longer than they should on an H200, the next one is expected to as well.

    Args:
        parts: in the order of their importance.
        scene: of the measurement.
        results: file to append rows to; None = they are only printed.
        budget: seconds in all; None = as long as it takes.
        clock: seconds since the beginning.

    Returns:
        Cases that failed for another reason than memory.
    """
    failed: list[str] = []
    expected = took = 0.0
    for part in parts:
        what = "; ".join(f"{number} {case}" for number, case in part.places)
        lacking = missing(part, scene.device.kind)
        if lacking is not None:
            print(f"left out: {what}: {lacking}", flush=True)
            continue
        began, needed = clock(), part.seconds * max(1.0, took / expected if expected else 1.0)
        if budget is not None and began + needed > budget:
            print(f"left out: {what}: takes about {needed:.0f} s, and {max(0.0, budget - began):.0f} s are left", flush=True)
            continue
        try:
            for row in measure(part, scene):
                line = stored(row, scene, clock() - began)
                if results is not None:
                    append(line, results)
                print("  ".join(cell for cell in cells(row.place, part.against, line) if cell not in ("", "-")), flush=True)
        except Exception:  # one case that fails must not cost the others their turn on a rented GPU
            traceback.print_exc()
            failed.append(what)
        gc.collect()
        if scene.device.kind == "cuda":
            torch.cuda.empty_cache()
        expected, took = expected + part.seconds, took + clock() - began
    return failed


def write_page(results: Path, page: Path) -> None:
    """Put the tables of the rows that are there into the page."""
    rows, older = read(results)
    text = put(page.read_text(), table(rows), begin=BEGIN)
    write_file(page, put(text, earlier(older), number=1, begin=BEGIN))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the table.

    Args:
        arguments: None takes the process's own.

    Returns:
        Exit status: 1 if a case failed.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NUMBERS, choices=NUMBERS, metavar="G1", help="some of them")
    parser.add_argument("--budget", type=float, help="seconds in all: what would not fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is measured (default cuda)")
    parser.add_argument("--small", action="store_true", help="at a size at which nothing can be learned")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each way (default 3)")
    parser.add_argument("--results", type=Path, help=f"file to append rows to (default {RESULTS.name}, and none for --small)")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the tables of docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.page:
        write_page(options.results or RESULTS, PAGE)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here, and this measures a GPU: --small --device cpu runs what needs none, in the small")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu needs --small: steps of 8 billion weights are not for a CPU")
    results = options.results if options.results is not None else None if options.small else RESULTS
    settings = Settings(options.repetitions, options.small)
    scene = Scene(find_device(options.device), settings)
    device, roofs = scene.device, scene.device.roofs
    print(
        f"{device.name}: {roofs.flops / 1e12:.3g} TFLOP/s in a product, {roofs.bandwidth / 1e9:.4g} GB/s in a copy, "
        f"{roofs.to_host / 1e9:.3g} GB/s to the host and {roofs.from_host / 1e9:.3g} back",
        flush=True,
    )
    parts = [part for part in PARTS if set(part.ids) & set(options.only)]
    failed = run(parts, scene, results, options.budget, lambda: time.monotonic() - began)
    if results is not None:
        print(shown(read(results)[0], parts))
    for case in failed:
        print(f"failed: {case}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
