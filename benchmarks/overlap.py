"""What sampling ahead of the learner is worth: ``policy.max_lag`` 1 against 0.

    python -m benchmarks.overlap                 # engines and learners that sleep, seconds
    python -m benchmarks.overlap --real          # besides, a small real run on this machine, minutes
    python -m benchmarks.overlap --redraw        # docs/img/overlap.svg from the latest measurement, nothing measured

1. An engine that sleeps g seconds for a batch and a learner that sleeps t for an update, as Ray actors behind the interface of
   the real ones, driven by the run's own waiter and sampling. A step should take g + t with max_lag 0 and max(g, t) with 1.
2. With --real: rounds of the sandbox at both settings, seconds per step from the runs' timelines. Engine and learner share the
   cores here, so that a ratio near 1 is what to expect.

Appends to benchmarks/results/overlap.jsonl and draws the spans of the first pair (g, t) into docs/img/overlap.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.process import Identity
from benchmarks.pictures import picture
from benchmarks.sleepers import SleepingEngine, SleepingLearner
from cluster.config import RunConfig
from cluster.console import Console
from cluster.fixed_pool import FixedPool
from cluster.load_config import load_config
from cluster.pool import RolloutPool
from cluster.roles import LearnerHandle, together
from cluster.rota import OwnDevices, Process
from cluster.sampling import Sampling, sampling
from cluster.storage import storage_root
from cluster.versions import versions
from cluster.waiting import Waiter
from evaluation.timeline import DRIVER, Span, read_timeline
from evaluation.timeline_figure import draw_spans, phases_of
from tokens.records import Prompt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overlap.jsonl"
PICTURE = ROOT / "docs" / "img" / "overlap.svg"
PAIRS = ((0.4, 0.4), (0.6, 0.3), (0.3, 0.6), (0.5, 0.1))
"""Seconds of sampling and of learning."""
NUM_STEPS = 8
REAL = (
    "--rounds.num_rounds", "1", "--world.num_texts", "4000", "--world.num_pairs", "600", "--meta.num_prompts", "48",
    "--scorer.num_members", "1", "--scorer.aggregate", "mean", "--evaluation.num_prompts", "64", "--policy.steps_per_round", "16",
)  # fmt: skip
"""What makes a quickstart small."""


@contextlib.contextmanager
def scene(g: float, t: float) -> Iterator[tuple[RolloutPool, LearnerHandle]]:
    """A pool and a learner that sleep; both have answered once, so that no import is measured. Ray must run."""
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"status": 1, "load": 1}}
    engine: Any = ray.remote(**options)(SleepingEngine).remote(g)
    learner: Any = ray.remote(**options)(SleepingLearner).remote(t)
    try:
        ray.get(learner.update.remote(ray.get(engine.sample.remote([Prompt("p", "", (1,))], 1, 0, 0, (0,))), [0.0], None, 0))
        pool = FixedPool([Process(engine, Identity("rollout-0", 0, ""))], OwnDevices())
        yield pool, LearnerHandle([Process(learner, Identity("learner-0", 0, ""))], 60.0, OwnDevices())
    finally:
        for actor in (engine, learner):
            ray.kill(actor)


def play(config: RunConfig, pool: RolloutPool, learner: LearnerHandle, logs: Path) -> list[Span]:
    """The PPO steps of one round, as the run's loop has them but for the scores, which take no time here."""
    spans: list[Span] = []
    wait = Waiter(Console(), logs, 60.0, spans.append)
    prompts = [Prompt(f"p{i}", "", (1,)) for i in range(config.policy.prompts_per_step)]
    sample: Sampling = sampling(config, prompts, pool, wait)
    wait.begin("round 0", 0)
    for version in range(config.policy.steps_per_round):
        wait.step = version
        rollouts = sample(0, version, version)
        wait("policy", learner.update(rollouts, [0.0] * len(rollouts), None, version))
        sending = learner.send(())
        wait("sync", together(sending, pool.load(sending.refs[0], version + 1, ())))
    return spans


