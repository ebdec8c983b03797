"""What must hold after every fault, as code: I1 to I6."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet
from safetensors import SafetensorError, safe_open

from benchmarks.faults.nodes import Nodes
from benchmarks.faults.observer import Observer
from benchmarks.faults.play import Run, ledger
from cluster.config import RunConfig

NOT_LEARNED = ("journal.jsonl", "manifest.json")
"""Files of a round that tell when and how it was made, not what it came to."""
PLAYED = ("policy", "reward", "evaluation", "validation")
"""Phases of metrics.jsonl whose rows say what was learned; the others say how fast."""
LEAVE_S = 20.0
HELD = "held"
WORDS = 1000
"""Most characters of what is written down of an invariant that does not hold; a run's last words are at the end."""
ACTORS = re.compile(r"^ray::(RolloutEngine|RewardTrainer|EnsembleScorer|PolicyLearner|Preparer|ElasticEngines)\b")


@dataclass(frozen=True)
class Held:
    """What was found.

    Args:
        wrong: of each invariant that was looked at, what does not hold; empty where it holds.
    """

    wrong: Mapping[str, Sequence[str]]

    def words(self) -> dict[str, str]:
        """For the table and the results."""
        said = {name: " ".join("; ".join(wrong[:3]).split())[-WORDS:] for name, wrong in self.wrong.items()}
        return {name: words or HELD for name, words in said.items()}

    @property
    def all(self) -> bool:
        """True if every one holds."""
        return not any(self.wrong.values())

    def also(self, more: Mapping[str, Sequence[str]]) -> Held:
        """The same, and further things that do not hold."""
        names = (*self.wrong, *(name for name in more if name not in self.wrong))
        both = {name: (*_of(self.wrong, name), *_of(more, name)) for name in names}
        return Held(both)


def _of(wrong: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    return wrong[name] if name in wrong else ()


def complete(run: Path, config: RunConfig) -> list[str]:
    """I1: the committed rounds are those of the config, each step of each is there once, and each sample."""
    wrong: list[str] = []
    index = [entry["round"] for entry in ledger(run)["rounds"]]
    if index != list(range(config.rounds.num_rounds)):
        wrong.append(f"the ledger has rounds {index}, {config.rounds.num_rounds} were asked for")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = Counter((row["round"], row["step"]) for row in rows if row["phase"] == "policy" and row["round"] in index)
    out = {(k, step) for k in index for step in left_out(run / "rounds" / f"round_{k:03d}")}
    wanted = {(k, step) for k in index for step in range(config.policy.steps_per_round)} - out
    if set(steps) != wanted or set(steps.values()) - {1}:
        wrong.append(f"steps of metrics.jsonl: {sorted(set(steps) ^ wanted)} differ, {duplicates(steps)} come twice")
    for k in index:
        wrong += _samples(run / "rounds" / f"round_{k:03d}", config)
        wrong += stale(run / "rounds" / f"round_{k:03d}") if config.rounds.keep_rollouts and not config.policy.max_lag else []
    ids = [row["sample_id"] for file in sorted(run.glob("rounds/round_*/steps/*.parquet")) for row in _rows(file)]
    if twice := duplicates(Counter(ids)):
        wrong.append(f"{len(twice)} sample ids come twice, such as {twice[0]}")
    return wrong


def left_out(folder: Path) -> set[int]:
    """PPO steps of a round that were not learned from, since their numbers went wrong."""
    journal = folder / "journal.jsonl"
    entries = [json.loads(line)["entry"] for line in journal.read_text().splitlines()] if journal.exists() else []
    bad = [entry for entry in entries if entry["key"].split()[0] == "bad" and entry["facts"]["action"] != "refitted"]
    return {int(entry["key"].split()[1]) for entry in bad}


def _samples(folder: Path, config: RunConfig) -> list[str]:
    wrong = []
    policy, meta = config.policy, config.meta
    shifted = Counter((row["prompt_id"], row["sample"]) for row in _rows(folder / "meta_rollouts.parquet"))
    per_prompt = Counter(prompt for prompt, _ in shifted)
    if set(shifted.values()) - {1} or set(per_prompt.values()) - {meta.samples_per_prompt} or not shifted:
        wrong.append(f"{folder.name}: S_k is not {meta.samples_per_prompt} samples of each prompt, once")
    judged = Counter(row["prompt_id"] for row in _rows(folder / "evaluation.parquet"))
    if len(judged) != config.evaluation.num_prompts or set(judged.values()) != {1}:
        wrong.append(
            f"{folder.name}: {len(judged)} of {config.evaluation.num_prompts} evaluation prompts, {duplicates(judged)} twice"
        )
    if config.rounds.keep_rollouts:
        number = {int(file.stem): len(_rows(file)) for file in sorted((folder / "steps").glob("*.parquet"))}
        each, steps = policy.prompts_per_step * policy.samples_per_prompt, set(range(policy.steps_per_round))
        if set(number.values()) - {each} or not steps - left_out(folder) <= set(number) <= steps:
            wrong.append(f"{folder.name}: rollouts of the steps: {number}, {each} each were asked for")
    return wrong


def stale(folder: Path) -> list[str]:
    """Steps of a round whose rollouts were not all drawn by the weights that learned from them."""
    versions, wrong = dict[int, int](), list[str]()
    begun = 0
    for line in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)["entry"]
        name, _, number = entry["key"].partition(" ")
        if name == "begun":
            begun = entry["facts"]["version"]
        elif name == "step":
            versions[int(number)] = entry["facts"]["version"]
    for file in sorted((folder / "steps").glob("*.parquet")):
        step = int(file.stem)
        held = max((version for earlier, version in versions.items() if earlier < step), default=begun)
        drew = {row["policy_version"] for row in _rows(file)} | {v for row in _rows(file) for v in row["swap_versions"]}
        if step in versions and drew != {held}:
            wrong.append(f"{folder.name}, step {step}: drawn by versions {sorted(drew)}, learned by {held}")
    return wrong


