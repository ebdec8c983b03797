"""Faults done to real runs from outside: the matrix F1 to F56, seeded monkeys, and SIGKILLs inside writes.

    python -m benchmarks.faults                          all of it
    python -m benchmarks.faults --cells F1,F7            two cells
    python -m benchmarks.faults --tables                 what was found so far

Each run is a process of its own on a cluster of several Ray nodes on this machine, with real engines. What is found is appended
to benchmarks/results/faults.jsonl under a label, the time of the start; an old label given again goes on with what is not there
yet. The page docs/promises.md was made from label chaos.
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
from benchmarks.faults.record import RESULTS, Record, broken, last_label, slower_than_wanted, table

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


def play(options: argparse.Namespace, record: Record, storage: Path) -> list[str]:
    """Everything that is asked for and not there yet.

    Args:
        options: of the command line.
        record: of what is found.
        storage: root of the runs.

    Returns:
        What broke.
    """
    failed = list[str]()
    there = {name for name, row in record.cells().items() if row["held"]}
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
                failed += scenario(record, f"{name} ({', '.join(cells)})", partial(group.scenarios[name], where, cells), cells)
    if options.kills and not record.rows("writes"):
        from benchmarks.faults.writes import writes

        failed += guarded("writes", lambda: writes(record, storage, options.kills))
    if options.seeds or options.goodput:
        with bench(storage, record, monkey.POOLS, {}) as where:
            for process in options.goodput:
                failed += guarded(f"goodput ({process})", partial(monkey.goodput, where, process))
            failed += guarded("monkey", lambda: monkey.monkey(where, options.seeds))
    return failed


def scenario(record: Record, name: str, work: Callable[[], object], cells: Sequence[str]) -> list[str]:
    """Play a scenario; its cells of which it then says nothing have a row that says so."""
    failed = guarded(name, work)
    said = {row["cell"] for row in record.rows("cell") if row["session"] == record.session}
    for cell in cells:
        if cell not in said and failed:
            record.failed(cell, failed[0])
    return failed


def guarded(name: str, work: Callable[[], object]) -> list[str]:
    """Play something; if it breaks, the others are played all the same."""
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
    parts = [table(record.cells(), missing)]
    if seeds := record.seeds():
        parts.append(monkey.table(seeds))
    parts += [
        f"Goodput at one failure of {row['process']} in {row['rounds']} rounds of {row.get('config', 'the bench')}: "
        f"{row['goodput']:.1%}"
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
    parser.add_argument("--cells", default="", metavar="F1,F7,...", help="of the matrix, again, and nothing else by itself")
    parser.add_argument("--seeds", type=int, default=None, help="monkey runs (default 20, with --cells none)")
    parser.add_argument("--kills", type=int, default=None, help="SIGKILLs inside writes (default 200, with --cells none)")
    quick = "ten rounds with one failure of it (default rollout-0 learner-0, with --cells none)"
    parser.add_argument("--goodput", nargs="*", default=None, metavar="PROCESS", help=quick)
    label = "of a set of measurements, to go on with (default: a new one; with --tables the last)"
    parser.add_argument("--label", default=None, help=label)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines to append to")
    parser.add_argument("--storage", type=Path, default=None, help="where the runs lie (default: a temporary directory)")
    parser.add_argument("--tables", action="store_true", help="print what was found, and play nothing")
    options = parser.parse_args()
    for name, value in (("seeds", 20), ("kills", 200), ("goodput", ["rollout-0", "learner-0"])):
        if vars(options)[name] is None:
            vars(options)[name] = type(value)() if options.cells else value
    label = options.label or (last_label(options.results) if options.tables else time.strftime("%Y-%m-%d %H:%M:%S"))
    record, failed = Record(options.results, label), list[str]()
    if not options.tables:
        print(f"--label {label!r} goes on with this, should it be stopped", flush=True)
        if options.storage is not None:
            options.storage.mkdir(parents=True, exist_ok=True)
            failed = play(options, record, options.storage.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="rondo-faults-") as storage:
                failed = play(options, record, Path(storage))
    print(tables(record))
    for words in slower_than_wanted(record.cells(), record.rows("goodput")):
        print(f"slower than wanted: {words}", file=sys.stderr)
    cannot = {name for name, cell in CELLS.items() if cell.scenario == "disks"} if disks.reason() else set[str]()
    asked = [] if options.tables else [name for name in listed(options.cells) if name not in cannot]
    failed += broken(record, asked)
    for words in failed:
        print(f"FAILED {words}", file=sys.stderr)
    return 1 if failed and not options.tables else 0


if __name__ == "__main__":
    sys.exit(main())
