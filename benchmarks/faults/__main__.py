"""Faults done to real runs from outside: the matrix F1 to F56, seeded monkeys, and SIGKILLs inside writes.

    python -m benchmarks.faults                          all of it
    python -m benchmarks.faults --cells F1,F7 --seeds 0  two cells
    python -m benchmarks.faults --tables                 what was found so far

Each run is a process of its own on a cluster of several Ray nodes on this machine, with real engines. What is found is appended
to benchmarks/results/faults.jsonl under a label; the same label again goes on with what is not there yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.faults import calls, disks, drivers, hangs, machines, memory, monkey, numbers, roles
from benchmarks.faults.bench import Bench, bench
from benchmarks.faults.cells import CELLS, listed
from benchmarks.faults.record import RESULTS, Record, table

PLAIN: Mapping[str, int] = {"all": 2}


@dataclass(frozen=True)
class Group:
    """Scenarios that share a cluster.

    Args:
        pools: its nodes.
        scenarios: by name; each is given the bench and the wanted cells.
    """

    pools: Mapping[str, int]
    scenarios: Mapping[str, Callable[[Bench, Sequence[str]], None]]


def groups(orders: Path) -> list[Group]:
    """All scenarios, by the cluster that they need.

    Args:
        orders: directory of the orders of numbers that go wrong.
    """
    plain: dict[str, Callable[[Bench, Sequence[str]], None]] = {
        "roles": roles.roles,
        "hangs": hangs.hangs,
        "numbers": lambda bench, wanted: numbers.numbers(bench, orders, wanted),
        "drivers": drivers.drivers,
        "disks": disks.disks,
        "memory": memory.memory,
        "calls": calls.calls,
    }
    return [Group(PLAIN, plain), Group(machines.POOLS, {"nodes": machines.machines})]


def play(options: argparse.Namespace, storage: Path) -> list[str]:
    """Everything that is asked for and not there yet.

    Args:
        options: of the command line.
        storage: root of the runs.

    Returns:
        What failed.
    """
    record, failed = Record(options.results, options.label), list[str]()
    there = {row["cell"] for row in record.rows("cell")}
    wanted = [name for name in listed(options.cells) if options.cells or name not in there]
    orders = storage / "orders"
    orders.mkdir(exist_ok=True)
    cannot = {"disks": disks.reason()}
    for group in groups(orders):
        asked = {name: [cell for cell in wanted if CELLS[cell].scenario == name] for name in group.scenarios}
        asked = {name: cells for name, cells in asked.items() if cells and not (cannot.get(name))}
        if not asked:
            continue
        with bench(storage, record, group.pools, numbers.variables(orders)) as where:
            for name, cells in asked.items():
                failed += guarded(f"{name} ({', '.join(cells)})", partial(group.scenarios[name], where, cells))
    if options.kills:
        from benchmarks.faults.writes import writes

        failed += guarded("writes", lambda: writes(record, storage, options.kills))
    if options.seeds or options.goodput:
        with bench(storage, record, monkey.POOLS, {}) as where:
            for process in options.goodput:
                failed += guarded(f"goodput ({process})", partial(monkey.goodput, where, process))
            failed += guarded("monkey", lambda: monkey.monkey(where, options.seeds))
    return failed


def guarded(name: str, work: Callable[[], object]) -> list[str]:
    """Play a scenario; one that fails does not keep the others from being played."""
    began = time.time()
    print(f"  -> {name}", flush=True)
    try:
        work()
    except Exception as error:  # told at the end, with the exit code
        traceback.print_exception(error)
        return [f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    finally:
        print(f"  <- {name}: {time.time() - began:.0f} s", flush=True)
    return []


def tables(record: Record) -> str:
    """All tables of a label."""
    cannot = disks.reason()
    missing = {name: cell.why_not for name, cell in CELLS.items() if cell.why_not}
    missing |= {name: cannot for name, cell in CELLS.items() if cell.scenario == "disks" and cannot}
    parts = [table(record.rows("cell"), missing)]
    if seeds := record.rows("monkey"):
        parts.append(monkey.table(seeds))
    parts += [
        f"Goodput at one failure of {row['process']} in {row['rounds']} rounds: {row['goodput']:.1%}"
        for row in record.rows("goodput")
    ]
    parts += [
        f"{row['inside']} SIGKILLs inside writes of a {row['what']}: {row['unreadable']} unreadable"
        for row in record.rows("writes")
    ]
    return "\n\n".join(parts)


def main() -> int:
    """Play, append, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cells", default="", metavar="F1,F7,...", help="of the matrix, again (default: all not there yet)")
    parser.add_argument("--seeds", type=int, default=20, help="monkey runs (default 20)")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs inside writes (default 200)")
    parser.add_argument("--goodput", nargs="*", default=["rollout-0", "learner-0"], metavar="PROCESS",
                        help="ten rounds of the quickstart with one failure of it (default: rollout-0 learner-0)")  # fmt: skip
    parser.add_argument("--label", default="chaos", help="of this set of measurements; the same one goes on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines to append to")
    parser.add_argument("--storage", type=Path, default=None, help="where the runs lie (default: a temporary directory)")
    parser.add_argument("--tables", action="store_true", help="print what was found, and play nothing")
    options = parser.parse_args()
    failed: list[str] = []
    if not options.tables:
        if options.storage is not None:
            options.storage.mkdir(parents=True, exist_ok=True)
            failed = play(options, options.storage.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="rondo-faults-") as storage:
                failed = play(options, Path(storage))
    print(tables(Record(options.results, options.label)))
    for words in failed:
        print(f"FAILED {words}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
