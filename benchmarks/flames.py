"""Where a run's roles spend their time: py-spy looks at the driver and at one process of each role.

    python -m benchmarks.flames [--KEY VALUE ...]     # also `make profile`; KEYs are of the run

A run of configs/quickstart.yaml plays its first round, which makes the world and fills caches, and is not looked at; the same
command then goes on for a second one, and each process is sampled from when it has its role's name, ``RATE`` times a second, only
while it computes. Stacks lie beside the run as ``flames/ROLE.txt`` (folded, as flame graph tools take them); the picture is
docs/img/flames.svg, or what ``--out`` names.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.pictures import picture
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.storage import storage_root

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "img" / "flames.svg"
ROLES = ("RolloutEngine", "RewardTrainer", "EnsembleScorer", "PolicyLearner")
OWN = ("actors/", "cluster/", "rm/", "policy/", "tokens/", "preferences/", "evaluation/", "sandbox/")
IMPORTS, ELSE = "imports", "Ray, and libraries outside our calls"
WAITING = ("", "Worker.main_loop", "Condition.wait", "Event.wait", "wait", "sleep", "select", "poll")
"""Innermost functions that only wait, which py-spy takes for work where they do so in C; no name: a thread without Python."""
WRAPPERS = ("_inject_tracing_into_class",)
"""Frames of Ray's between a call and what is called."""
RATE, DEPTH, NARROWEST, LETTERS = 25, 12, 0.004, 150
"""Samples a second; frames that are drawn; share of all below which nothing is drawn; letters that fit into the whole width."""
COLOURS: Mapping[str, str] = {
    "cluster": "#8a97a3", "actors": "#5b7fa6", "rm": "#2a7f62", "policy": "#b5703a", "tokens": "#c9a23c",
    "preferences": "#7d8f4e", "evaluation": "#9c6b84", "sandbox": "#6b7f8c",
    "torch": "#b5483a", "transformers": "#8c5a9e", "vllm": "#4a9aa5", "": "#c3ccd4",
}  # fmt: skip


@dataclass
class Node:
    """A frame and what it called.

    Args:
        count: samples in which it was on the stack.
        calls: by the name of the frame.
    """

    count: int = 0
    calls: dict[str, Node] = field(default_factory=dict)

    def add(self, stack: Sequence[str], count: int) -> None:
        """Count a stack, the outermost frame first."""
        self.count += count
        if stack:
            self.calls.setdefault(stack[0], Node()).add(stack[1:], count)


