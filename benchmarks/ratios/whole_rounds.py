"""C8: a whole round of the quickstart, as the driver plays it, against its phases alone, one after another.

The run's own roles, placed and started as the command does it, play round after round, each timed from its begin to its commit.
In turns with them the phases of the latest committed round are done again by the bare functions (``bare_round``): what a round
would take if driver, Ray, journal and disk took nothing.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.ratios.bare_round import BareRound
from benchmarks.ratios.bare_vllm import BareEngine
from benchmarks.ratios.child import ROOT
from benchmarks.ratios.frame import Took, Turns, of_all_processes, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.whole_run import under_way
from cluster.config import RunConfig
from cluster.load_config import load_config

QUICKSTART, TURNS = ROOT / "configs" / "quickstart.yaml", 5
"""Turns at most: a round and its phases take about a minute on two cores."""
SMALL = (
    "--world.num_texts", "600", "--world.num_pairs", "64", "--world.num_validation_pairs", "32", "--world.num_prompts", "64",
    "--world.num_eval_prompts", "16", "--sft.shape.hidden_size", "64", "--sft.shape.num_heads", "2",
    "--sft.shape.intermediate_size", "96", "--meta.num_prompts", "16", "--policy.steps_per_round", "2",
    "--policy.prompts_per_step", "16", "--policy.minibatch_size", "16", "--policy.microbatch_size", "16",
    "--evaluation.num_prompts", "8",
)  # fmt: skip
"""What makes a quickstart small."""


def config_of(folder: Path, settings: Settings) -> RunConfig:
    """The quickstart, with rounds enough, and the rollouts of its steps kept for what is compared with."""
    rounds = ("--rounds.num_rounds", str(settings.repetitions + 2), "--rounds.keep_rollouts", "true")
    roles = ("rollout", "reward", "scorer", "learner")
    threads = [word for role in roles for word in (f"--resources.{role}.threads", str(settings.threads))]
    return load_config(QUICKSTART, ["--storage", str(folder), *rounds, *threads, *(SMALL if settings.small else ())])


def measure(settings: Settings) -> Iterator[Row]:
    """One case."""
    settings = replace(settings, repetitions=min(TURNS, settings.repetitions))
    bare: list[BareRound] = []
    found: dict[str, list[dict[str, float]]] = {"round": [], "phases": []}
    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        config = config_of(Path(name), settings)
        theme = stack.enter_context(under_way(config, Path(name)))
        context = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        engine = BareEngine(theme.inputs.sft_dir, Path(name), context, config.rollout, settings.threads)
        stack.callback(engine.end)

        def play() -> None:
            theme.play(theme.directory.num_committed)
            found["round"].append(dict(theme.wait.seconds))

        def phases() -> None:
            found["phases"].append(bare[-1].seconds())

        def prepare(way: str) -> None:
            if way == "phases":
                bare[:] = [BareRound(theme, theme.directory.num_committed - 1, engine)]

        play()
        turns = take_turns({"round": play, "phases": phases}, settings.repetitions, of_all_processes, prepare)
        equality = bare[-1].agreement()
    taken = {way: each[-settings.repetitions :] for way, each in found.items()}
    alone = tuple(Took(sum(each.values()), took.cpu) for each, took in zip(taken["phases"], turns.took["phases"], strict=True))
    turns = Turns({"round": turns.took["round"], "phases": alone}, turns.load)
    middle = {way: {phase: statistics.median(each[phase] for each in all_) for phase in all_[0]} for way, all_ in taken.items()}
    figures = {f"{phase}_ratio": round(middle["round"][phase] / middle["phases"][phase], 2) for phase in middle["phases"]}
    waited = statistics.median(
        sum(each.values()) / took.wall for each, took in zip(taken["round"], turns.took["round"], strict=True)
    )
    place = ("C8", "a round of the quickstart")
    yield row(place, turns, ("round", "phases"), settings, 1.0, equality, **figures, driver_share=round(1 - waited, 3))