def seconds_per_step(spans: Sequence[Span]) -> float:
    """From the end of the first step's last wait to that of the last, a step; the first has nothing to overlap with."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.who == DRIVER and span.step is not None:
            ends[span.step] = max(span.end, ends.get(span.step, 0.0))
    return (ends[max(ends)] - ends[min(ends)]) / (max(ends) - min(ends))


def asleep(g: float, t: float, max_lag: int, logs: Path, num_steps: int = NUM_STEPS) -> list[Span]:
    """Measure one setting; Ray must run."""
    sizes = dict.fromkeys(("prompts_per_step", "minibatch_size", "microbatch_size"), 4)
    policy = {"max_lag": max_lag, "steps_per_round": num_steps, **sizes}
    config = RunConfig.model_validate({"name": "overlap", "policy": policy})
    with scene(g, t) as (pool, learner):
        return play(config, pool, learner, logs)


def compare(g: float, t: float, logs: Path, num_steps: int = NUM_STEPS) -> tuple[dict[str, float], list[list[Span]]]:
    """max_lag 0 and 1 for one pair: ratio measured, ratio predicted, and the spans of both."""
    both = [asleep(g, t, max_lag, logs, num_steps) for max_lag in (0, 1)]
    on_policy, ahead = (seconds_per_step(spans) for spans in both)
    predicted, ratio = (g + t) / max(g, t), on_policy / ahead
    return {
        "g_s": g, "t_s": t, "step_s_max_lag_0": on_policy, "step_s_max_lag_1": ahead,
        "ratio": ratio, "predicted": predicted, "difference": ratio / predicted - 1,
    }, both  # fmt: skip


def real(config_path: Path, overrides: Sequence[str], repetitions: int) -> dict[str, Any]:
    """The same of real runs, in turn: median seconds per step of their timelines."""
    found: dict[int, list[float]] = {0: [], 1: []}
    gold: dict[int, list[float]] = {0: [], 1: []}
    for repetition, max_lag in itertools.product(range(repetitions), (0, 1)):
        name = f"overlap-{os.getpid()}-{repetition}-{max_lag}"
        words = [*REAL, *overrides, "--name", name, "--policy.max_lag", str(max_lag)]
        subprocess.run([sys.executable, "-m", "cluster", "run", str(config_path), *words], check=True, cwd=ROOT)
        run = storage_root(load_config(config_path, words)) / "runs" / name
        found[max_lag].append(seconds_per_step(read_timeline(run / "timeline.jsonl")))
        gold[max_lag].append(json.loads((run / "ledger.json").read_text())["rounds"][-1]["evaluation"]["gold"])
    middle = {lag: statistics.median(values) for lag, values in found.items()}
    return {
        "config": config_path.name, "overrides": list(overrides), "cores": os.cpu_count(), "device": "cpu",
        "step_s_max_lag_0": middle[0], "step_s_max_lag_1": middle[1], "ratio": middle[0] / middle[1],
        "all_step_s": found, "gold": gold,
    }  # fmt: skip


def draw(rows: Sequence[tuple[str, Sequence[Span]]], path: Path) -> None:
    """One panel per setting, on one axis of time; on white, so that it reads on light and dark pages."""
    with picture(path, 9, 1.9 * len(rows) + 0.5) as figure:
        axes = figure.subplots(len(rows), 1, sharex=True)
        longest = max(max(s.end for s in spans) - min(s.start for s in spans) for _, spans in rows)
        for ax, (title, spans) in zip(axes, rows, strict=True):
            start = min(span.start for span in spans)
            draw_spans(ax, spans, start, start + longest, numbered=True)
            ax.set_title(title, loc="left", fontsize=10)
            ax.set_xlabel("")
        axes[-1].set_xlabel("seconds")
        handles, labels = phases_of(axes[0])
        figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False)


def redraw(path: Path) -> None:
    """The latest measurement's spans."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    row = next(row for row in reversed(rows) if "spans" in row)
    titles = [
        f"max_lag {lag}: {row[f'step_s_max_lag_{lag}']:.2f} s a step (sampling {row['g_s']:g} s, learning {row['t_s']:g} s)"
        for lag in (0, 1)
    ]
    draw([(title, [Span(**span) for span in spans]) for title, spans in zip(titles, row["spans"], strict=True)], path)
    print(path)


def main() -> None:
    """Measure, print, append, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="measure real runs as well")
    parser.add_argument("--repetitions", type=int, default=3, help="real runs of each setting")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="of the real runs")
    parser.add_argument("--redraw", action="store_true", help="draw only")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where to draw (.svg or .png)")
    options, overrides = parser.parse_known_args()
    if not options.redraw:
        lines: list[dict[str, Any]] = []
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        with tempfile.TemporaryDirectory() as logs:
            for number, (g, t) in enumerate(PAIRS):
                row, both = compare(g, t, Path(logs))
                print(f"sampling {g:g} s, learning {t:g} s: {row['step_s_max_lag_0']:.3f} s a step on-policy, "
                      f"{row['step_s_max_lag_1']:.3f} s with max_lag 1; ratio {row['ratio']:.3f}, "
                      f"predicted {row['predicted']:.3f}, difference {row['difference']:+.1%}", flush=True)  # fmt: skip
                spans = {} if number else {"spans": [[vars(span) for span in spans] for spans in both]}
                lines.append({"id": "asleep", "num_steps": NUM_STEPS, **row, **spans})
        ray.shutdown()
        if options.real:
            lines.append({"id": "real", **real(options.config.resolve(), overrides, options.repetitions)})
            print(f"real run, {lines[-1]['cores']} cores: {lines[-1]['step_s_max_lag_0']:.3f} s a step on-policy, "
                  f"{lines[-1]['step_s_max_lag_1']:.3f} s with max_lag 1; ratio {lines[-1]['ratio']:.3f}")  # fmt: skip
        with RESULTS.open("a") as file:
            file.writelines(json.dumps({**line, "versions": versions()}) + "\n" for line in lines)
    redraw(options.out)


if __name__ == "__main__":
    main()
