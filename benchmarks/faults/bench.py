"""What all scenarios share: the cluster, the undisturbed run, and how a fault is timed."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.invariants import Held, complete, named, nothing_left, same_bits, shared_memory, whole
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.observer import Observer
from benchmarks.faults.play import DRIVER, ROOT, Late, Run
from benchmarks.faults.record import Record
from cluster.config import RunConfig
from cluster.load_config import load_config

ONE = ("--rollout.num_engines", "1")
"""Where the engines are not what matters: roles start sooner."""
CONFIG = ROOT / "benchmarks" / "faults" / "small.yaml"
NOTICE_S, BACK_S = 300.0, 300.0


@dataclass
class Bench:
    """A cluster, and what is known of the undisturbed run on it.

    Args:
        nodes: the cluster.
        observer: of it.
        storage: root of all runs.
        record: of what is found.
        say: shows a line.
    """

    nodes: Nodes
    observer: Observer
    storage: Path
    record: Record
    config: Path = CONFIG
    done: list[str] = field(default_factory=list)

    def arguments(self, *overrides: str) -> list[str]:
        """Of a run of the bench."""
        return [str(self.config), *overrides]

    def run(self, name: str, *overrides: str, variables: Mapping[str, str] = {}, storage: Path | None = None) -> Run:
        """Start a run, or go on with it.

        Args:
            name: of the run.
            overrides: of the config.
            variables: environment of the driver.
            storage: another root.
        """
        return Run(self.nodes, storage or self.storage, name, self.arguments(*overrides), variables)

    def fresh(self, name: str) -> str:
        """A name of which there is no run."""
        shutil.rmtree(self.storage / "runs" / name, ignore_errors=True)
        return name

    def loaded(self, name: str, *overrides: str) -> RunConfig:
        """The config of a run."""
        return load_config(self.config, [*overrides, "--name", name, "--storage", str(self.storage)])

    def baseline(self, name: str = "baseline", *overrides: str) -> Path:
        """The undisturbed run; played once."""
        path = self.storage / "runs" / name
        if not (path / "report.html").exists():
            shutil.rmtree(path, ignore_errors=True)
            with self.run(name, *overrides) as run:
                if run.end():
                    raise Late(f"the undisturbed run failed:\n{run.output()[-3000:]}")
        return path

    def held(self, run: Run, baseline: Path | None, patterns: Sequence[str], shared: set[str], *overrides: str) -> Held:
        """The invariants after a run that came to its end; I5 is looked at by whoever waits for something.

        Args:
            run: that has ended.
            baseline: to compare bits with; None where the fault changes what is learned.
            patterns: of lines that it must have printed; none where another look is taken.
            shared: names in /dev/shm before the run.
            overrides: of the config.
        """
        config = self.loaded(run.name, *overrides)
        wrong = {"I1": tuple(complete(run.path, config)), "I2": tuple(whole(run.path))}
        wrong |= {} if baseline is None else {"I3": tuple(same_bits(run.path, baseline))}
        wrong |= {"I4": tuple(nothing_left(self.nodes, self.observer, shared, run))}
        return Held(wrong | ({"I6": tuple(named(run, patterns))} if patterns else {}))


@contextlib.contextmanager
def bench(storage: Path, record: Record, pools: Mapping[str, int], variables: Mapping[str, str]) -> Iterator[Bench]:
    """A cluster of a head and one node for each pool.

    Args:
        storage: root of the runs.
        record: of what is found.
        pools: CPUs of each node, by the value of its label.
        variables: environment of all of it.
    """
    with Nodes(variables) as nodes:
        for pool, num_cpus in pools.items():
            nodes.add(pool.split("/")[0], num_cpus, wait=False)
        nodes.settle()
        with Observer(nodes) as observer:
            yield Bench(nodes, observer, storage, record)


@dataclass
class Watch:
    """How one fault went, as seen from outside.

    Args:
        run: that it is done to.
        name: of the process.
        at: when it was done, Unix time, s.
    """

    run: Run
    name: str
    at: float

    def detected(self, seconds: float = NOTICE_S) -> float:
        """Wait for the line that says that the process is lost; seconds since the fault."""
        return self.run.until_said(said("lost", self.name), self.at, seconds) - self.at

    def recovered(self, seconds: float = BACK_S) -> float | None:
        """Wait for the line that says that it is back; seconds since it was said to be lost. None if the run ended before."""
        since = self.run.until_said(said("lost", self.name), self.at, 1)
        pattern = said("back", self.name)
        self.run.until(lambda: self.run.when(pattern, since) is not None or self.run.process.poll() == 0, seconds, pattern)
        back = self.run.when(pattern, since)
        return None if back is None else back - since


def said(event: str, process: str) -> str:
    """What a line on a process that was lost, or is back, looks like."""
    return rf"\b{event}(\[/\])? {re.escape(process)}\b"


LOADS = ("sync", "restore", "score", "policy")
"""Phases in which, outside of PPO's steps, roles are only given what they must hold."""


def again(run: Run) -> str:
    """What this start of a run did that an earlier one had done already, by phase."""
    rows = run.timeline.read()
    before, now = ({_place(span) for span in part if is_work(span)} for part in (rows[: run.seen], rows[run.seen :]))
    twice = sorted((what, -1 if step is None else step) for what, index, step in before & now if index is not None)
    return in_words((what, None if step < 0 else step) for what, step in twice)


def is_work(span: Mapping[str, Any]) -> bool:
    """Whether a span is work of a round that is there once: not a wait, and not SFT's samples, which every start judges anew."""
    judges = span["who"].startswith("scorer") and span["what"] == "evaluate"
    return span["who"] != DRIVER and span["round"] is not None and not judges


def in_words(places: Iterable[tuple[str, int | None]]) -> str:
    """Work that was done again, by phase and step; what only fills a role is left out."""
    words = [what if step is None else f"{what} of step {step}" for what, step in places if step is not None or what not in LOADS]
    return ", ".join(dict.fromkeys(words)) or "what was under way"


def _place(span: Mapping[str, Any]) -> tuple[str, int | None, int | None]:
    return span["what"], span["round"], span["step"]


def shm() -> set[str]:
    """Names in /dev/shm now."""
    return shared_memory()
