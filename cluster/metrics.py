"""Numbers as they arise: metrics.jsonl is the record, TensorBoard, Ray's metrics and trackers are the views."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.reward_trainer import RewardReport
from actors.scorer import Scores
from cluster.console import Bar, Console
from cluster.metrics_file import forget_rows
from cluster.signals import Stopped
from cluster.sync import Sync
from cluster.telemetry import Telemetry
from cluster.trackers import Trackers
from evaluation.timeline import DRIVER, Span

STEP_PHASES = ("policy", "sample", "sync")
"""What has a row for each PPO step."""
NO_WORDS: Mapping[str, str] = {}
NO_TRACKERS = Trackers()


class Metrics:
    """Writes them all.

    Args:
        path: of the run.
        steps_per_round: PPO steps of a round; a global step is round * steps_per_round + step.
        telemetry: Ray's metrics.
        may_write: called before a row of what is learned is written, and before rows are forgotten; raises where the record is
            another driver's by now. What happens to processes is written down all the same.
        trackers: what else the numbers are reported to.
    """

    def __init__(
        self,
        path: Path,
        steps_per_round: int,
        telemetry: Telemetry,
        may_write: Callable[[], None] = lambda: None,
        trackers: Trackers = NO_TRACKERS,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps_per_round, self.telemetry, self.may_write, self.trackers = steps_per_round, telemetry, may_write, trackers
        self.record = path / "metrics.jsonl"
        self.file = self.record.open("a", buffering=1)
        self.writer, self.path = SummaryWriter, path / "tensorboard"
        self.boards: dict[str, SummaryWriter] = {}
        self.bar: Bar | None = None
        self.sampled: dict[tuple[int, int], tuple[float, float]] = {}
        self.updated: float | None = None
        self.bar_first = 0

    def close(self) -> None:
        """Flush and close."""
        self.telemetry.refresh()
        self.file.close()
        for board in self.boards.values():
            board.close()  # type: ignore[no-untyped-call]
        ended_by = sys.exception()
        self.trackers.close(well=ended_by is None or isinstance(ended_by, Stopped | KeyboardInterrupt | SystemExit))

    def mark(self) -> int:
        """Make the record durable as far as it goes.

        Returns:
            Its length, bytes.
        """
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def go_back(self, mark: int) -> None:
        """Forget the rows after a place, which are about to come again.

        Args:
            mark: what ``mark`` gave then.
        """
        self.may_write()
        self.file.close()
        for board in self.boards.values():
            board.close()  # type: ignore[no-untyped-call]
        self.boards = {}
        forget_rows(self.record, mark)
        self.file = self.record.open("a", buffering=1)

    def steps(self, first: int, number: int, console: Console) -> Iterator[int]:
        """The PPO steps of a round from ``first`` on, under one bar."""
        with console.bar("policy (PPO)", "steps") as bar:
            self.bar, self.bar_first, self.updated = bar, first, time.perf_counter()
            for step in range(first, number):
                bar.update(step - first, number - first)
                self.telemetry.set("rondo_step", step)
                yield step
            bar.update(number - first, number - first)
        self.bar = None

    def _write(
        self,
        index: int,
        step: int,
        phase: str,
        values: dict[str, float | None],
        steps_per_round: int,
        words: Mapping[str, str] = NO_WORDS,
    ) -> None:
        now = round(time.time(), 3)
        row = {"time": now, "round": index, "step": step, "phase": phase, **values, **words}
        self.may_write()
        self.file.write(json.dumps(row) + "\n")
        self.telemetry.row(index, values)
        self.trackers.log(phase, index * steps_per_round + step, now, values)
        if phase not in self.boards:  # each phase has its own count of steps, and forgets what was written from this one on
            purge = max(0, index * steps_per_round + step)
            self.boards[phase] = self.writer(str(self.path / phase), purge_step=purge)  # type: ignore[no-untyped-call]
        for name, value in values.items():
            if value is not None:
                self.boards[phase].add_scalar(name, value, index * steps_per_round + step)  # type: ignore[no-untyped-call]

    def policy(self, index: int, step: int, update: dict[str, float], rewards: Scores, gold: float | None) -> None:
        """One PPO update."""
        primary = [row[0] for row in rewards.members]
        values: dict[str, float | None] = {
            **update,
            "policy/scores_dropped": float(rewards.dropped),
            "policy/proxy": sum(primary) / len(primary),
            "policy/ensemble_mean": sum(rewards.mean) / len(rewards.mean),
            "policy/ensemble_std": sum(rewards.std) / len(rewards.std),
            "policy/gold": gold,
        }
        self._write(index, step, "policy", values, self.steps_per_round)
        self._sampling(index, step, update["policy/tokens"])
        self._count(len(primary), update["policy/tokens"])
        if self.bar:
            note = f"score {values['policy/score']:.2f}  KL {values['policy/kl']:.2f}" + (
                "" if gold is None else f"  gold {gold:.2f}"
            )
            self.bar.update(step + 1 - self.bar_first, self.steps_per_round - self.bar_first, note=note)

    def guard(self, index: int, step: int, counts: Mapping[str, int], event: Mapping[str, str]) -> None:
        """A step whose numbers went wrong.

        Args:
            index: of the round.
            step: of it.
            counts: of such steps in the round so far, by what was done.
            event: what it was, in words.
        """
        values: dict[str, float | None] = {f"guard/{name}": float(count) for name, count in counts.items()}
        self._write(index, step, "guard", values, self.steps_per_round, event)

    def span(self, span: Span) -> None:
        """A wait of the driver, or the work of a process, that is over."""
        self.telemetry.span(span)
        if span.what == "sample" and span.who != DRIVER and span.round is not None and span.step is not None:
            place = (span.round, span.step)
            start, end = self.sampled[place] if place in self.sampled else (span.start, span.end)
            self.sampled[place] = (min(start, span.start), max(end, span.end))

    def seconds_of(self, index: int, step: int) -> float:
        """How long the engines took for the batch of a step, s."""
        start, end = self.sampled[index, step]
        return end - start

    def was_sampled(self, index: int, step: int, seconds: float) -> None:
        """The batch of a step is one that was recorded.

        Args:
            index: of the round.
            step: of it.
            seconds: what ``seconds_of`` was then.
        """
        self.sampled[index, step] = (0.0, seconds)

    def _sampling(self, index: int, step: int, tokens: float) -> None:
        """How fast the engines sampled the batch of a step."""
        start, end = self.sampled.pop((index, step))
        rates: dict[str, float | None] = {"sample/seconds": end - start, "sample/tokens_per_second": tokens / (end - start)}
        self._write(index, step, "sample", rates, self.steps_per_round)

    def _count(self, rollouts: int, tokens: float) -> None:
        """An update is done."""
        now = time.perf_counter()
        self.telemetry.add("rondo_updates", 1.0)
        self.telemetry.add("rondo_rollouts", rollouts)
        self.telemetry.add("rondo_rollout_tokens", tokens)
        if self.updated is not None:
            self.telemetry.observe("rondo_step_seconds", now - self.updated)
        self.updated = now

    def sync(self, index: int, step: int, took: Sync) -> None:
        """What it took to give the engines the weights of a step."""
        self._write(index, step, "sync", dict(took.as_dict()), self.steps_per_round)

    def pool(self, index: int | None, step: int | None, values: Mapping[str, float | str]) -> None:
        """A batch that an elastic pool has sampled, or an engine that came or went; -1 where there is no round or step."""
        self.telemetry.serve(float(values["pool/engines"]))
        self.telemetry.row(-1, {key: float(value) for key, value in values.items() if key.startswith("pool/")})
        if "event" in values and values["event"] == "died":
            self.telemetry.failed(str(values["engine"]))
        place = {"round": -1 if index is None else index, "step": -1 if step is None else step}
        self.file.write(json.dumps({"time": round(time.time(), 3), **place, "phase": "pool", **values}) + "\n")

    def fault(
        self, index: int | None, step: int | None, process: str, words: Mapping[str, str], values: Mapping[str, float]
    ) -> None:
        """Something happened to a process; -1 where there is no round or step.

        Args:
            index: of the round.
            step: of it.
            process: its name.
            words: what happened, by key.
            values: numbers, by name.
        """
        self.telemetry.row(-1, values)
        if words["event"] in ("lost", "raised"):
            self.telemetry.failed(process)
        place = {"round": -1 if index is None else index, "step": -1 if step is None else step, "phase": "faults"}
        rounded = {name: round(value, 3) for name, value in values.items()}
        self.file.write(json.dumps({"time": round(time.time(), 3), **place, "process": process, **words, **rounded}) + "\n")

    def reward(self, index: int, report: RewardReport) -> None:
        """The steps of a reward model's fit."""
        for step, values in enumerate(report.steps):
            self._write(index, step, "reward", dict(values), len(report.steps))
        for step, values in report.measurements:
            self._write(index, step - 1, "validation", dict(values), len(report.steps))

    def dpo(self, index: int, rows: Sequence[dict[str, float]]) -> None:
        """What DPO logged."""
        for row in rows:
            values: dict[str, float | None] = {name: value for name, value in row.items() if name != "step"}
            self._write(index, int(row["step"]) - 1, "dpo", values, int(rows[-1]["step"]))

    def monitor(self, index: int, step: int, values: Mapping[str, float | None]) -> None:
        """Signs of over-optimisation in the rollouts of a step."""
        self._write(index, step, "monitor", {f"monitor/{name}": value for name, value in values.items()}, self.steps_per_round)

    def evaluation(self, index: int, summary: dict[str, Any]) -> None:
        """The judgement of a round; -1 is SFT's."""
        values = {f"evaluation/{name}": value for name, value in summary.items() if not isinstance(value, str)}
        self._write(index, 0, "evaluation", values, 1)