def stacks(lines: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Of folded lines the stacks that compute, from the first frame of our own on, and how often each was seen.

    Where there is none, or modules are imported, one word stands for the stack.
    """
    for line in lines:
        frames, _, count = line.rpartition(" ")
        names = [name for name in frames.split(";") if not name.startswith(WRAPPERS)]
        if not names or names[-1].partition(" (")[0] in WAITING:
            continue
        first = next((at for at, name in enumerate(names) if any(f"({own}" in name for own in OWN)), None)
        if any("importlib" in name for name in names):
            yield [IMPORTS], int(count)
        else:
            yield ([ELSE] if first is None else names[first:]), int(count)


def tree(lines: Iterable[str]) -> Node:
    """All stacks of a process."""
    root = Node()
    for stack, count in stacks(lines):
        root.add(stack, count)
    return root


def draw(trees: Mapping[str, Node], seconds: float, out: Path) -> None:
    """A flame graph for each process, the outermost frames on top, all to the same scale of time.

    Args:
        trees: by the name of the process.
        seconds: that the run took.
        out: the picture; its ending says in which format.
    """
    most = max(node.count for node in trees.values())
    with picture(out, 12, 2.3 * len(trees), font_size=7, font_family="monospace") as figure:
        axes = figure.subplots(len(trees), 1, squeeze=False)
        for axis, (name, node) in zip(axes[:, 0], trees.items(), strict=True):
            _flames(axis, node, 0, 0, most)
            axis.set_xlim(0, most)
            axis.set_ylim(-DEPTH, 0)
            axis.set_axis_off()
            title = f"{name}: {node.count / RATE:.0f} s of threads that compute, in {seconds:.0f} s"
            axis.set_title(title, loc="left", fontsize=9, fontweight="bold")


def _flames(axis: Axes, node: Node, left: float, depth: int, most: int) -> None:
    from matplotlib.patches import Rectangle

    if depth == DEPTH:
        return
    for name, call in sorted(node.calls.items(), key=lambda each: -each[1].count):
        share = call.count / most
        if share >= NARROWEST:
            axis.add_patch(Rectangle((left, -depth - 0.95), call.count, 0.9, facecolor=_colour(name), edgecolor="white", lw=0.3))
            letters = int(share * LETTERS)
            if letters >= 4:
                words = name if len(name) <= letters else name[: letters - 1] + "…"
                axis.text(
                    left + most * 0.002,
                    -depth - 0.5,
                    words,
                    va="center",
                    color="white" if _colour(name) != COLOURS[""] else "black",
                )
            _flames(axis, call, left, depth + 1, most)
        left += call.count


def _colour(name: str) -> str:
    _, _, place = name.partition("(")
    room = place.partition("/")[0]
    return COLOURS[room] if room in COLOURS else COLOURS[""]


def record(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Path], float]:
    """Play a run, and sample the driver and each role.

    Args:
        arguments: of the command.
        folder: for the stacks.

    Returns:
        A file for each process that was sampled, and the seconds that the run took.

    Raises:
        RuntimeError: if the run ends with another status than 0, or py-spy could not look at a process.
    """
    began = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "cluster", "run", *arguments], cwd=ROOT)
    spies: dict[str, subprocess.Popen[bytes]] = {"driver": _spy(run.pid, folder / "driver.txt")}
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            role = _role_of(process)
            if role and role not in spies:
                spies[role] = _spy(process.pid, folder / f"{role}.txt")
        time.sleep(0.1)
    if run.returncode:
        raise RuntimeError(f"the run ended with status {run.returncode}; what it printed says why")
    seconds = time.monotonic() - began
    for name, spy in spies.items():
        _, said = spy.communicate(timeout=60)
        if not (folder / f"{name}.txt").exists():
            raise RuntimeError(f"py-spy could not look at {name}: {said.decode(errors='replace').strip()[-500:]}")
    return {name: folder / f"{name}.txt" for name in ("driver", *ROLES) if name in spies}, seconds


def _role_of(process: psutil.Process) -> str | None:
    try:
        title = " ".join(process.cmdline()[:1])
    except psutil.Error:
        return None
    return next((role for role in ROLES if title.startswith(f"ray::{role}")), None)


def _spy(pid: int, out: Path) -> subprocess.Popen[bytes]:
    words = f"record --pid {pid} --rate {RATE} --format raw --function --output".split()
    command = [str(Path(sys.executable).with_name("py-spy")), *words, str(out)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Play, sample, draw.

    Args:
        arguments: None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options, given = parser.parse_known_args(arguments)
    base = ["configs/quickstart.yaml", "--name", "profile", *given]
    if "--name" in given:
        parser.error("--name: the run is called profile, and one of that name is begun anew")
    config: RunConfig = load_config(ROOT / base[0], base[1:])
    folder = storage_root(config) / "runs" / "profile" / "flames"
    shutil.rmtree(folder.parent, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "cluster", "run", *base, "--rounds.num_rounds", "1"], cwd=ROOT, check=True)
    folder.mkdir()
    files, seconds = record([*base, "--rounds.num_rounds", "2"], folder)
    draw({name: tree(path.read_text().splitlines()) for name, path in files.items()}, seconds, options.out)
    print(f"{options.out}: {', '.join(files)}; stacks in {folder}")


if __name__ == "__main__":
    main()