def duplicates(counts: Counter[Any]) -> list[Any]:
    """What was counted more than once."""
    return [key for key, number in counts.items() if number > 1]


def _rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def whole(run: Path) -> list[str]:
    """I2: every file of the run can be read to its end, is what the journal says it is, and no draft is left."""
    wrong: list[str] = []
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if ".partial" in name or ".dropped" in name or name.startswith(("tensorboard/", "logs/")):
            wrong += [f"{name} is left over"] if ".partial" in name or ".dropped" in name else []
        elif file.is_file() and (why := _torn(file)):
            wrong.append(f"{name}: {why}")
    for journal in sorted(run.glob("rounds/round_*/journal.jsonl")):
        for line in journal.read_text().splitlines():
            for name, digest in json.loads(line)["entry"]["outputs"].items():
                file = journal.parent / name
                if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                    wrong.append(f"{journal.parent.name}/{name} is not what the journal says")
    return wrong


def _torn(file: Path) -> str | None:
    """Why a file cannot be read to its end; None if it can."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            for line in file.read_text().splitlines():
                json.loads(line)
        elif file.suffix == ".parquet":
            parquet.read_table(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensors.get_tensor(name)
    except (ValueError, OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def same_bits(run: Path, baseline: Path, rounds: Sequence[int] | None = None) -> list[str]:
    """I3: what was learned is bit for bit what it is without the fault.

    Args:
        run: directory of the run that was disturbed.
        baseline: of one that was not.
        rounds: to compare; None = all.
    """
    wrong: list[str] = []
    numbers_of = [int(path.name[-3:]) for path in sorted((baseline / "rounds").glob("round_*"))] if rounds is None else rounds
    for folder in (baseline / "rounds" / f"round_{k:03d}" for k in numbers_of):
        ours = run / "rounds" / folder.name
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            if not file.is_file() or file.name in NOT_LEARNED or name.parts[0] == "steps":
                continue
            if not (ours / name).is_file() or (ours / name).read_bytes() != file.read_bytes():
                wrong.append(f"{folder.name}/{name} differs")
    numbers = [_learned(path, None if rounds is None else set(rounds)) for path in (run, baseline)]
    if numbers[0] != numbers[1]:
        places = [key for key in numbers[1] if key not in numbers[0] or numbers[0][key] != numbers[1][key]]
        wrong.append(f"metrics of {places[:3]} differ")
    return wrong


def _learned(run: Path, rounds: set[int] | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["phase"], row["round"], row["step"]): {key: value for key, value in row.items() if key != "time"}
        for row in rows
        if row["phase"] in PLAYED and (rounds is None or row["round"] in rounds)
    }


def nothing_left(nodes: Nodes, observer: Observer, shared: set[str], run: Run) -> list[str]:
    """I4: what the run took is back, within ``LEAVE_S``.

    Args:
        nodes: the cluster.
        observer: of it.
        shared: names in /dev/shm before the run.
        run: that has ended.
    """
    deadline = time.monotonic() + LEAVE_S
    while (left := _left(nodes, observer, shared)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left + ([f"driver {run.process.pid} lives"] if run.process.poll() is None else [])


def _left(nodes: Nodes, observer: Observer, shared: set[str]) -> list[str]:
    ours = [process for node in nodes.alive() for process in node.family() if process.is_running()]
    workers = [title for title in map(_title, ours) if ACTORS.match(title)]
    pids = {process.pid for process in ours}
    names = sorted(name for name in shared_memory() - shared if not of_others(name, pids))
    return [*workers, *observer.room_is_back(), *(f"/dev/shm/{name}" for name in names)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:  # it ended just now, and may wait to be buried
        return ""


def of_others(name: str, ours: Collection[int]) -> bool:
    """Whether a name in /dev/shm is that of a living process that has nothing to do with the bench.

    Args:
        name: which may hold its process's number, as those of ``multiprocessing`` do.
        ours: processes of the cluster.
    """
    numbers = [int(number) for number in re.findall(r"-(\d+)-", name)]
    return any(number not in ours and psutil.pid_exists(number) for number in numbers)


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    place = Path("/dev/shm")
    return {file.name for file in place.iterdir()} if place.is_dir() else set()


def named(run: Run, patterns: Sequence[str]) -> list[str]:
    """I6: the run says what happened.

    Args:
        run: that has ended.
        patterns: regular expressions, one a fault, of lines that the driver printed.
    """
    text = run.output()
    return [f"no line like {pattern!r}" for pattern in patterns if not re.search(pattern, text)]
